/**
 * The boundary to the C++ addon: every export of the addon is typed here, and nowhere else. What crosses is
 * plain data and handles; pages never do. Absent values are `null`. Page numbers are JavaScript numbers
 * (regions stay below 2^53 pages), migration ids and tokens are Uint8Arrays.
 */

/** Pages [first, first + count) of region `region` (its index in the migration's region table). */
export interface NativeRun {
  region: number;
  first: number;
  count: number;
}

/** A handle to memory that can move. Handles of one region can exist in several environments. */
export interface NativeRegion {
  /** Unguessable within the process; `openRegion(id)` gives another handle, in a worker or in the main thread. */
  readonly id: string;
  readonly pageSize: number;
  readonly capacityPages: number;
  pages(): number;
  /** The memory has grown in place (a WebAssembly memory). Throws RangeError beyond the capacity. */
  grow(pages: number): void;
  /**
   * Pages that are mapped readable and writable from the region's start on, by /proc/self/maps, never more
   * than the capacity: how far a WebAssembly memory of another thread has grown.
   */
  mappedPages(): number;
  retired(): boolean;
  /** Stops every native user of the memory; for memory that is found to have gone. */
  retire(): void;
  /** Memory of our own: external ArrayBuffers of at most 4 GiB over it, in this environment; [] when adopted. */
  buffers(): ArrayBuffer[];
  /** Whether `view` starts where the region does. */
  startsAt(view: Uint8Array): boolean;
  /** Null: this process's memory. Else how it is attached. */
  attached(): { pid: number; alive: boolean; paged: boolean; writeTracked: boolean; shared: boolean } | null;
  claimed(): boolean;
  /** One migration at a time: true when nobody else has it. */
  claim(): boolean;
  release(): void;
  /** XXH3_128 over the page hashes, as 32 hex digits. On a thread of the pool. */
  digest(): Promise<string>;
  /**
   * Reads the file from `offsetBytes` on into pages [first, first + count), as far as it goes; gives the bytes. On a
   * thread of the pool, as the next two.
   */
  fill(path: string, offsetBytes: number, first: number, count: number): Promise<number>;
  /** The same from the pages with the same numbers of another region. */
  fillFrom(from: NativeRegion, first: number, count: number): Promise<number>;
  /** Writes these pages to where they belong in an existing file; pages of zeros are left out. */
  save(path: string, first: number, count: number): Promise<void>;
  /** Drops this handle. Memory of our own goes when the last handle, view and engine have let go. Twice is fine. */
  close(): void;
}

/** A piece of another process's memory; `offset` is where it lies in the memory's file. */
export interface NativeMapping {
  address: bigint;
  lengthBytes: number;
  offset: number;
}

export interface NativeSourcePagerEvent {
  kind: 'done' | 'lost' | 'failed';
  code: string;
  message: string;
  /** The pages that are lost. */
  first: number;
  count: number;
}

export interface NativeSourcePagerStats {
  pages: number;
  pagesSettled: number;
  pagesFound: number;
  pagesLost: number;
  faults: number;
  faultP50Us: number;
  faultP99Us: number;
}

export interface NativeSourcePager {
  stats(): NativeSourcePagerStats;
  /** Stops; whoever touches what is missing waits for a successor. Twice is fine. */
  leave(): void;
  /** Stops, and what is missing fails to be read. */
  end(): void;
}

export interface NativeTrackerProbe {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}

export interface NativeTracker {
  readonly name: string;
  arm(): void;
  /** The pages written since `arm` or the last `collect`, as pairs [first, count, first, count, ...]. */
  collect(): Float64Array;
  disarm(): void;
  close(): void;
}

export interface NativeWriteMarks {
  /** The bits, 64 pages a word. */
  words(): ArrayBuffer;
  mark(first: number, count: number): void;
}

