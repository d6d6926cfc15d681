/**
 * The authenticators of page connections: computed alike by both sides from a key that both have, compared by native
 * code, each good for one connection. Pure.
 *
 * They are cut from streams of HKDF-SHA256 (RFC 5869), since a migration needs some thousand of them before it begins,
 * and one HMAC object each took longer than the whole handshake.
 */
import { hkdfSync } from 'node:crypto';
import { MemferryError } from '../errors.js';

export const TOKEN_BYTES = 32;
export const MIGRATION_ID_BYTES = 16;
/** The demand channel's number on the wire; data channels count from 0. */
export const DEMAND_CHANNEL = 0xffff;

/** HKDF gives no more than 255 hashes at a time. */
const TOKENS_A_BLOCK = 255;

/**
 * The first `count` tokens of a stream, one after the other. Block b of it, 255 tokens, is HKDF-SHA256(key; no salt;
 * info: label in ASCII, context, b as u32 little-endian).
 */
export function tokenStream(key: Uint8Array, label: string, context: Uint8Array, count: number): Uint8Array {
  const tokens = new Uint8Array(count * TOKEN_BYTES);
  const info = Buffer.concat([Buffer.from(label, 'latin1'), context, Buffer.alloc(4)]);
  for (let first = 0; first < count; first += TOKENS_A_BLOCK) {
    info.writeUInt32LE(first / TOKENS_A_BLOCK, info.length - 4);
    const bytes = Math.min(TOKENS_A_BLOCK, count - first) * TOKEN_BYTES;
    tokens.set(new Uint8Array(hkdfSync('sha256', key, '', info, bytes)), first * TOKEN_BYTES);
  }
  return tokens;
}

/** 64 bytes: the keys of the hashes by which a base is compared, of no use in another migration. */
export function baseKey(sessionKey: Uint8Array, migrationId: Uint8Array): Uint8Array {
  return tokenStream(sessionKey, 'memferry base', migrationId, 2);
}

/**
 * Tokens for sets of connections, row by row: at `epoch * (channels + 1) + channel`, the demand channel's last in each
 * row; of several rows the last is the key of later epochs' (wire/later_tokens.h). The stream of the session key, `memferry data` and the migration's id.
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
  return tokenStream(sessionKey, 'memferry data', migrationId, epochs * (channels + 1));
}
