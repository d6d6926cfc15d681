/**
 * What callers may set, with every default in one place. Options are checked here, before anything is
 * opened or allocated; C++ asserts what this file promises.
 */
import { z } from 'zod';
import { MemferryError } from './errors.js';
import type { ParkTicket } from './source/park.js';
import type { ArrivingGuest, GuestOffer } from './guest.js';

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

const dedupSchema = z.strictObject({
  /** Guests of the domain of this name share pages. */
  domain: z.string().min(1).max(256),
  /** What only hosts of the domain know, at least 16 bytes; without one its key comes from the hosts' shared secret. */
  secret: secret.optional(),
  /** A file that holds it, mode 0600. */
  secretFile: z.string().min(1).optional(),
});
/** See `MigrateOptions.dedup`. */
export type DedupOptions = z.output<typeof dedupSchema>;

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
  compress: z.enum(compressChoices).default('auto'),
  /**
   * Modes with rounds: bytes of memory that keep what was last sent of pages, so that a page that is sent again to whom
   * it was sent before goes as what has changed of it; 0 for none. The kernel gives it as it fills.
   */
  deltaCacheBytes: bytes.max(2 ** 40).default(0),
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
  /**
   * A base that the destination has: compare with it where measured rates say that it pays (`auto`), in any case
   * (`always`: waits for it up to `baseTimeoutMs`), or not at all (`off`).
   */
  base: z.enum(['auto', 'always', 'off']).default('auto'),
  baseTimeoutMs: milliseconds.default(60_000),
  /** Operations since the base, for the destination's `replay`; at most 4 MiB. */
  replayLog: z.instanceof(Uint8Array).optional(),
  /** When the guest has left: write its regions there as a base for its return, if they have no more bytes than that. */
  keepStaleCopy: z.strictObject({ directory: z.string().min(1), maxBytes: bytes }).optional(),
  /** Scatter modes: VMD servers (`memferry stage`), `host:port` each, in addition to those that are discovered. */
  via: z.array(z.string().min(1)).max(250).default([]),
  /** Scatter modes: listen for the servers' announcements: true, or the group they use (`address:port`). */
  discover: z.union([z.boolean(), z.string().min(1)]).default(false),
  /** Scatter modes: on how many servers a scattered page is kept. */
  replicas: z.union([z.literal(1), z.literal(2)]).default(1),
  /** Scatter modes, when the servers cannot hold the guest: fail with VMD_CAPACITY, or go on with what there is. */
  onCapacity: z.enum(['fail', 'direct']).default('fail'),
  /** Scatter modes: where this side and the destination stand; servers near the destination are preferred. */
  rack: z.string().max(64).nullable().default(null),
  destinationRack: z.string().max(64).nullable().default(null),
  /** Scatter modes: the source's own link in bytes/s, which the servers together are to fill; null: not known. */
  linkBytesPerSecond: z.number().positive().nullable().default(null),
  /** Scatter modes: a receiver that does not acknowledge for so long is routed around, in ms; with replicas ≥ 2000. */
  stallTimeoutMs: milliseconds.default(3_000),
  /** Scatter modes: an image whose source is gone before the commit is dropped by the servers after so long, in ms. */
  leaseMs: milliseconds.default(60_000),
  /**
   * In direct modes pages that the destination has already (`ListenOptions.dedup`, `share`) go as references; in scatter
   * modes and `park`, in rounds and after the switchover, those that the VMD servers hold. True: pages of this guest alone
   * (a domain of its own); with a domain, pages of every guest of it. Guests of one domain can find out by timing what
   * others of it hold, see docs/security.md.
   */
  dedup: z.union([z.boolean(), dedupSchema]).default(false),
  /** Scatter modes: give memory back to the system as others hold it, not all at the end. */
  releaseAsEvicted: z.boolean().default(false),
  /** `scatter-pre-copy`: how long the paused guest may wait for the destination to gather the rest, in ms. */
  gatherTimeoutMs: milliseconds.default(600_000),
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

const digits = (bytes: number) => z.string().regex(new RegExp(`^[0-9a-f]{${2 * bytes}}$`));