export interface NativeEvent {
  kind:
    | 'connected'
    | 'round-done'
    | 'switched'
    | 'evicted'
    | 'first-channel'
    | 'filled'
    | 'complete'
    | 'lost'
    | 'rest-here'
    | 'paused'
    | 'recovered'
    | 'failed';
  tag: number;
  suspects: number;
  code: string;
  message: string;
  lost: NativeRun[];
}

/** A VMD server of a migration, with this side's tokens for it: [attempt * 6 + role], 32 bytes each. */
export interface NativeStageServer {
  name: string;
  host: string;
  port: number;
  session: number;
  tokens: Uint8Array;
  /** 16 hex digits, see `NativeStage.identity`; null: nothing is deduplicated there. */
  identity: string | null;
}

export interface NativeServerStats {
  pages: number;
  bytes: number;
  /** Why it was given up, or null. */
  failed: string | null;
}

export interface NativeSenderConfig {
  regions: NativeRegion[];
  /** One a region; null: the region is never collected (stop-and-copy, post-copy). */
  trackers: (NativeTracker | null)[];
  host: string;
  port: number;
  migration: Uint8Array;
  channels: number;
  /** 32 bytes each, row by row: epoch * (channels + 1) + channel, the demand channel's last in each row. */
  tokens: Uint8Array;
  /** Bytes a second, 0 for none. */
  bandwidth: number;
  connectTimeoutMs: number;
  recoverTimeoutMs: number;
  /** A scatter's servers; none: everything goes to the destination. */
  servers: NativeStageServer[];
  /** On how many servers a scattered page is kept: 1 or 2. */
  replicas: number;
  /** False: no destination yet, everything goes to the servers. */
  direct: boolean;
  stallTimeoutMs: number;
  releaseAsEvicted: boolean;
  compress: 'auto' | 'lz4' | 'zstd' | 'off';
  /** Flags of the encodings that the destination takes, and those that every server does; see protocol/encodings.ts. */
  destinationEncodings: number;
  serverEncodings: number;
  /** 0: rounds send no deltas. */
  deltaCacheBytes: number;
  /** Pages of each region that the destination has as a base (0: none; it needs a tracker else), and the hashes' key. */
  basePages?: number[];
  /** 64 bytes. */
  baseKey?: Uint8Array;
  /** Key (32 bytes) of the guest's deduplication domain; null: every page is sent. */
  dedupKey: Uint8Array | null;
  /** The same, without servers: agreed on with the destination, whose pages are referred to. */
  referencesKey?: Uint8Array | null;
  onEvent: (event: NativeEvent) => void;
}

export interface NativeEncodingStats {
  pages: number;
  /** Of those pages, and what they became. */
  rawBytes: number;
  encodedBytes: number;
  /** Of the sending threads, attempts included. */
  cpuMs: number;
}

/** What was compared with the destination's base. `bytesOut` are in `bytesOnWire` too. */
export interface NativeBaseStats {
  /** Pending, and not known to be zeros. */
  pagesWithContent: number;
  pagesCompared: number;
  pagesSame: number;
  bytesOut: number;
  bytesIn: number;
  roundTrips: number;
  /** CPU time. */
  sourceHashUs: number;
  /** CPU time, as the destination says. */
  destinationHashUs: number;
}

export interface NativeSenderStats {
  bytesOnWire: number;
  pagesSent: number;
  pagesZero: number;
  pagesResent: number;
  pagesPending: number;
  faultsServed: number;
  redials: number;
  extraMemoryBytes: number;
  /** A scatter: pages that the destination acknowledged itself. */
  pagesDirect: number;
  /** In the order of the config's servers. */
  servers: NativeServerStats[];
  compression: NativeEncodingStats;
  delta: NativeEncodingStats;
  base: NativeBaseStats;
  /** Null where it was not asked for. */
  dedup: NativeDedupStats | null;
}

