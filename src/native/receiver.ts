/** The destination's engine, and the port that its connections come in by. */
import type { NativeRegion, NativeRun } from './region.js';
import type { NativeStage } from './stage.js';
import type { NativeEvent, NativeServerStats, NativeStageServer } from './transfer.js';

/** A file whose byte `offsetBytes` + n is the region's byte n. */
export interface NativeBaseImage {
  path: string;
  offsetBytes: number;
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
  /** For each region, of a guest without a source: what is the same there is not gathered. */
  baseImages?: (NativeBaseImage | null)[];
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
  /** Why not all of `baseImages` was compared. */
  baseProblem: string | null;
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
  /**
   * Of the pages that are still to come, while these servers (by ordinal) are away: how many nobody else has, and of how
   * many nobody has said yet where they are.
   */
  reach(away: readonly boolean[]): { away: number; unknown: number };
  digest(region: number): Promise<string>;
  acknowledgeLoss(): void;
  /**
   * Of the bases the sample's nodes are where they belong. If they stay as they are the source may compare them already,
   * else only ask how much is alike.
   */
  baseSampled(stays: boolean): void;
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
  /** Has this share's index read until it is closed, so that guests' sources are told of it as soon as they come. */
  keepShare(key: Uint8Array, path: string): void;
  close(): void;
}
