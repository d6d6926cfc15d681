/**
 * The secret of one image, and all that follows from it: how it travels, how knowledge of it is shown, and the
 * tokens of stage connections. Whoever knows it may open the image; a VMD's shared secret alone is not enough.
 * Pure but for fresh randomness, which tests can replace.
 *
 *     sealed   12 bytes nonce | AES-256-GCM(HMAC(session key; "memferry seal"); secret; aad image id) | 16 bytes tag
 *     domain   as sealed, of a deduplication domain's key, under HMAC(session key; "memferry seal domain")
 *     lineage  as sealed, of a guest's lineage (lineage.ts), under HMAC(session key; "memferry seal lineage"),
 *              aad migration id
 *     proof    HMAC(secret; "memferry open", session key)
 *     tokens   stream(session key; "memferry stage"; image id, session u16), at attempt * 6 + role
 *     chain    stream(secret; "memferry chain"; image id, from u16, to u16), at the attempt
 *
 * HMAC is HMAC-SHA256, a stream is control/tokens.ts's, integers are little-endian, the session key is the control
 * connection's.
 */
import { createCipheriv, createDecipheriv, createHmac, randomBytes, timingSafeEqual } from 'node:crypto';
import { TOKEN_BYTES, tokenStream } from '../control/tokens.js';
import { MemferryError } from '../errors.js';
import type { ImageAccess } from '../protocol/stage-messages.js';

export const imageSecretBytes = 32;
export const imageIdBytes = 16;
const nonceBytes = 12;
const tagBytes = 16;

/** Of wire::StageRole. */
export const stageRoles = { scatter: 0, gather: 1, demand: 2, chain: 3, probe: 4, popular: 5 } as const;
export const stageRoleCount = 6;
/** What an opener's connections may be, as a bit set. */
export const roleBits: Record<ImageAccess, number> = {
  control: 0,
  read: (1 << stageRoles.gather) | (1 << stageRoles.demand),
  write: (1 << stageRoles.scatter) | (1 << stageRoles.probe),
};
/** Of a member of a domain. */
export const memberRoles = 1 << stageRoles.popular;
/** Of a session's table: later ones follow from it. */
export const stageAttempts = 64;
/** The chain that comes from the server with ordinal n has this session + n. */
export const firstChainSession = 0xff00;

export function makeImageSecret(): Uint8Array {
  return Uint8Array.from(randomBytes(imageSecretBytes));
}

/** What is sealed, which has a key of its own: one can never be taken for the other. */
type Sealed = 'memferry seal' | 'memferry seal domain' | 'memferry seal lineage';

/** For the peer of one control connection, as hex. `nonce` is for tests: two sealings under one may never differ. */
export function sealSecret(
  sessionKey: Uint8Array,
  image: Uint8Array,
  secret: Uint8Array,
  nonce: Uint8Array = randomBytes(nonceBytes),
  what: Sealed = 'memferry seal',
): string {
  if (secret.length !== imageSecretBytes || image.length !== imageIdBytes || nonce.length !== nonceBytes) {
    throw new MemferryError(
      'INVALID_ARGUMENT',
      'an image secret has 32 bytes, an image id 16 and a nonce 12',
    );
  }
  const cipher = createCipheriv('aes-256-gcm', sealKey(sessionKey, what), nonce).setAAD(image);
  const text = Buffer.concat([cipher.update(secret), cipher.final()]);
  return Buffer.concat([nonce, text, cipher.getAuthTag()]).toString('hex');
}

/** The key of the image's deduplication domain, for a VMD server. */
export function sealDomainKey(sessionKey: Uint8Array, image: Uint8Array, key: Uint8Array): string {
  return sealSecret(sessionKey, image, key, randomBytes(nonceBytes), 'memferry seal domain');
}

export function unsealDomainKey(sessionKey: Uint8Array, image: Uint8Array, sealed: string): Uint8Array {
  return unsealSecret(sessionKey, image, sealed, 'memferry seal domain');
}

/** A guest's lineage (lineage.ts), for the destination. */
export function sealLineage(sessionKey: Uint8Array, migration: Uint8Array, lineage: Uint8Array): string {
  return sealSecret(sessionKey, migration, lineage, randomBytes(nonceBytes), 'memferry seal lineage');
}

export function unsealLineage(sessionKey: Uint8Array, migration: Uint8Array, sealed: string): Uint8Array {
  return unsealSecret(sessionKey, migration, sealed, 'memferry seal lineage');
}