export interface NativeDedupStats {
  /** Acknowledged as references. */
  pages: number;
  /** References to what was not there any more. */
  refused: number;
  /** Pages hashed. */
  examined: number;
  /** Contents asked for. */
  probes: number;
  /** On the wire: references, questions, names. */
  overheadBytes: number;
  /** Of CPU. */
  hashMs: number;
  /** On the wire, of pages that went plainly, while there was something to send; null: not known yet. */
  linkBytesPerSecond: number | null;
}

/** See native/transfer/sender.h for the order of calls. */
export interface NativeSender {
  connect(): void;
  queuePopulated(): Promise<void>;
  /** On a thread of the pool; gives the number of pages pending. */
  queueDirty(): Promise<number>;
  /** The same on this thread, for the final scan of a paused guest. */
  queueDirtySync(): number;
  /** `references` false: nothing goes as a reference in this one. */
  startRound(tag: number, references?: boolean): void;
  /** These three before the first round, where `basePages` names a base; each ends with `round-done`. */
  probe(tag: number, bytes: number): void;
  compareBase(tag: number, mostNodes: number, sample: boolean): void;
  endBase(tag: number, drop: boolean): void;
  discardDirty(tag: number): Promise<number>;
  /** On this thread; gives the number of pages that the final scan found. */
  switchOver(): number;
  startPush(): void;
  setBandwidth(bytesPerSecond: number): void;
  stats(): NativeSenderStats;
  digest(region: number): Promise<string>;
  close(goodbye: boolean): void;
}

export interface NativeReceiverConfig {
  regions: NativeRegion[];
  migration: Uint8Array;
  channels: number;
  tokens: Uint8Array;
  discardFirst: boolean;
  pagingFromStart: boolean;
  mayPage: boolean;
  keepPageHashes: boolean;
  recoverTimeoutMs: number;
  lossGraceMs: number;
  /** A scatter's servers, to gather from. */
  servers: NativeStageServer[];
  /** Bytes a second fetched ahead of the guest; 0 for no limit. */
  gatherLimit: number;
  /** Bytes a second taken in over the data channels; 0 for no limit. */
  bandwidth: number;
  /** Nobody but the servers has the guest: no source is awaited. */
  sourceless: boolean;
  /** Flags of the encodings that pages may come in. */
  encodings: number;
  /** For each region; 'given': its owner puts it there and then calls `baseReady`; 'in-place': it is there. */
  bases?: ('none' | 'given' | 'in-place')[];
  /** 64 bytes, as the source's. */
  baseKey?: Uint8Array;
  /** Agreed on with the source: it is told what this process and the page share (a path) have of the domain. */
  known?: { key: Uint8Array; share: string | null } | null;
  onEvent: (event: NativeEvent) => void;
}

export interface NativeReceiverStats {
  bytesReceived: number;
  pagesReceived: number;
  pagesZero: number;
  pagesMissing: number;
  pagesSuspect: number;
  faults: { count: number; p50Us: number; p99Us: number; maxUs: number };
  extraMemoryBytes: number;
  pagesGathered: number;
  pagesFromBase: number;
  /** CPU time. */
  baseHashUs: number;
  /** Came as references, and were here already; and references to what was not. */
  pagesKnown: number;
  pagesUnresolved: number;
  servers: NativeServerStats[];
}

export interface NativeReceiver {
  /** Whether `prepare` may begin; a filling that is whole takes no more pages from then on. */
  seal(): boolean;
  paging(): boolean;
  stats(): NativeReceiverStats;
  missing(maxRuns: number): NativeRun[];
  digest(region: number): Promise<string>;
  acknowledgeLoss(): void;
  /** Of the bases the sample's nodes are, for good: those may be compared already. */
  baseSampled(): void;
  /** The bases are where they belong; until then the source may neither compare nor send pages. */
  baseReady(): void;
  /** 'filled' is to come once every page is here, before the switch. */
  awaitFilled(): void;
  /** The source sends nothing for a moment: the link is the gather's. */
  sourceRests(): void;
  /** Bytes a second; 0 for no limit. */
  limit(bandwidth: number, gatherLimit: number): void;
  grow(region: number, pages: number): void;
  close(): void;
}

