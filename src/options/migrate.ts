/** What `migrate` may be told. */
import { z } from 'zod';
import { MemferryError } from '../errors.js';
import { traitsOf } from '../protocol/mode-traits.js';
import { type TrackerName, trackerChoices, type Writers, writersChoices } from '../trackers.js';
import { parseAddress, parseGroup } from './address.js';
import {
  bytes,
  type ConnectionOptions,
  connectionShape,
  type DedupOptions,
  dedupChoice,
  leaseMilliseconds,
  milliseconds,
  parse,
  type Same,
  uint8Array,
} from './fields.js';

/** Every mode by its name; see `Mode`. */
export const modes = [
  'stop-and-copy',
  'pre-copy',
  'post-copy',
  'hybrid',
  'scatter',
  'scatter-pre-copy',
  'scatter-hybrid',
] as const;
/**
 * How a guest moves. `stop-and-copy`: pause, copy, resume. `pre-copy`: rounds while it runs, then a short
 * pause (Clark et al. 2005). `post-copy`: it runs at the destination first, its pages follow (Hines et al.
 * 2009). `hybrid`: some pre-copy rounds, then post-copy. `scatter`: post-copy through intermediaries, so that the
 * source is evicted at its own pace and the destination gathers at its own; `scatter-pre-copy` and `scatter-hybrid`:
 * the rounds of those modes through intermediaries (Deshpande et al., Scatter-Gather, §4 and §4.6).
 */
export type Mode = (typeof modes)[number];

export const compressChoices = ['auto', 'lz4', 'zstd', 'off'] as const;
/**
 * Compression of pages on the way. `auto`: on each connection by itself, with the codec that gets most through, and only
 * where the link is what is waited for. `lz4`, `zstd`: always that one. Runs that do not get smaller go as they are.
 */
export type CompressChoice = (typeof compressChoices)[number];

export const nonConvergenceChoices = ['switch-over', 'fail', 'post-copy'] as const;
/** What pre-copy does when rounds stop shrinking: accept a longer downtime, fail, or go post-copy. */
export type NonConvergence = (typeof nonConvergenceChoices)[number];

/**
 * What `migrate` may be told. Times are in ms, above 0 and up to 7 days; sizes and rates are whole numbers of bytes.
 * Everything that is not as said here is INVALID_ARGUMENT, and names the field; so is what is said of scatter modes alone,
 * in another one.
 */
