/** Fields that options of several commands have in common, and how they are checked. */
import { z } from 'zod';
import { MemferryError } from '../errors.js';

export const bytes = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
export const milliseconds = z
  .number()
  .positive()
  .max(7 * 24 * 3600 * 1000);
/** What a name on the wire may be: a server's, a rack's, a region's. */
export const label = z.string().min(1).max(64);
const secret = z.union([z.instanceof(Uint8Array), z.string().min(1)]);

export const connectionShape = {
  /** The shared secret itself; at least 16 bytes. Without one the secret file is read. */
  secret: secret.optional(),
  /** A file that holds the secret, mode 0600. On loopback one is made automatically when none is named. */
  secretFile: z.string().min(1).optional(),
  /** Allow an address other than loopback although the connection is not encrypted. */
  plaintext: z.boolean().default(false),
  /** Without a word from the peer for this long the control connection counts as cut, in ms. */
  peerTimeoutMs: milliseconds.default(10_000),
  /** Post-copy: how long a cut may last before it is final, in ms. */
  recoverTimeoutMs: milliseconds.default(60_000),
};

export const dedupSchema = z.strictObject({
  /** Guests of the domain of this name share pages. */
  domain: z.string().min(1).max(256),
  /** What only hosts of the domain know, at least 16 bytes; without one its key comes from the hosts' shared secret. */
  secret: secret.optional(),
  /** A file that holds it, mode 0600. */
  secretFile: z.string().min(1).optional(),
});
/** See `MigrateOptions.dedup`. */
export type DedupOptions = z.output<typeof dedupSchema>;

/** Throws INVALID_ARGUMENT, naming the field. */
export function parse<T extends z.ZodType>(schema: T, value: unknown, what: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const where = issue?.path.length ? `${what}.${issue.path.join('.')}` : what;
  throw new MemferryError('INVALID_ARGUMENT', `${where}: ${issue?.message ?? 'not valid'}`);
}