export interface NativeListener {
  readonly port: number;
  add(receiver: NativeReceiver): void;
  remove(migration: Uint8Array): void;
  /** Connections about images go to this stage from now on. Without one they are hung up on. */
  serveStage(stage: NativeStage): void;
  close(): void;
}

export interface NativeImageStats {
  /** With content, here. */
  pagesHeld: number;
  /** Of these: taken over by a reference instead of being sent. */
  pagesShared: number;
  pagesZero: number;
  /** In the map, wherever they are. */
  pagesKnown: number;
  /** Of the server's memory: content, index and execution state. */
  bytes: number;
  bytesIn: number;
  bytesOut: number;
  sealed: boolean;
}

export interface NativeStageStats {
  /** The cap. */
  memoryBytes: number;
  /** What of it can hold pages, their index and execution states. */
  slabBytes: number;
  freeBytes: number;
  images: number;
  connections: number;
  bytesIn: number;
  bytesOut: number;
  /** Over all images, see `NativeImageStats.pagesShared`. */
  sharedPages: number;
  /** Of the memory: what is known of contents by their names. */
  hintBytes: number;
  members: number;
  popularNames: number;
  /** Their room counts as free. */
  popularPages: number;
}

/**
 * A VMD server's memory and data path; see native/stage/stage.h. Images are 16 bytes. Where a call gives false or
 * null there is no such image (or, where it says so, no room). Throws (code INVALID_ARGUMENT) where a bound is
 * exceeded or something is there already, and with code CLOSED after `close()`, but for `stats()`.
 */
export interface NativeStage {
  /** Takes all memory from the system and keeps it; before the first image. Rejects with SYSTEM: there is not so much. */
  preallocate(): Promise<void>;
  /** Another one with every stage, 16 hex digits. */
  identity(): string;
  /**
   * `regionPages` are capacities; false: no room for their index. `domainKey` (32 bytes): images with the same one
   * share content; null: it shares nothing.
   */
  createImage(
    image: Uint8Array,
    regionPages: number[],
    ordinal: number,
    domainKey: Uint8Array | null,
  ): boolean;
  /** A membership of a domain (32 bytes), with sessions as an image; false: too many domains. `guest`: 16 bytes. */
  join(member: Uint8Array, domainKey: Uint8Array, guest: Uint8Array | null): boolean;
  /** `roles`: bit n for StageRole n. `tokens`: [attempt * 6 + role], 32 bytes each, at most 64 attempts. */
  addSession(image: Uint8Array, session: number, roles: number, tokens: Uint8Array): boolean;
  /** Ends its connections too. */
  removeSession(image: Uint8Array, session: number): boolean;
  /** Where the server with this ordinal is (a numeric address), and our tokens for it, one an attempt. */
  setChain(image: Uint8Array, ordinal: number, host: string, port: number, tokens: Uint8Array): boolean;
  /** Replaces the former one; false too when there is no room. */
  putState(image: Uint8Array, state: Uint8Array): boolean;
  /** null too when there is none. */
  state(image: Uint8Array): Uint8Array | null;
  seal(image: Uint8Array): boolean;
  /** Ends its connections and gives its memory back to the system. */
  drop(image: Uint8Array): boolean;
  image(image: Uint8Array): NativeImageStats | null;
  /** Whether each of these pages is zero or held by some server, as the map has it. */
  whole(image: Uint8Array, regionPages: number[]): boolean | null;
  stats(): NativeStageStats;
  /** Twice is fine. */
  close(): void;
}

export interface NativeShareStats {
  pages: number;
  /** Of the file: header, index and pages. */
  bytesUsed: number;
  budgetBytes: number;
  /** Of this process, for the index. */
  memoryBytes: number;
  inserted: number;
  /** For better ones, or for a smaller budget. */
  evicted: number;
  /** Worth no more than all that is there, or no room on the file system. */
  refused: number;
  /** Taken over from an earlier writer, and not looked at yet. */
  unverified: number;
  /** Not what the index said. */
  dropped: number;
}