export interface MigrateOptions extends ConnectionOptions {
  /** Where a destination listens: `host:port`, `[v6]:port`, or the two apart. */
  to: string | { host: string; port: number };
  /** How the guest moves. Default `hybrid`. */
  mode?: Mode;
  /**
   * Aborting it is `cancel`, with its reason as the cause: before the commit the guest runs on here, after it nothing
   * happens.
   */
  signal?: AbortSignal;
  /** Parallel data connections, 1 to 16. Default 2. */
  channels?: number;
  /** Bytes a second over all data channels; 0, the default, for no limit. */
  bandwidth?: number;
  /** Compression of pages on the way. Default `auto`. */
  compress?: CompressChoice;
  /**
   * Modes with rounds: bytes of memory that keep what was last sent of pages, so that a page that is sent again to whom
   * it was sent before goes as what has changed of it; 0, the default, for none. At most 1 TiB. The kernel gives it as it
   * fills.
   */
  deltaCacheBytes?: number;
  /** Pre-copy goes on until the expected downtime is below this, in ms. Default 300. */
  downtimeLimitMs?: number;
  /** At most this many rounds before the switchover is decided, the first full one counted, 1 to 1000. Default 30. */
  maxRounds?: number;
  /** What pre-copy does when rounds stop shrinking. Default `switch-over`. */
  onNonConvergence?: NonConvergence;
  /** Rounds that `hybrid` makes before it switches over, the first full one counted, 1 to 1000. Default 3. */
  hybridRounds?: number;
  /**
   * A tracker's name; without one the first that the kernel offers and that may watch the memory. TRACKER_UNAVAILABLE
   * where there is none.
   */
  tracker?: TrackerName | 'kvm-log';
  /**
   * Where writes to shared memory come from: `tracked-mapping` is the caller's word that all of them go through the
   * region's own addresses. Without it (`anywhere`, the default) shared memory is compared by content. Says nothing of
   * memory that is not shared.
   */
  writers?: Writers;
  /**
   * A write to a reserved huge page makes only those of its 512 pages of 4 KiB go again that changed, not all. Of other
   * memory, pages that were written and hold what was sent do not go again either. Costs reading what was written. By XXH3: not
   * where processes of the guest distrust each other (docs/security.md). Default false.
   */
  splitHugePages?: boolean;
  /** Compare a digest of every region from both sides at the end: VERIFICATION_FAILED. Default true. */
  verify?: boolean;
  /**
   * A base that the destination has: compare with it where measured rates say that it pays (`auto`, the default), in any
   * case (`always`: waits for it up to `baseTimeoutMs`), or not at all (`off`).
   */
  base?: 'auto' | 'always' | 'off';
  /** How long the destination's base is waited for, in ms. Default 60 000. */
  baseTimeoutMs?: number;
  /** Operations since the base, for the destination's `replay`; at most 4 MiB. */
  replayLog?: Uint8Array;
  /**
   * When the guest has left: write its regions there as a base for its return, if they have no more bytes than that. Not
   * with `releaseAsEvicted`.
   */
  keepStaleCopy?: { directory: string; maxBytes: number };
  /**
   * Scatter modes: VMD servers (`memferry stage`), `host:port` each, at most 250, in addition to those that are
   * discovered. Default none.
   */
  via?: readonly string[];
  /**
   * Scatter modes: listen for the servers' announcements: true, or the group they use (`address:port`). One that was
   * heard and does not answer, or refuses, is left out, and others are chosen. Default false.
   */
  discover?: boolean | string;
  /** Scatter modes: on how many servers a scattered page is kept. Default 1. */
  replicas?: 1 | 2;
  /**
   * Scatter modes, when the servers cannot hold the guest, or one that was named says so as it is asked: fail with
   * VMD_CAPACITY (`fail`, the default), or go on with what there is (`direct`).
   */
  onCapacity?: 'fail' | 'direct';
  /** Scatter modes: the rack where this side stands, at most 64 characters. Default null: not known. */
  rack?: string | null;
  /** Scatter modes: the destination's rack; servers near it are preferred. Default null: not known. */
  destinationRack?: string | null;
  /**
   * Scatter modes with `discover`: the source's own link in bytes/s, which the servers together are to fill. Default
   * null: what its network interface says, where it says anything, and no more than `bandwidth`.
   */
  linkBytesPerSecond?: number | null;
  /**
   * Scatter modes: a receiver that does not acknowledge for so long is routed around, in ms; at least 2000 with
   * `replicas: 2`. Default 3000.
   */
  stallTimeoutMs?: number;
  /**
   * Scatter modes: an image whose source is gone before the commit is dropped by the servers after so long, in ms: a
   * whole number from 100 to 3 600 000. Default 60 000.
   */
  leaseMs?: number;
  /**
   * In direct modes pages that the destination has already (`ListenOptions.dedup`, `share`) go as references; in scatter
   * modes and `park`, in rounds and after the switchover, those that the VMD servers hold. True: pages of this guest alone
   * (a domain of its own); with a domain, pages of every guest of it. Default false. Guests of one domain can find out by
   * timing what others of it hold, see docs/security.md.
   */
  dedup?: boolean | DedupOptions;
  /** Scatter modes: give memory back to the system as others hold it, not all at the end. Default false. */
  releaseAsEvicted?: boolean;
  /**
   * `scatter-pre-copy`: how long the paused guest may wait for the destination to gather the rest, in ms. Default
   * 600 000.
   */
  gatherTimeoutMs?: number;
  /** Wait in `pre-switchover` until `switchover()` is called. Default false. */
  holdSwitchover?: boolean;
  /** For the guest's `pause`, in ms: PAUSE_TIMEOUT, and the guest runs on here. Default 10 000. */
  pauseTimeoutMs?: number;
  /** From PREPARE until the destination is READY, in ms: PREPARE_TIMEOUT, and the guest runs on here. Default 10 000. */
  prepareTimeoutMs?: number;
  /** For each connection to be made, in ms: CONNECT_FAILED. Default 5000. */
  connectTimeoutMs?: number;
  /** After GRANT without an answer: how long to redial before MIGRATION_IN_DOUBT, in ms. Default 30 000. */
  inDoubtTimeoutMs?: number;
  /** How often `progress` gets a sample, in ms. Default 100. */
  progressIntervalMs?: number;
}