/** What `park` gives; see ParkTicket. */
const ticketSchema = z.strictObject({
  image: digits(16),
  secret: digits(32),
  home: z.string().min(1),
  guest: z
    .strictObject({
      name: z.string().min(1).max(64),
      module: z
        .strictObject({ name: z.string().min(1), sha256: z.string().regex(/^[0-9a-fA-F]{64}$/) })
        .nullable(),
      lineage: digits(32),
    })
    .optional(),
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
  /** Bytes a second that this side takes from sources; 0 for no limit. Faults are never held back. */
  bandwidth: bytes.default(0),
  /** Scatter modes: for a VMD server to answer when a guest is offered, in ms. */
  connectTimeoutMs: milliseconds.default(5_000),
  /** Bytes a second that gathering from VMD servers may take; 0 for no limit. Faults are never held back. */
  gatherLimit: bytes.default(0),
  /** After READY: how long to wait for GRANT before this side refuses for good, in ms. */
  grantTimeoutMs: milliseconds.default(20_000),
  /**
   * A parked guest that arriving ones start from where `accept` gives them no `bases`, by its ticket: the same guest
   * (name, module, lineage), or with `anySource` every one of that name and module. It stays parked. While it is read it
   * takes as much memory again as the guest.
   */
  base: z.strictObject({ parked: ticketSchema, anySource: z.boolean().default(false) }).optional(),
  /**
   * Sources of the same domain are told which of their pages are here already, and refer to them: pages of the page
   * share, and pages that came for guests of that domain which are still arriving. True: only what a guest has several
   * times itself. What a source learns by this: docs/security.md.
   */
  dedup: z.union([z.boolean(), dedupSchema]).default(false),
  /** A page share's file (`memferry share`), or `auto` for the one of the domain; with a domain only. */
  share: z.string().min(1).optional(),
});

const shareSchema = z.strictObject({
  /** All that the share may take: its pages and their index, in bytes. */
  budgetBytes: bytes,
  /** As a guest's. */
  dedup: dedupSchema,
  /** The hosts' shared secret, from which a domain without a secret of its own has its key; else the secret file. */
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  /** Its file; without one, the domain's in this user's directory on tmpfs. */
  file: z.string().min(1).optional(),
});

/** `group:port` of the VMD's announcements where none is named. */
export const defaultAnnounceGroup = '239.255.77.77:7077';

/** What a name on the wire may be: a server's, a rack's. */
const label = z.string().min(1).max(64);

const stageSchema = z.strictObject({
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  /** All that the server may hold: pages, their index, execution states. */
  memoryBytes: bytes.min(16 * 2 ** 20),
  /**
   * Take all of it from the system at the start and keep it: it is there when a migration needs it, and receiving is
   * not slowed down by taking it then.
   */
  preallocate: z.boolean().default(false),
  /** Bytes a second in each direction over all images; 0 for no limit. */
  bandwidth: bytes.default(0),
  /** How it is called in reports and errors; `host:port` without one. */
  name: label.optional(),
  /** Where it stands, for the placement; any word that hosts of one rack have in common. */
  rack: label.nullable().default(null),
  /** The multicast `group:port` to which it is announced each second; null for none. */
  announce: z.string().min(1).nullable().default(null),
  /** How long a parked image stays that nobody opens or claims, in ms; null: until it is dissolved or dropped. */
  parkTtlMs: z
    .number()
    .positive()
    // Timers of the platform end at 2^31 ms.
    .max(24 * 24 * 3600 * 1000)
    .nullable()
    .default(null),
  maxImages: z.number().int().min(1).max(256).default(256),
  /**
   * Page distribution: how much of the memory may hold pages that many guests have, 0 to 0.5. Images get that room when
   * they need it.
   */
  popularShare: z.number().min(0).max(0.5).default(0.125),
  /** Page distribution: what a guest has not reported for so long no longer counts after as long again, in ms. */
  popularHalfLifeMs: milliseconds.min(100).default(600_000),
  /** Execution state of one parked guest, in bytes. */
  maxStateBytes: bytes.default(64 * 2 ** 20),
  /** A park that is READY: how long to wait for GRANT before it is refused for good, in ms. */
  grantTimeoutMs: milliseconds.default(20_000),
  /** How long a claim that was not granted outlives its claimant's connection, in ms. */
  claimLeaseMs: milliseconds.default(10_000),
});

