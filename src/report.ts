/** What a migration says of itself while it runs and when it has ended. All times in ms, all sizes in bytes. */
import type { Mode } from './options.js';

/** Names that people who know QEMU's migration states recognise. */
export const migrationStates = [
  'setup',
  'active',
  'pre-switchover',
  'device',
  'postcopy-active',
  'postcopy-paused',
  'postcopy-recover',
  'completed',
  'failed',
  'cancelled',
] as const;
export type MigrationState = (typeof migrationStates)[number];

export interface Progress {
  state: MigrationState;
  /** Since the start. */
  elapsedMs: number;
  /** The round under way, 1 for the first full copy; 0 before it. */
  round: number;
  /** Pages that the last collect found dirty, a second. Null before there was one. */
  dirtyPagesPerSecond: number | null;
  bytesOnWire: number;
  /** Over the last interval. */
  bytesPerSecond: number;
  pagesPending: number;
  pagesTotal: number;
  /** What a switchover now would cost, by the last round's figures. Null before there was one. */
  expectedDowntimeMs: number | null;
  /** That this source has answered; what a VMD server has already is asked for there. */
  remoteFaults: number;
  /** Bytes that did not have to go over the wire so far. */
  bytesSaved: { compression: number; delta: number };
  /** Pages that the destination's base has. */
  pagesFromBase: number;
  /** Went as references so far, see `DedupReport`. */
  pagesDeduplicated: number;
  /** What the migration waits for before it can begin, for people; null when it does not. */
  waitingFor: string | null;
}

export interface RoundReport {
  round: number;
  pagesSent: number;
  /** Pages that went as references; not among those sent. */
  pagesDeduplicated: number;
  bytes: number;
  durationMs: number;
  /** Pages dirtied while the round ran. */
  dirtyPagesAfter: number;
  /** Pages whose checksum did not fit, because they were written while they were sent; sent again. */
  suspectPages: number;
}

export interface DowntimeParts {
  /** Collecting the last dirty pages. */
  scanMs: number;
  /** Sending what was left (stop-and-copy, pre-copy), or its discard at the destination (post-copy, hybrid). */
  transferMs: number;
  /** The execution state on its way. */
  stateMs: number;
  /** `prepare` at the destination. */
  prepareMs: number;
  /** GRANT to RESUMED. */
  commitMs: number;
}

export interface RemoteFaults {
  count: number;
  p50Us: number;
  p99Us: number;
  maxUs: number;
}

/** What an encoding of pages came to: `rawBytes` of pages went as `encodedBytes`. */
export interface EncodingReport {
  pages: number;
  rawBytes: number;
  encodedBytes: number;
  /** CPU time of the source's sending threads, with what was tried for nothing. */
  cpuMs: number;
}

/** What a base at the destination saved, and what it cost. */
export interface BaseReport {
  /** Every page was compared. */
  used: boolean;
  /** Why, or why not. */
  reason: 'saves' | 'always' | 'link-is-faster' | 'nothing-matches' | 'not-ready' | 'no-tracker';
  /** What the destination could not do with its base, or null. */
  problem: string | null;
  /** Pages that did not have to be sent in the first round. */
  pagesSame: number;
  bytesSaved: number;
  pagesCompared: number;
  /** On the wire for it, in both directions: requests, hashes, lists of equal pages. */
  bytesExchanged: number;
  roundTrips: number;
  /** Until the base was there, or was not waited for any longer. */
  waitMs: number;
  compareMs: number;
  /** At the destination, before the comparison. */
  fillMs: number;
  replayMs: number;
  /** CPU time of hashing. */
  sourceCpuMs: number;
  destinationCpuMs: number;
  /** As a probe before the first page found it. */
  linkBytesPerSecond: number | null;
}

/** What the source knows when it has evicted the guest; the destination may still be gathering. */
export interface EvictionReport {
  migrationId: string;
  guest: string;
  mode: Mode;
  /** How it ended up: pre-copy may go post-copy. */
  switchedToPostCopy: boolean;
  heapBytes: number;
  tracker: string | null;
  pauseWaitMs: number;
  downtimeMs: number;
  downtimeParts: DowntimeParts;
  /** Start until the source holds nothing that anyone still needs. */
  evictionMs: number;
  bytesOnWire: number;
  pagesSent: number;
  pagesZero: number;
  pagesResent: number;
  /** lz4 and zstd; to the destination and to servers. */
  compression: EncodingReport;
  /** Pages sent again as what had changed of them. */
  delta: EncodingReport;
  rounds: RoundReport[];
  redials: number;
  /** Pages that went straight to the destination; in scatter modes the rest is at the intermediaries. */
  pagesDirect: number;
  intermediaries: Intermediary[];
  /** Null where the destination had none. */
  base: BaseReport | null;
  /** What deduplication did; null where it was not asked for. */
  dedup: DedupReport | null;
}

/** What deduplication saved, and what it cost. */
export interface DedupReport {
  /** Pages that went as a reference to content which the destination, or a server, had already. */
  pagesDeduplicated: number;
  /** Bytes of these pages, less all that was said about them; below zero where little was found. */
  bytesSaved: number;
  /** Pages looked at. The rest was sent before it was their turn. */
  pagesHashed: number;
  /** CPU time of hashing at the source, in ms. */
  cpuMs: number;
  /** Scatter modes: contents that servers were asked for. */
  probes: number;
  /** References to what was gone by then; those pages went again, plainly. */
  refused: number;
}

export interface MigrationReport extends EvictionReport {
  state: MigrationState;
  /** Digests of both sides compared: true; not asked for: null. A mismatch is an error, never false. */
  verified: boolean | null;
  /** Start until the destination holds every page. */
  totalMs: number;
  /** RESUMED until the destination holds every page. */
  gatherMs: number;
  remoteFaults: RemoteFaults;
  /** Peak of what the engines hold beyond the regions, on each side. */
  extraMemoryBytes: { source: number; destination: number };
}

/** One VMD server's part in a migration. */
export interface Intermediary {
  name: string;
  /** Source's side: pages it was given and holds. Destination's side: pages gathered from it. */
  pages: number;
  /** On the wire between it and this side. */
  bytes: number;
  /** Why it was given up during the migration, or was named and could not be asked at all; or null. */
  failed: string | null;
}

/** The destination's own account, for arrivals. */
export interface ArrivalReport {
  migrationId: string;
  guest: string;
  heapBytes: number;
  /** Why the guest does not run, although it is this side's and nobody else's; null: it does. */
  notRunning: string | null;
  verified: boolean | null;
  prepareMs: number;
  bytesReceived: number;
  pagesReceived: number;
  pagesZero: number;
  remoteFaults: RemoteFaults;
  extraMemoryBytes: number;
  /** The guest's first instruction here until every page was here. */
  gatherMs: number;
  /** Scatter modes: pages that were fetched from VMD servers. */
  pagesGathered: number;
  intermediaries: Intermediary[];
  /** Pages that were here already, and confirmed by the source, or (`unpark`) by the VMD servers; and their bytes. */
  pagesFromBase: number;
  bytesFromBase: number;
  /** `unpark`: what could not be done with its base, or null. Of a migration the source's report has it. */
  baseProblem: string | null;
  /** Came as references to what was here already (`ListenOptions.dedup`). */
  pagesKnown: number;
}
