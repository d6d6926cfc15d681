/** The page share, and page distribution: what samples guests, and what fills a share. */
import type { NativeRegion } from './region.js';
import type { NativeStageServer } from './transfer.js';

export interface NativeShareStats {
  /** In the share now. */
  pages: number;
  /** Of the file: header, index and pages. */
  bytesUsed: number;
  /** As it was set last. */
  budgetBytes: number;
  /** Of this process, for the index. */
  memoryBytes: number;
  /** Put in since this writer opened it. */
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
  /** Of the file. */
  pages: number;
  /** Of zeros, left out. */
  zero: number;
  /** Put in. */
  inserted: number;
  /** Were there already. */
  there: number;
  /** Worth no more than all that is there, or no room on the file system. */
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