const directoriesShape = {
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  /** Of the VMD servers (`memferry stage`) that count the domain's pages: `host:port` each, the same for all its hosts. */
  via: z.array(z.string().min(1)).min(1).max(64),
  /** Whose pages these are: guests and hosts of other domains learn nothing of them. */
  dedup: dedupSchema,
  connectTimeoutMs: milliseconds.default(5_000),
  signal: z.instanceof(AbortSignal).optional(),
};

const sampleSchema = z.strictObject({
  ...directoriesShape,
  /** How much of one core it takes at most, by CPU time. */
  cpuShare: z.number().positive().max(1).default(0.01),
  /** From the start of a pass over the guest's memory to the next one's, at least, in ms. */
  passIntervalMs: milliseconds.default(10_000),
  /** Pages whose hashes are remembered, 8 bytes each; what is beyond is not sampled. */
  maxPages: z
    .number()
    .int()
    .min(512)
    .max(2 ** 31)
    .default(4 * 2 ** 20),
});
export type SampleOptions = z.input<typeof sampleSchema>;
export type ResolvedSampleOptions = z.output<typeof sampleSchema>;

const distributeSchema = z.strictObject({
  ...directoriesShape,
  /** From the end of a round to the next one, in ms. */
  intervalMs: milliseconds.max(24 * 3600 * 1000).default(30_000),
  /** Bytes a second that fetching pages takes; 0 for no limit. */
  bandwidth: bytes.default(0),
});
export type DistributeOptions = z.input<typeof distributeSchema>;
export type ResolvedDistributeOptions = z.output<typeof distributeSchema>;
/** What both have. */
export type ResolvedDirectoriesOptions = Pick<
  ResolvedSampleOptions,
  'secret' | 'secretFile' | 'plaintext' | 'peerTimeoutMs' | 'via' | 'dedup' | 'connectTimeoutMs'
>;

/** A park goes the way of a scatter without a destination; the mode and the rounds' options have no meaning there. */
export type ParkOptions = Omit<
  z.input<typeof migrateSchema>,
  | 'to'
  | 'mode'
  | 'channels'
  | 'downtimeLimitMs'
  | 'maxRounds'
  | 'onNonConvergence'
  | 'hybridRounds'
  | 'tracker'
  | 'verify'
  | 'base'
  | 'baseTimeoutMs'
  | 'replayLog'
  | 'keepStaleCopy'
  | 'holdSwitchover'
  | 'destinationRack'
  | 'onCapacity'
  | 'releaseAsEvicted'
  | 'gatherTimeoutMs'
  | 'progressIntervalMs'
  | 'deltaCacheBytes'
> & {
  /**
   * Called with the ticket before the commit, and awaited: a ticket that is kept then claims the guest whatever
   * becomes of this process. Rejecting ends the park, and the guest runs on here.
   */
  onTicket?: (ticket: ParkTicket) => Promise<void> | void;
};

const unparkSchema = z.strictObject({
  ...connectionShape,
  signal: z.instanceof(AbortSignal).optional(),
  /** The caller's word that whoever resumed the guest before is dead and stays so. */
  rollback: z.boolean().default(false),
  /** Compare digests with those of the guest as it was parked. */
  verify: z.boolean().default(true),
  /** Bytes a second fetched ahead of the guest; 0 for no limit. Faults are never held back. */
  gatherLimit: bytes.default(0),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  connectTimeoutMs: milliseconds.default(5_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  /** How long to ask whether the claim was granted, in ms. */
  inDoubtTimeoutMs: milliseconds.default(30_000),
});
export type UnparkOptions = z.input<typeof unparkSchema> & Pick<ListenOptions, 'accept'>;
export type ResolvedUnparkOptions = z.output<typeof unparkSchema> & Pick<ListenOptions, 'accept'>;

export type ShareOptions = z.input<typeof shareSchema>;
export type ResolvedShareOptions = z.output<typeof shareSchema>;

export type StageOptions = z.input<typeof stageSchema>;
export type ResolvedStageOptions = z.output<typeof stageSchema>;

export type MigrateOptions = z.input<typeof migrateSchema>;
export type ResolvedMigrateOptions = Omit<z.output<typeof migrateSchema>, 'to'> & {
  to: { host: string; port: number };
};
export type ListenOptions = z.input<typeof listenSchema> & {
  /**
   * Makes the destination's side of a guest, before its first page. Throwing refuses the migration with the
   * error's code. Without it, plain regions of the offered lengths are allocated and nothing is run.
   */
  accept?: (offer: GuestOffer, context: AcceptContext) => ArrivingGuest | Promise<ArrivingGuest>;
};
export interface AcceptContext {
  signal: AbortSignal;
  /** The execution state, where it is there before the memory: of a parked guest. */
  state?: Uint8Array;
}
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

/** A server that passes replicas on takes up to 1.5 s to say that the next one does not answer (kChainPatience). */
const leastChainStallMs = 2000;

function checkStall(
  { replicas, stallTimeoutMs }: { replicas: number; stallTimeoutMs: number },
  what: string,
): void {
  if (replicas < 2 || stallTimeoutMs >= leastChainStallMs) return;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `${what}.stallTimeoutMs: at least ${leastChainStallMs} with replicas, or the messenger is taken for the one that stalls`,
  );
}

