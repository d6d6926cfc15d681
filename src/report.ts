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
/** One of them. `completed`, `failed` and `cancelled` are the last. */
export type MigrationState = (typeof migrationStates)[number];

/** One sample of a migration under way, from its source. */
export interface Progress {
  /** Where the migration stands. */
  state: MigrationState;
  /** Since the start. */
  elapsedMs: number;
  /** The round under way, 1 for the first full copy; 0 before it. */
  round: number;
  /** Pages that the last collect found dirty, a second. Null before there was one. */
  dirtyPagesPerSecond: number | null;
  /** Written to data connections so far, headers included. */
  bytesOnWire: number;
  /** Over the last interval. */
  bytesPerSecond: number;
  /** Pages that are still to be sent, or to be sent again. */
  pagesPending: number;
  /** Pages of all regions, as long as they are now. */
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

/** One round of copying: all of the memory first, then what was written meanwhile. */
export interface RoundReport {
  /** 1 for the first full copy. */
  round: number;
  /** Pages with content that were sent. */
  pagesSent: number;
  /** Pages that went as references; not among those sent. */
  pagesDeduplicated: number;
  /** On the wire. */
  bytes: number;
  /** How long it took. */
  durationMs: number;
  /** Pages dirtied while the round ran. */
  dirtyPagesAfter: number;
  /** Pages whose checksum did not fit, because they were written while they were sent; sent again. */
  suspectPages: number;
}

/** What the downtime consists of, one after the other. */
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

/** Pages that somebody at the destination waited for, and that had to be fetched. */
export interface RemoteFaults {
  /** How many. */
  count: number;
  /** Half of them took at most this long, in µs. */
  p50Us: number;
  /** 99 of 100 took at most this long, in µs. */
  p99Us: number;
  /** The longest, in µs. */
  maxUs: number;
}

/** What an encoding of pages came to: `rawBytes` of pages went as `encodedBytes`. */
export interface EncodingReport {
  /** Pages that went so. */
  pages: number;
  /** Their bytes before. */
  rawBytes: number;
  /** Their bytes on the wire. */
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
  /** Bytes of those with content: a page of zeros would not have cost any. */
  bytesSaved: number;
  /** Pages whose hashes were compared. */
  pagesCompared: number;
  /** On the wire for it, in both directions: requests, hashes, lists of equal pages. */
  bytesExchanged: number;
  /** Questions that had to be answered, one after the other. */
  roundTrips: number;
  /** Until the base was there, or was not waited for any longer. */
  waitMs: number;
  /** From when the base was there until the comparison was over or given up. */
  compareMs: number;
  /** At the destination, before the comparison. */
  fillMs: number;
  /** At the destination: applying the `replayLog`. */
  replayMs: number;
  /**
   * Of the `replayLog`: `applied` to the base (`problem` says what failed then), `skipped` since its pace promised less
   * than the base has as it is, or `none`: there was no log, or nobody there to apply it.
   */
  replay: 'applied' | 'skipped' | 'none';
  /** CPU time of hashing. */
  sourceCpuMs: number;
  /** The same at the destination. */
  destinationCpuMs: number;
  /** As a probe before the first page found it. */
  linkBytesPerSecond: number | null;
}

/** What the source knows when it has evicted the guest; the destination may still be gathering. */
export interface EvictionReport {
  /** 32 hex digits, the same at both sides. */
  migrationId: string;
  /** The guest's name. */
  guest: string;
  /** As it was asked for. */
  mode: Mode;
  /** The guest ran at the destination before all of its pages were there: post-copy, hybrid, and pre-copy that went so. */
  switchedToPostCopy: boolean;
  /** Bytes of all regions. */
  heapBytes: number;
  /** The dirty tracker; null where none was needed. */
  tracker: string | null;
  /** From the call of `pause` until the guest stood. */
  pauseWaitMs: number;
  /** From the guest's last instruction here until the destination had resumed it, as the source heard of it. */
  downtimeMs: number;
  /** The downtime in parts. */
  downtimeParts: DowntimeParts;
  /** Start until the source holds nothing that anyone still needs. */
  evictionMs: number;
  /** Written to data connections, headers included; to servers too. */
  bytesOnWire: number;
  /** Pages with content, counted each time that they were sent. */
  pagesSent: number;
  /** Pages that went as zeros, which takes next to nothing. */
  pagesZero: number;
  /** Of all these, pages that had been sent before. */
  pagesResent: number;
  /** lz4 and zstd; to the destination and to servers. */
  compression: EncodingReport;
  /** Pages sent again as what had changed of them. */
  delta: EncodingReport;
  /** Each round, and the copying while the guest was paused; empty in `post-copy` and `scatter`. */
  rounds: RoundReport[];
  /** How often the data connections were cut and dialled anew. */
  redials: number;
  /** Pages that went straight to the destination; in scatter modes the rest is at the intermediaries. */
  pagesDirect: number;
  /** With `replicas: 2`: pages that one server alone keeps, since no second one lived or nobody else took them. */
  pagesWithOneCopy: number;
  /** Scatter modes: what each server holds. */
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

/** The whole of a migration, from its source, when the destination holds every page. */
export interface MigrationReport extends EvictionReport {
  /** `completed`: other ends are errors. */
  state: MigrationState;
  /** Digests of both sides compared: true; not asked for: null. A mismatch is an error, never false. */
  verified: boolean | null;
  /** Start until the destination holds every page. */
  totalMs: number;
  /** RESUMED until the destination holds every page. */
  gatherMs: number;
  /** At the destination. */
  remoteFaults: RemoteFaults;
  /** Peak of what the engines hold beyond the regions, on each side. */
  extraMemoryBytes: { source: number; destination: number };
}

/** One VMD server's part in a migration. */
export interface Intermediary {
  /** As the server calls itself, or as it was named. */
  name: string;
  /** Source's side: pages it was given and holds. Destination's side: pages gathered from it. */
  pages: number;
  /** On the wire between it and this side. */
  bytes: number;
  /** Why it was given up during the migration, or was named or heard and takes no part in it at all; or null. */
  failed: string | null;
}

/** The destination's own account, for arrivals. */
export interface ArrivalReport {
  /** 32 hex digits, the source's; of a guest that was parked, its image's. */
  migrationId: string;
  /** The guest's name. */
  guest: string;
  /** Bytes of all regions that are open. */
  heapBytes: number;
  /** Why the guest does not run, although it is this side's and nobody else's; null: it does. */
  notRunning: string | null;
  /** Digests compared with those of the guest as it left: true; not asked for, or not to be had: null. */
  verified: boolean | null;
  /** How long `prepare` took, without the waiting for what it needs; 0 for `unpark`. */
  prepareMs: number;
  /** Taken in over data connections, headers included. */
  bytesReceived: number;
  /** Pages that came with content. */
  pagesReceived: number;
  /** Pages that came as zeros. */
  pagesZero: number;
  /** Pages that somebody waited for. */
  remoteFaults: RemoteFaults;
  /** Peak of what the engine held beyond the regions. */
  extraMemoryBytes: number;
  /** The guest's first instruction here until every page was here. */
  gatherMs: number;
  /** Scatter modes: pages that were fetched from VMD servers. */
  pagesGathered: number;
  /** Scatter modes, and `unpark`: what came from each server. */
  intermediaries: Intermediary[];
  /** Pages that were here already, and confirmed by the source, or (`unpark`) by the VMD servers. */
  pagesFromBase: number;
  /** Bytes of these pages. */
  bytesFromBase: number;
  /** `unpark`: what could not be done with its base, or null. Of a migration the source's report has it. */
  baseProblem: string | null;
  /** Came as references to what was here already (`ListenOptions.dedup`). */
  pagesKnown: number;
}