/** Throws AUTH_FAILED: sealed for another connection or image, or altered. */
export function unsealSecret(
  sessionKey: Uint8Array,
  image: Uint8Array,
  sealed: string,
  what: Sealed = 'memferry seal',
): Uint8Array {
  const bytes = Buffer.from(sealed, 'hex');
  if (bytes.length === nonceBytes + imageSecretBytes + tagBytes) {
    const tagAt = bytes.length - tagBytes;
    const cipher = createDecipheriv('aes-256-gcm', sealKey(sessionKey, what), bytes.subarray(0, nonceBytes), {
      authTagLength: tagBytes,
    })
      .setAAD(image)
      .setAuthTag(bytes.subarray(tagAt));
    try {
      return Uint8Array.from(
        Buffer.concat([cipher.update(bytes.subarray(nonceBytes, tagAt)), cipher.final()]),
      );
    } catch {
      // Said below, without the library's words.
    }
  }
  throw new MemferryError('AUTH_FAILED', "the image's secret was not sealed for this connection");
}

/** Shows a server, on one control connection, that the image's secret is known. */
export function openProof(secret: Uint8Array, sessionKey: Uint8Array): string {
  return createHmac('sha256', secret).update('memferry open').update(sessionKey).digest('hex');
}

export function provesOpen(secret: Uint8Array, sessionKey: Uint8Array, proof: string): boolean {
  const expected = Buffer.from(openProof(secret, sessionKey), 'hex');
  const got = Buffer.from(proof, 'hex');
  return got.length === expected.length && timingSafeEqual(got, expected);
}

/**
 * The tokens of a session's stage connections, for the roles of the bit set: at `attempt * 6 + role`, 32 bytes each.
 * The other roles' places hold what nobody can know, but for two keys in those of `popular`, which no connection about an
 * image may be: the first two, where pages may be read, are that under which servers hash pages (wire::stage_hash_key);
 * the next two are that of the tokens of later attempts, which the native side computes (wire/later_tokens.h).
 */
export function stageTokens(
  sessionKey: Uint8Array,
  image: Uint8Array,
  session: number,
  roles: number,
  attempts: number = stageAttempts,
): Uint8Array {
  const context = Buffer.concat([image, u16(session)]);
  const stream = tokenStream(sessionKey, 'memferry stage', context, attempts * stageRoleCount);
  const tokens = Uint8Array.from(randomBytes(stream.length));
  const reads = (roles & (1 << stageRoles.gather)) !== 0;
  const aboutImage = roles !== memberRoles;
  for (let at = 0; at < attempts * stageRoleCount; at++) {
    const role = at % stageRoleCount;
    const attempt = Math.floor(at / stageRoleCount);
    const ofKey = role === stageRoles.popular && aboutImage && attempt >= (reads ? 0 : 2) && attempt < 4;
    if ((roles & (1 << role)) === 0 && !ofKey) continue;
    tokens.set(stream.subarray(at * TOKEN_BYTES, (at + 1) * TOKEN_BYTES), at * TOKEN_BYTES);
  }
  return tokens;
}

/** How often one server may dial another: fewer where there are many, so that an image's tokens stay bounded. */
export function chainAttempts(servers: number): number {
  return Math.max(4, Math.min(stageAttempts, Math.floor(1024 / servers)));
}

/** The tokens, by attempt, with which the server `from` passes pages on to the server `to`; both compute them. */
export function chainTokens(
  secret: Uint8Array,
  image: Uint8Array,
  from: number,
  to: number,
  attempts: number,
): Uint8Array {
  return tokenStream(secret, 'memferry chain', Buffer.concat([image, u16(from), u16(to)]), attempts);
}

function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16LE(value);
  return bytes;
}

/** Chain tokens in the form of a session's table. The other roles' places hold what nobody can know. */
export function chainTable(tokens: Uint8Array): Uint8Array {
  const attempts = tokens.length / TOKEN_BYTES;
  const table = Uint8Array.from(randomBytes(attempts * stageRoleCount * TOKEN_BYTES));
  for (let attempt = 0; attempt < attempts; attempt++) {
    const token = tokens.subarray(attempt * TOKEN_BYTES, (attempt + 1) * TOKEN_BYTES);
    table.set(token, (attempt * stageRoleCount + stageRoles.chain) * TOKEN_BYTES);
  }
  return table;
}

function sealKey(sessionKey: Uint8Array, what: Sealed): Buffer {
  return createHmac('sha256', sessionKey).update(what).digest();
}