export interface NativeShareFill {
  pages: number;
  zero: number;
  inserted: number;
  there: number;
  noRoom: number;
}

/** The writer of a page share; see native/share/page_share.h. Digests have 32 bytes. Throws CLOSED after `close()`. */
export interface NativeShare {
  /** The pages of a part of a file; a length of 0: to its end. Rejects with SYSTEM. */
  fill(path: string, offsetBytes: number, lengthBytes: number, score: number): Promise<NativeShareFill>;
  holds(digest: Uint8Array): boolean;
  /** False where it is not there. */
  setScore(digest: Uint8Array, score: number): boolean;
  remove(digest: Uint8Array): boolean;
  setBudget(budgetBytes: number): Promise<void>;
  /** Looks at the next pages; whether some that were taken over are left to be looked at. */
  verify(mostPages: number): Promise<boolean>;
  stats(): NativeShareStats;
  /** Twice is fine. The file stays. */
  close(): void;
}

export interface NativeStageConfig {
  /** At least 16 MiB. */
  memoryBytes: number;
  /** Bytes a second in each direction over all images, 0 for none. */
  bandwidth: number;
  /** One in so many slots may hold popular pages, 8 without it; 0: none. */
  popularShare?: number;
  popularPeriodMs?: number;
}

/** A directory server, and a membership there (16 bytes); `identity` is not null. */
export interface NativeDirectory extends NativeStageServer {
  member: Uint8Array;
}

export interface NativeSamplerConfig {
  regions: NativeRegion[];
  domainKey: Uint8Array;
  /** Of one core: above 0, at most 1. */
  cpuShare: number;
  passIntervalMs: number;
  mostPages: number;
}

export interface NativeSamplerStats {
  passes: number;
  pagesHashed: number;
  pagesZero: number;
  pagesReported: number;
  pagesWanted: number;
  pagesGiven: number;
  lookedAway: number;
  cpuMs: number;
  memoryBytes: number;
  bytesOnWire: number;
  /** One for each directory that was set last: its connection is lost. */
  lost: boolean[];
}

/** Samples from its making on; see native/share/page_sampler.h. */
export interface NativeSampler {
  setDirectories(directories: NativeDirectory[]): void;
  stats(): NativeSamplerStats;
  close(): void;
}

export interface NativeSpreaderConfig {
  share: NativeShare;
  intervalMs: number;
  /** Bytes a second; 0 for no limit. */
  bandwidth: number;
}

export interface NativeSpreaderStats {
  rounds: number;
  pagesPopular: number;
  pagesHeld: number;
  pagesFetched: number;
  pagesRefused: number;
  bytesOnWire: number;
  lost: boolean[];
}

/** See native/spread/page_spreader.h. */
export interface NativeSpreader {
  setDirectories(directories: NativeDirectory[]): void;
  stats(): NativeSpreaderStats;
  close(): void;
}

export interface NativeFeature {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}

export interface NativeRestoreStats {
  pages: number;
  pagesInstalled: number;
  pagesRemoved: number;
  /** Brought before anyone waited for them. */
  pagesAhead: number;
  pagesLost: number;
  faults: number;
  faultsZero: number;
  /** Whose pages had to come from a disk. */
  faultsSlow: number;
  triedAgain: number;
  removeEvents: number;
  /** From the reading of a fault until its page is there. */
  p50Us: number;
  p99Us: number;
  maxUs: number;
  tracksWrites: boolean;
}

export interface NativeRestore {
  /** A region that was on its way is all there. */
  sourceComplete(): void;
  acknowledgeLoss(): void;
  /** Also after close. */
  stats(): NativeRestoreStats;
  /** What is missing is poisoned, and who waits for it woken. Twice is fine. */
  close(): void;
}

