/** The authenticators of data connections: their bytes are a contract with the native side. */
import { createHmac } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { dataTokens } from '../../src/control/tokens.js';

const key = Buffer.alloc(32, 1);
const migration = Buffer.from('00112233445566778899aabbccddeeff', 'hex');

/** RFC 5869 by hand: what HKDF gives, one HMAC a token. */
function expected(index: number): string {
  const hmac = (by: Buffer, ...parts: Buffer[]) =>
    createHmac('sha256', by).update(Buffer.concat(parts)).digest();
  const pseudorandom = hmac(Buffer.alloc(32), key);
  const info = Buffer.concat([Buffer.from('memferry data'), migration, Buffer.alloc(4)]);
  info.writeUInt32LE(Math.floor(index / 255), info.length - 4);
  let token: Buffer = Buffer.alloc(0);
  for (let counter = 1; counter <= (index % 255) + 1; counter++) {
    token = hmac(pseudorandom, token, info, Buffer.from([counter]));
  }
  return token.toString('hex');
}

describe('dataTokens', () => {
  it('lies row by row, the demand channel last, and goes on over the blocks', () => {
    const tokens = dataTokens(key, migration, 200, 2);
    expect(tokens).toHaveLength(200 * 3 * 32);
    const at = (index: number) => Buffer.from(tokens.subarray(index * 32, index * 32 + 32)).toString('hex');
    for (const index of [0, 1, 2, 3, 254, 255, 256, 509, 510, 599]) {
      expect(at(index), `token ${index}`).toBe(expected(index));
    }
  });

  it('keeps to a known answer', () => {
    // By another implementation: openssl kdf -keylen 64 -kdfopt digest:SHA2-256 -kdfopt hexkey:0101... \
    //   -kdfopt hexinfo:6d656d66657272792064617461 00112233445566778899aabbccddeeff 00000000 HKDF
    expect(Buffer.from(dataTokens(key, migration, 1, 1)).toString('hex')).toBe(
      '54d627a6974ee0f6e96712053307e9dcc2dd5c6679bf6fe1db27585dac3abe86' +
        '85a47248b5b4761a7af4060b7d083b4611c134076c6f028607f72d76273023a8',
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
