/**
 * What callers may set, with every default in one place. Options are checked here, before anything is
 * opened or allocated; C++ asserts what this file promises.
 */
import { z } from 'zod';
import { MemferryError } from './errors.js';
import type { ArrivingGuest, GuestOffer } from './guest.js';

export const modes = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const;
/**
 * How a guest moves. `stop-and-copy`: pause, copy, resume. `pre-copy`: rounds while it runs, then a short
 * pause (Clark et al. 2005). `post-copy`: it runs at the destination first, its pages follow (Hines et al.
 * 2009). `hybrid`: some pre-copy rounds, then post-copy.
 */
export type Mode = (typeof modes)[number];

export const nonConvergenceChoices = ['switch-over', 'fail', 'post-copy'] as const;
/** What pre-copy does when rounds stop shrinking: accept a longer downtime, fail, or go post-copy. */
export type NonConvergence = (typeof nonConvergenceChoices)[number];

const bytes = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
const milliseconds = z
  .number()
  .positive()
  .max(7 * 24 * 3600 * 1000);
const secret = z.union([z.instanceof(Uint8Array), z.string().min(1)]);

const connectionShape = {
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

const migrateSchema = z.strictObject({
  ...connectionShape,
  /** `host:port`, `[v6]:port`, or the two apart. */
  to: z.union([
    z.string().min(1),
    z.strictObject({ host: z.string().min(1), port: z.number().int().min(1).max(65535) }),
  ]),
  mode: z.enum(modes).default('hybrid'),
  signal: z.instanceof(AbortSignal).optional(),
  /** Parallel data connections. */
  channels: z.number().int().min(1).max(16).default(2),
  /** Bytes a second over all data channels; 0 for no limit. */
  bandwidth: bytes.default(0),
  /** Pre-copy goes on until the expected downtime is below this, in ms. */
  downtimeLimitMs: milliseconds.default(300),
  /** At most this many rounds before the switchover is decided, the first full one counted. */
  maxRounds: z.number().int().min(1).max(1000).default(30),
  onNonConvergence: z.enum(nonConvergenceChoices).default('switch-over'),
  /** Rounds that `hybrid` makes before it switches over, the first full one counted. */
  hybridRounds: z.number().int().min(1).max(1000).default(3),
  /** A tracker's name; without one the first that the kernel offers. */
  tracker: z.string().optional(),
  /** Compare a digest of every region from both sides at the end. */
  verify: z.boolean().default(true),
  /** Wait in `pre-switchover` until `switchover()` is called. */
  holdSwitchover: z.boolean().default(false),
  pauseTimeoutMs: milliseconds.default(10_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  connectTimeoutMs: milliseconds.default(5_000),
  /** After GRANT without an answer: how long to redial before MIGRATION_IN_DOUBT, in ms. */
  inDoubtTimeoutMs: milliseconds.default(30_000),
  /** How often `progress` gets a sample, in ms. */
  progressIntervalMs: milliseconds.default(100),
});

const listenSchema = z.strictObject({
  ...connectionShape,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  /** Memory that all arriving guests together may take, in bytes. */
  maxBytes: bytes.default(64 * 2 ** 30),
  /** Execution state of one guest, in bytes. */
  maxStateBytes: bytes.default(64 * 2 ** 20),
  /** Migrations at the same time. */
  maxMigrations: z.number().int().min(1).max(1024).default(16),
  prepareTimeoutMs: milliseconds.default(10_000),
  /** After READY: how long to wait for GRANT before this side refuses for good, in ms. */
  grantTimeoutMs: milliseconds.default(20_000),
});

export type MigrateOptions = z.input<typeof migrateSchema>;
export type ResolvedMigrateOptions = Omit<z.output<typeof migrateSchema>, 'to'> & {
  to: { host: string; port: number };
};
export type ListenOptions = z.input<typeof listenSchema> & {
  /**
   * Makes the destination's side of a guest, before its first page. Throwing refuses the migration with the
   * error's code. Without it, plain regions of the offered lengths are allocated and nothing is run.
   */
  accept?: (offer: GuestOffer, context: { signal: AbortSignal }) => ArrivingGuest | Promise<ArrivingGuest>;
};
export type ResolvedListenOptions = z.output<typeof listenSchema> & Pick<ListenOptions, 'accept'>;

function parse<T extends z.ZodType>(schema: T, value: unknown, what: string): z.output<T> {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const where = issue?.path.length ? `${what}.${issue.path.join('.')}` : what;
  throw new MemferryError('INVALID_ARGUMENT', `${where}: ${issue?.message ?? 'not valid'}`);
}

/** `host:port` or `[v6]:port`; throws INVALID_ARGUMENT. */
export function parseAddress(text: string): { host: string; port: number } {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  const port = Number(match?.[3]);
  const host = match?.[1] ?? match?.[2];
  if (!host || !(port >= 0 && port <= 65535)) {
    throw new MemferryError('INVALID_ARGUMENT', `'${text}' is not an address; write HOST:PORT or [V6]:PORT`);
  }
  return { host, port };
}

export function resolveMigrateOptions(options: MigrateOptions): ResolvedMigrateOptions {
  const parsed = parse(migrateSchema, options, 'migrate');
  return { ...parsed, to: typeof parsed.to === 'string' ? parseAddress(parsed.to) : parsed.to };
}

export function resolveListenOptions(options: ListenOptions): ResolvedListenOptions {
  const { accept, ...rest } = options;
  if (accept !== undefined && typeof accept !== 'function') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.accept: must be a function');
  }
  return { ...parse(listenSchema, rest, 'listen'), ...(accept ? { accept } : {}) };
}
