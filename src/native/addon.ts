/** All that the addon exports. */
import type { NativeFdConnection, NativeFdListener } from './fd-channel.js';
import type { NativeRestore, NativeSourcePager, NativeSourcePagerEvent } from './foreign-memory.js';
import type { NativeListener, NativeReceiver, NativeReceiverConfig } from './receiver.js';
import type { NativeMapping, NativeRegion, NativeRun } from './region.js';
import type { NativeSender, NativeSenderConfig } from './sender.js';
import type {
  NativeSampler,
  NativeSamplerConfig,
  NativeShare,
  NativeSpreader,
  NativeSpreaderConfig,
} from './share.js';
import type { NativeStage, NativeStageConfig } from './stage.js';
import type { NativeFeature, NativeTracker, NativeTrackerProbe, NativeWriteMarks } from './tracker.js';

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
  makeTracker(name: string, region: NativeRegion, writers: string, splitHugePages: boolean): NativeTracker;
  /** `slots`: triples [slot, first page, pages]. `others`: a tracker's name, null only with marks. */
  makeKvmLog(
    region: NativeRegion,
    vmFd: number,
    slots: Float64Array,
    marks: NativeWriteMarks | null,
    others: string | null,
    writers: string,
    manualProtect: boolean,
    splitHugePages: boolean,
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
  /** The process at the other end of a unix socket; 0 where it is not visible. */
  peerPid(fd: number): number;
  /** On a thread of the pool. */
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
