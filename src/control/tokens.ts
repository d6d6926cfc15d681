/**
 * The authenticators of data and demand connections: computed alike by both sides from the control handshake's
 * session key, compared by the native listener, each good for one connection. Pure.
 */
import { createHmac } from 'node:crypto';
import { MemferryError } from '../errors.js';

export const TOKEN_BYTES = 32;
export const MIGRATION_ID_BYTES = 16;
/** The demand channel's number on the wire; data channels count from 0. */
export const DEMAND_CHANNEL = 0xffff;

const LABEL = Buffer.from('memferry data', 'latin1');

/**
 * Tokens for `epochs` sets of connections, row by row: at `epoch * (channels + 1) + channel`, the demand
 * channel's last in each row. A token is HMAC-SHA256(session key; label, migration id, epoch as u32, channel as
 * u16), integers little-endian.
 */
export function dataTokens(
  sessionKey: Uint8Array,
  migrationId: Uint8Array,
  epochs: number,
  channels: number,
): Uint8Array {
  if (migrationId.length !== MIGRATION_ID_BYTES) {
    throw new MemferryError(
      'INVALID_ARGUMENT',
      `a migration id has ${MIGRATION_ID_BYTES} bytes, not ${migrationId.length}`,
    );
  }
  if (!Number.isInteger(epochs) || epochs < 1 || epochs > 65536) {
    throw new MemferryError('INVALID_ARGUMENT', `${epochs} epochs: 1 to 65536 are possible`);
  }
  if (!Number.isInteger(channels) || channels < 1 || channels > 1024) {
    throw new MemferryError('INVALID_ARGUMENT', `${channels} channels: 1 to 1024 are possible`);
  }
  const tokens = new Uint8Array(epochs * (channels + 1) * TOKEN_BYTES);
  const numbers = Buffer.alloc(6);
  let at = 0;
  for (let epoch = 0; epoch < epochs; epoch++) {
    for (let channel = 0; channel <= channels; channel++) {
      numbers.writeUInt32LE(epoch, 0);
      numbers.writeUInt16LE(channel === channels ? DEMAND_CHANNEL : channel, 4);
      const mac = createHmac('sha256', sessionKey).update(LABEL).update(migrationId).update(numbers).digest();
      tokens.set(mac, at);
      at += TOKEN_BYTES;
    }
  }
  return tokens;
}
