/** The source's engine. */
import type { NativeRegion } from './region.js';
import type { NativeTracker } from './tracker.js';
import type { NativeEvent, NativeServerStats, NativeStageServer } from './transfer.js';

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
  /** How many pages of each region whoever is to hold them was told of. */
  toldPages: number[];
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

/**
 * How far a comparison with a base goes: of all nodes that are left; page by page, of a few; the same, only to know how
 * much is alike.
 */
export type CompareDepth = 'all' | 'sample' | 'estimate';

/** What was compared with the destination's base. `bytesOut` are in `bytesOnWire` too. */
export interface NativeBaseStats {
  /** Pending, and not known to be zeros. */
  pagesWithContent: number;
  pagesCompared: number;
  pagesSame: number;
  /** Of these, those with content. */
  bytesSame: number;
  /** By estimates, and how many of them were equal. */
  pagesEstimated: number;
  pagesAlike: number;
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
  /** A scatter with two replicas: pages that one server alone keeps. */
  pagesSingle: number;
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
  /** Whoever is to hold a region that has grown has room for so many pages of it: what comes next may be sent. */
  toldGrowth(region: number, pages: number): void;
  /** These three before the first round, where `basePages` names a base; each ends with `round-done`. */
  probe(tag: number, bytes: number): void;
  compareBase(tag: number, mostNodes: number, depth: CompareDepth): void;
  endBase(tag: number, drop: boolean): void;
  discardDirty(tag: number): Promise<number>;
  /** On this thread; gives the number of pages that the final scan found. */
  switchOver(): number;
  startPush(): void;
  /** A scatter, before `startPush`: held, it does not evict. */
  holdEviction(held: boolean): void;
  /** What it holds goes again to others. */
  giveUpServer(ordinal: number, why: string): void;
  setBandwidth(bytesPerSecond: number): void;
  stats(): NativeSenderStats;
  digest(region: number): Promise<string>;
  close(goodbye: boolean): void;
}