/** It comes with the offer, which has to be there whole within seconds. */
const mostReplayBytes = 4 * 2 ** 20;

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

export function resolveMigrateOptions(options: MigrateOptions): ResolvedMigrateOptions {
  const parsed = parse(migrateSchema, options, 'migrate');
  checkStall(parsed, 'migrate');
  checkBase(parsed);
  return { ...parsed, to: typeof parsed.to === 'string' ? parseAddress(parsed.to) : parsed.to };
}

export type ResolvedParkOptions = ResolvedMigrateOptions & Pick<ParkOptions, 'onTicket'>;

export function resolveParkOptions(given: ParkOptions): ResolvedParkOptions {
  const { onTicket, ...options } = given ?? {};
  if (onTicket !== undefined && typeof onTicket !== 'function') {
    throw new MemferryError('INVALID_ARGUMENT', 'park.onTicket: must be a function');
  }
  // Where it goes is not said, so nothing may be said of where.
  for (const name of ['to', 'mode', 'channels', 'tracker'] as const) {
    if (name in options) {
      throw new MemferryError('INVALID_ARGUMENT', `park.${name}: a park has none`);
    }
  }
  const to = { host: '127.0.0.1', port: 1 };
  const parsed = parse(migrateSchema, { ...options, to, mode: 'scatter' }, 'park');
  checkStall(parsed, 'park');
  return {
    ...parsed,
    to,
    ...(onTicket ? { onTicket } : {}),
  };
}

/** What a ticket's file has, checked; throws INVALID_ARGUMENT. */
export function parseTicket(value: unknown): ParkTicket {
  return parse(ticketSchema, value, 'ticket');
}

export function resolveUnparkOptions(options: UnparkOptions): ResolvedUnparkOptions {
  const { accept, ...rest } = options;
  return { ...parse(unparkSchema, rest, 'unpark'), ...(accept ? { accept } : {}) };
}

export function resolveListenOptions(options: ListenOptions): ResolvedListenOptions {
  const { accept, ...rest } = options;
  if (accept !== undefined && typeof accept !== 'function') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.accept: must be a function');
  }
  const parsed = parse(listenSchema, rest, 'listen');
  if (parsed.share !== undefined && typeof parsed.dedup === 'boolean') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.share: a page share belongs to a domain (dedup)');
  }
  return { ...parsed, ...(accept ? { accept } : {}) };
}

export function resolveShareOptions(options: ShareOptions): ResolvedShareOptions {
  return parse(shareSchema, options, 'share');
}

export function resolveStageOptions(options: StageOptions): ResolvedStageOptions {
  const parsed = parse(stageSchema, options, 'stage');
  if (parsed.announce !== null) parseAddress(parsed.announce);
  return parsed;
}

export function resolveSampleOptions(options: SampleOptions): ResolvedSampleOptions {
  const parsed = parse(sampleSchema, options, 'sampleGuest');
  for (const address of parsed.via) parseAddress(address);
  return parsed;
}

export function resolveDistributeOptions(options: DistributeOptions): ResolvedDistributeOptions {
  const parsed = parse(distributeSchema, options, 'distribute');
  for (const address of parsed.via) parseAddress(address);
  return parsed;
}