export const migrateSchema = z.strictObject({
  ...connectionShape,
  to: z.union(
    [
      z.string().min(1),
      z.strictObject({ host: z.string().min(1), port: z.number().int().min(1).max(65535) }),
    ],
    "expected 'HOST:PORT', '[V6]:PORT' or { host, port } with a port of 1 to 65535",
  ),
  mode: z.enum(modes).default('hybrid'),
  signal: z.instanceof(AbortSignal).optional(),
  channels: z.number().int().min(1).max(16).default(2),
  bandwidth: bytes.default(0),
  compress: z.enum(compressChoices).default('auto'),
  deltaCacheBytes: bytes.max(2 ** 40).default(0),
  downtimeLimitMs: milliseconds.default(300),
  maxRounds: z.number().int().min(1).max(1000).default(30),
  onNonConvergence: z.enum(nonConvergenceChoices).default('switch-over'),
  hybridRounds: z.number().int().min(1).max(1000).default(3),
  tracker: z.enum(trackerChoices).optional(),
  writers: z.enum(writersChoices).default('anywhere'),
  splitHugePages: z.boolean().default(false),
  verify: z.boolean().default(true),
  base: z.enum(['auto', 'always', 'off']).default('auto'),
  baseTimeoutMs: milliseconds.default(60_000),
  replayLog: uint8Array.optional(),
  keepStaleCopy: z.strictObject({ directory: z.string().min(1), maxBytes: bytes }).optional(),
  via: z.array(z.string().min(1)).max(250).readonly().default([]),
  discover: z.union([z.boolean(), z.string().min(1)], "expected true, false or 'GROUP:PORT'").default(false),
  replicas: z.literal([1, 2], 'expected 1 or 2').default(1),
  onCapacity: z.enum(['fail', 'direct']).default('fail'),
  rack: z.string().max(64).nullable().default(null),
  destinationRack: z.string().max(64).nullable().default(null),
  linkBytesPerSecond: z.number().positive().nullable().default(null),
  stallTimeoutMs: milliseconds.default(3_000),
  leaseMs: leaseMilliseconds.default(60_000),
  dedup: dedupChoice.default(false),
  releaseAsEvicted: z.boolean().default(false),
  gatherTimeoutMs: milliseconds.default(600_000),
  holdSwitchover: z.boolean().default(false),
  pauseTimeoutMs: milliseconds.default(10_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  connectTimeoutMs: milliseconds.default(5_000),
  inDoubtTimeoutMs: milliseconds.default(30_000),
  progressIntervalMs: milliseconds.default(100),
});
true satisfies Same<z.input<typeof migrateSchema>, MigrateOptions>;

export type ResolvedMigrateOptions = Omit<z.output<typeof migrateSchema>, 'to'> & {
  to: { host: string; port: number };
};

/** A server that passes replicas on takes up to 1.5 s to say that the next one does not answer (kChainPatience). */
const leastChainStallMs = 2000;

export function checkStall(
  { replicas, stallTimeoutMs }: { replicas: number; stallTimeoutMs: number },
  what: string,
): void {
  if (replicas < 2 || stallTimeoutMs >= leastChainStallMs) return;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `${what}.stallTimeoutMs: at least ${leastChainStallMs} with replicas, or the messenger is taken for the one that stalls`,
  );
}

/** Addresses that can be dialled, and a group that can be listened to. */
export function checkServers(
  { via, discover }: Pick<z.output<typeof migrateSchema>, 'via' | 'discover'>,
  what: string,
): void {
  for (const address of via) {
    if (parseAddress(address).port > 0) continue;
    throw new MemferryError('INVALID_ARGUMENT', `${what}.via: '${address}' has no port to dial (1 to 65535)`);
  }
  if (typeof discover === 'string') parseGroup(discover);
}

/** A replay log comes with the offer, which has to be there whole within seconds. */
export const mostReplayBytes = 4 * 2 ** 20;

function checkBase({ replayLog, keepStaleCopy, releaseAsEvicted }: z.output<typeof migrateSchema>): void {
  if ((replayLog?.length ?? 0) > mostReplayBytes) {
    throw new MemferryError('INVALID_ARGUMENT', `migrate.replayLog: more than ${mostReplayBytes} bytes`);
  }
  if (keepStaleCopy && releaseAsEvicted) {
    throw new MemferryError(
      'INVALID_ARGUMENT',
      'migrate.keepStaleCopy: nothing is left to keep with releaseAsEvicted',
    );
  }
}

/** Port 0 is for whoever listens, and takes any. */
function destinationOf(text: string): { host: string; port: number } {
  const to = parseAddress(text);
  if (to.port > 0) return to;
  throw new MemferryError('INVALID_ARGUMENT', `migrate.to: '${text}' has no port to dial (1 to 65535)`);
}

/** Options that say where else pages go: whoever sets one for nothing believes that they are there. */
const ofScatter = [
  'via',
  'discover',
  'replicas',
  'onCapacity',
  'rack',
  'destinationRack',
  'linkBytesPerSecond',
  'stallTimeoutMs',
  'leaseMs',
  'releaseAsEvicted',
] as const;

const unsaid = migrateSchema.parse({ to: 'anywhere:1' });

function checkMode(parsed: z.output<typeof migrateSchema>): void {
  if (traitsOf(parsed.mode).scatter) return;
  const name = ofScatter.find((option) =>
    option === 'via' ? parsed.via.length > 0 : parsed[option] !== unsaid[option],
  );
  if (name === undefined) return;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `migrate.${name}: for scatter modes, and this is ${parsed.mode}`,
  );
}

export function resolveMigrateOptions(options: MigrateOptions): ResolvedMigrateOptions {
  const parsed = parse(migrateSchema, options, 'migrate');
  checkMode(parsed);
  checkStall(parsed, 'migrate');
  checkBase(parsed);
  checkServers(parsed, 'migrate');
  return { ...parsed, to: typeof parsed.to === 'string' ? destinationOf(parsed.to) : parsed.to };
}