/** How a receive or a send of a unix socket ended. */
export type NativeFdOutcome =
  | 'ok'
  | 'timed-out'
  | 'cancelled'
  | 'too-many-descriptors'
  | 'truncated'
  | 'peer-gone';

/** A unix socket that carries descriptors. Closed by `close`, never by being collected. */
export interface NativeFdConnection {
  /** The pidfd is the connection's own, and closed with it; null: none to be had. `pid` 0: not visible from here. */
  peer(): { pid: number; uid: number; gid: number; pidfd: number | null };
  /** To be called once, before the first `receive`. Descriptors are the callback's from the call on. */
  onReceived(
    callback: (
      error: unknown,
      outcome: NativeFdOutcome | null,
      bytes: Buffer | null,
      descriptors: number[] | null,
    ) => void,
  ): void;
  /** What one recvmsg gives goes to the callback, no bytes at the end. One at a time. */
  receive(mostBytes: number, mostDescriptors: number, timeoutMs: number): void;
  /** The bytes are copied and the descriptors duplicated before it returns. One at a time. */
  send(bytes: Uint8Array, descriptors: number[], timeoutMs: number): Promise<NativeFdOutcome>;
  /** Twice is fine. A receive under way never reaches its callback. */
  close(): void;
}

export interface NativeFdListener {
  /** Lets the path go; connections stay. Twice is fine. */
  close(): void;
}

export interface NativeAddon {
  pageSize: number;
  /** Our own mapping; with `hugePages` of reserved ones of 2 MiB, shared with nobody. */
  allocate(lengthBytes: number, hugePages?: boolean): NativeRegion;
  /**
   * Pins `views` (page-aligned starts and lengths, else an error with code UNALIGNED) for as long as the
   * region has a handle here; this environment's end retires the region. `capacityBytes` is how long all of
   * them together may become, the last one growing in place. `owner` is pinned too: the
   * WebAssembly.Memory, whose buffer is detached when it grows while the memory stays where it is.
   */
  adopt(views: Uint8Array[], capacityBytes: number, owner: object | null): NativeRegion;
  /**
   * Memory of another process; descriptors are duplicated. `onGone` is called at most once, with what became of the
   * owner, after the region was retired.
   */
  attach(
    pidfd: number,
    uffd: number | null,
    mappings: NativeMapping[],
    memory: number | null,
    onGone: (message: string) => void,
  ): NativeRegion;
  /** Who touches what is missing in that memory waits from now on, for whoever pages it. */
  registerMissing(pidfd: number, uffd: number, mappings: NativeMapping[], memory: number | null): void;
  openPidfd(pid: number): number;
  /** pidfd_getfd. */
  takeDescriptor(pidfd: number, descriptor: number): number;
  /** Pages attached memory from an open file; `ledger` is an open file that tells a successor what was settled. */
  createSourcePager(config: {
    region: NativeRegion;
    snapshot: number;
    offset: number;
    ledger: number | null;
    prepage: boolean;
    onEvent: (event: NativeSourcePagerEvent) => void;
  }): NativeSourcePager;
  /** A process by pidfd; `alive()` is false when it has ended or runs another program. */
  holdProcess(pidfd: number): { pid: number; alive(): boolean; end(): void };
  /** Another handle on a region of this process; null when it is gone. */
  openRegion(id: string): NativeRegion | null;
  /** How far the mapping around a WebAssembly memory is reserved, in bytes from the view's start. */
  reservedBytes(view: Uint8Array): number;

