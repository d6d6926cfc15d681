/** The authenticators of data connections: their bytes are a contract with the native side. */
import { createHmac } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { DEMAND_CHANNEL, dataTokens } from '../../src/control/tokens.js';

const key = Buffer.alloc(32, 1);
const migration = Buffer.from('00112233445566778899aabbccddeeff', 'hex');

function expected(epoch: number, channel: number): string {
  const input = Buffer.concat([Buffer.from('memferry data'), migration, Buffer.alloc(6)]);
  input.writeUInt32LE(epoch, input.length - 6);
  input.writeUInt16LE(channel, input.length - 2);
  return createHmac('sha256', key).update(input).digest('hex');
}

describe('dataTokens', () => {
  it('lies row by row, the demand channel last', () => {
    const tokens = dataTokens(key, migration, 3, 2);
    expect(tokens).toHaveLength(3 * 3 * 32);
    const at = (row: number) => Buffer.from(tokens.subarray(row * 32, row * 32 + 32)).toString('hex');
    for (let epoch = 0; epoch < 3; epoch++) {
      expect([at(epoch * 3), at(epoch * 3 + 1), at(epoch * 3 + 2)]).toEqual([
        expected(epoch, 0),
        expected(epoch, 1),
        expected(epoch, DEMAND_CHANNEL),
      ]);
    }
  });

  it('keeps to a known answer', () => {
    // By another implementation: printf of the input | openssl dgst -sha256 -mac hmac -macopt hexkey:0101...
    expect(Buffer.from(dataTokens(key, migration, 1, 1)).toString('hex')).toBe(
      '892650a2574c277ad078545351ecbddf1c503b0ed812d4baeb24965f258ced0c' +
        'b8743fd30f226934f03bf8305c2acfd8c5756a8a41cf25643292e7647c249804',
    );
  });

  it('never repeats one, and changes with the key and the migration', () => {
    const seen = new Set<string>();
    const other = Buffer.from(migration).fill(7);
    for (const tokens of [
      dataTokens(key, migration, 64, 4),
      dataTokens(key, other, 64, 4),
      dataTokens(Buffer.alloc(32, 2), migration, 64, 4),
    ]) {
      for (let at = 0; at < tokens.length; at += 32)
        seen.add(Buffer.from(tokens.subarray(at, at + 32)).toString('hex'));
    }
    expect(seen.size).toBe(3 * 64 * 5);
  });

  it('refuses what makes no sense', () => {
    for (const call of [
      () => dataTokens(key, migration.subarray(1), 1, 1),
      () => dataTokens(key, migration, 0, 1),
      () => dataTokens(key, migration, 1.5, 1),
      () => dataTokens(key, migration, 2 ** 32, 1),
      () => dataTokens(key, migration, 1, 0),
      () => dataTokens(key, migration, 1, 0xffff),
    ]) {
      expect(call).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }));
    }
  });
});
