/** Fields that options of several commands have in common, and how they are checked. */
import { z } from 'zod';
import { MemferryError } from '../errors.js';

export const bytes = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
export const milliseconds = z
  .number()
  .positive()
  .max(7 * 24 * 3600 * 1000);
/** How long servers keep an image that was not committed and that nobody has open: what `create` may say on the wire. */
export const leaseMilliseconds = z.number().int().min(100).max(3_600_000);
/** What a name on the wire may be: a server's, a rack's, a region's. */
export const label = z.string().min(1).max(64);
/** With a buffer of any kind, as Buffers have: the constructor's own type says less. */
export const uint8Array = z.instanceof<new () => Uint8Array>(Uint8Array);
const secret = z.union([uint8Array, z.string().min(1)], 'expected bytes or a text');

/** True where both are the same type: what users read of an interface is what its schema takes. */
export type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false;

/** What every command that speaks to peers may be told. */
export interface ConnectionOptions {
  /**
   * The shared secret itself, which both sides have; at least 16 bytes, a string's in UTF-8. Without one the secret file
   * is read.
   */
  secret?: Uint8Array | string;
  /**
   * A file that holds the secret, this user's own, mode 0600 (AUTH_FAILED otherwise). With neither, loopback takes one
   * that is made automatically for each user; other addresses are INVALID_ARGUMENT.
   */
  secretFile?: string;
  /**
   * Allow an address other than loopback (PLAINTEXT_REQUIRED without it) although the connection is not encrypted.
   * Default false.
   */
  plaintext?: boolean;
  /** Without a word from the peer for this long the control connection counts as cut, in ms. Default 10 000. */
  peerTimeoutMs?: number;
  /** Post-copy: how long a cut may last before it is final, in ms. Default 60 000. */
  recoverTimeoutMs?: number;
}

export const connectionShape = {
  secret: secret.optional(),
  secretFile: z.string().min(1).optional(),
  plaintext: z.boolean().default(false),
  peerTimeoutMs: milliseconds.default(10_000),
  recoverTimeoutMs: milliseconds.default(60_000),
};

/** A deduplication domain; see `MigrateOptions.dedup`. */
export interface DedupOptions {
  /** Guests of the domain of this name share pages; 1 to 256 characters. */
  domain: string;
  /** What only hosts of the domain know, at least 16 bytes; without one its key comes from the hosts' shared secret. */
  secret?: Uint8Array | string;
  /** A file that holds it, mode 0600. */
  secretFile?: string;
}

export const dedupSchema = z.strictObject({
  domain: z.string().min(1).max(256),
  secret: secret.optional(),
  secretFile: z.string().min(1).optional(),
});
true satisfies Same<z.input<typeof dedupSchema>, DedupOptions>;
export const dedupChoice = z.union(
  [z.boolean(), dedupSchema],
  'expected true, false or { domain, secret, secretFile }, the domain of 1 to 256 characters',
);

/** What is called later: found where it is given, not when there is something to tell. */
export function callback<Args extends readonly unknown[]>() {
  return z.custom<(...args: Args) => void>((value) => typeof value === 'function', 'must be a function');
}

/** Throws INVALID_ARGUMENT, naming the field. */
export function parse<T extends z.ZodType>(schema: T, value: unknown, what: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  if (schema instanceof z.ZodObject && issue?.code === 'invalid_type' && issue.path.length === 0) {
    const keys = Object.keys(schema.shape).join(', ');
    throw new MemferryError('INVALID_ARGUMENT', `${what}: expected an object with ${keys}`);
  }
  const where = issue?.path.length ? `${what}.${issue.path.join('.')}` : what;
  throw new MemferryError('INVALID_ARGUMENT', `${where}: ${issue?.message ?? 'not valid'}`);
}