  probeTrackers(): NativeTrackerProbe[];
  probeTracker(name: string): NativeTrackerProbe;
  /** Why this tracker may not watch the region's memory; null when it may. */
  trackerRefusal(name: string, region: NativeRegion, writers: string): string | null;
  /** Kernel features for paging: userfaultfd, its features one by one, PAGEMAP_SCAN, MADV_POPULATE_WRITE, ... */
  probeFeatures(): NativeFeature[];
  makeTracker(name: string, region: NativeRegion, writers: string): NativeTracker;
  /** `slots`: triples [slot, first page, pages]. `others`: a tracker's name, null only with marks. */
  makeKvmLog(
    region: NativeRegion,
    vmFd: number,
    slots: Float64Array,
    marks: NativeWriteMarks | null,
    others: string | null,
    writers: string,
    manualProtect: boolean,
  ): NativeTracker;
  readonly WriteMarks: new (capacityPages: number) => NativeWriteMarks;

  /** XXH3_64 of every page of `view`, into `out` (BigUint64Array of length pages). */
  hashPages(view: Uint8Array, pageSize: number, out: BigUint64Array): void;
  /** XXH3_64 of the whole view. */
  hash(view: Uint8Array): bigint;
  /** Page numbers at which two equally long views differ, as pairs [first, count, ...]. */
  diffPages(a: Uint8Array, b: Uint8Array, pageSize: number): Float64Array;
  hashImplementation(): string;

  createSender(config: NativeSenderConfig): NativeSender;
  createReceiver(config: NativeReceiverConfig): NativeReceiver;
  /** `onControl` gets the descriptor of a control connection whose preface has been read. */
  createListener(
    host: string,
    port: number,
    onControl: (fd: number, peerAddress: string) => void,
  ): NativeListener;
  createStage(config: NativeStageConfig): NativeStage;

  createSampler(config: NativeSamplerConfig): NativeSampler;
  createSpreader(config: NativeSpreaderConfig): NativeSpreader;

  /** The page share in this file; null: somebody else writes it. Throws INVALID_ARGUMENT (a file of something else), SYSTEM. */
  openShare(config: { path: string; key: Uint8Array; budgetBytes: number }): NativeShare | null;

  /**
   * Serves the missing pages of another process's memory from a file, or from a region of this process that a migration
   * fills meanwhile (one of the two is null). Descriptors are duplicated; all mappings have the one page size, and
   * `offset` is where they lie in the source. Closing retires the region. Events: `complete`, `lost` (poisoned after
   * acknowledgeLoss, or a quarter of a second), `owner-gone`, `failed`.
   */
  createRestore(config: {
    path: string | null;
    region: NativeRegion | null;
    uffd: number;
    pidfd: number;
    mappings: NativeMapping[];
    pageSize: number;
    prePaging: 'none' | 'sequential' | 'all';
    onEvent: (
      kind: 'complete' | 'lost' | 'owner-gone' | 'failed',
      code: string,
      message: string,
      lost: NativeRun[],
    ) => void;
  }): NativeRestore;

  /**
   * Makes the socket's file with at most these permissions. `onConnection` gets (null, connection), or (error, null)
   * when the listener has failed. More connections than `mostConnections` at once are closed as they come.
   */
  createFdListener(
    path: string,
    mode: number,
    mostConnections: number,
    onConnection: (error: unknown, connection: NativeFdConnection | null) => void,
  ): NativeFdListener;
  /** On a thread of the pool. */
  /** The process at the other end of a unix socket; 0 where it is not visible. */
  peerPid(fd: number): number;
  connectFdChannel(path: string, timeoutMs: number): Promise<NativeFdConnection>;

  /**
   * Closes every sender, receiver, listener and stage of this environment: missing pages are poisoned and whoever
   * waits for them is woken. `process.exit` runs no native cleanup of the main thread and waits for its
   * workers, which may be waiting for such a page.
   */
  closeEngines(): void;
  /** The same for the regions of all threads, at the end of the process: nobody waits for a page of them any more. */
  retireAllRegions(): void;

  /**
   * Makes a poisoned page reach WebAssembly as a RuntimeError: SIGBUS goes to V8's trap handler. Process-wide,
   * idempotent; other SIGBUS keep their former disposition.
   */
  forwardSigbusToWebAssembly(): void;
}
