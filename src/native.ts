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
  claimed(): boolean;
  /** One migration at a time: true when nobody else has it. */
  claim(): boolean;
  release(): void;
  /** XXH3_128 over the page hashes, as 32 hex digits. On a thread of the pool. */
  digest(): Promise<string>;
  /** Drops this handle. Memory of our own goes when the last handle, view and engine have let go. Twice is fine. */
  close(): void;
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

export interface NativeEvent {
  kind:
    | 'connected'
    | 'round-done'
    | 'switched'
    | 'evicted'
    | 'first-channel'
    | 'complete'
    | 'lost'
    | 'paused'
    | 'recovered'
    | 'failed';
  tag: number;
  suspects: number;
  code: string;
  message: string;
  lost: NativeRun[];
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
  onEvent: (event: NativeEvent) => void;
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
}

/** See native/transfer/sender.h for the order of calls. */
export interface NativeSender {
  connect(): void;
  queuePopulated(): Promise<void>;
  /** On a thread of the pool; gives the number of pages pending. */
  queueDirty(): Promise<number>;
  /** The same on this thread, for the final scan of a paused guest. */
  queueDirtySync(): number;
  startRound(tag: number): void;
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
}

export interface NativeReceiver {
  /** Whether `prepare` may begin; a filling that is whole takes no more pages from then on. */
  seal(): boolean;
  paging(): boolean;
  stats(): NativeReceiverStats;
  missing(maxRuns: number): NativeRun[];
  digest(region: number): Promise<string>;
  acknowledgeLoss(): void;
  grow(region: number, pages: number): void;
  close(): void;
}

export interface NativeListener {
  readonly port: number;
  add(receiver: NativeReceiver): void;
  remove(migration: Uint8Array): void;
  close(): void;
}

export interface NativeFeature {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}

export interface NativeAddon {
  pageSize: number;
  /** Our own mapping, as external ArrayBuffers of at most 4 GiB over it. */
  allocate(lengthBytes: number): { region: NativeRegion; buffers: ArrayBuffer[] };
  /**
   * Pins `views` (page-aligned starts and lengths, else an error with code UNALIGNED) for as long as the
   * region has a handle here; this environment's end retires the region. `capacityBytes` is how long all of
   * them together may become, the last one growing in place. `owner` is pinned too: the
   * WebAssembly.Memory, whose buffer is detached when it grows while the memory stays where it is.
   */
  adopt(views: Uint8Array[], capacityBytes: number, owner: object | null): NativeRegion;
  /** Another handle on a region of this process; null when it is gone. */
  openRegion(id: string): NativeRegion | null;
  /** How far the mapping around a WebAssembly memory is reserved, in bytes from the view's start. */
  reservedBytes(view: Uint8Array): number;

  probeTrackers(): NativeTrackerProbe[];
  /** Kernel features for paging: userfaultfd, its features one by one, PAGEMAP_SCAN, MADV_POPULATE_WRITE, ... */
  probeFeatures(): NativeFeature[];
  makeTracker(name: string, region: NativeRegion): NativeTracker;

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

  /**
   * Closes every sender, receiver and listener of this environment: missing pages are poisoned and whoever
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
