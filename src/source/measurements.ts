/**
 * The source's clock over one migration: the three times, downtime by part, rounds and the samples for
 * `progress`. One monotonic clock (process.hrtime) for everything; milliseconds go out.
 */
import type { NativeEncodingStats, NativeSenderStats } from '../native.js';
import type { DowntimeParts, MigrationReport, MigrationState, Progress, RoundReport } from '../report.js';

export type TimesReport = Pick<
  MigrationReport,
  'pauseWaitMs' | 'downtimeMs' | 'downtimeParts' | 'evictionMs' | 'totalMs' | 'gatherMs' | 'rounds'
>;

function savedBy(stats: NativeEncodingStats | undefined): number {
  return stats ? stats.rawBytes - stats.encodedBytes : 0;
}

export class Measurements {
  readonly rounds: RoundReport[] = [];
  /** What the last decision expected a switchover to cost; null before there was one. */
  expectedDowntimeMs: number | null = null;
  dirtyPagesPerSecond: number | null = null;
  roundUnderWay = 0;
  #marks = new Map<string, bigint>([['start', process.hrtime.bigint()]]);
  #prepareMs = 0;
  #last = { atMs: 0, bytes: 0 };

  pauseAsked(): void {
    this.#mark('pauseAsked');
  }

  /** `atNs`: the guest's last instruction, where it told. A clock from before the question is not believed. */
  paused(atNs: bigint | undefined): void {
    const now = process.hrtime.bigint();
    const asked = this.#marks.get('pauseAsked') ?? now;
    this.#marks.set('paused', atNs !== undefined && atNs >= asked && atNs <= now ? atNs : now);
  }

  scanned(): void {
    this.#mark('scanned');
  }

  transferred(): void {
    this.#mark('transferred');
  }

  ready(): void {
    this.#markOnce('ready');
  }

  /** As the destination measured it; said after READY, since nobody waits for it. */
  prepared(prepareMs: number): void {
    this.#prepareMs = prepareMs;
  }

  resumed(): void {
    this.#markOnce('resumed');
  }

  evicted(): void {
    this.#mark('evicted');
  }

  /** The destination holds every page; the first time counts. */
  complete(): void {
    this.#markOnce('complete');
  }

  finalRound(before: NativeSenderStats, after: NativeSenderStats): void {
    this.rounds.push({
      round: this.rounds.length + 1,
      pagesSent: after.pagesSent - before.pagesSent,
      pagesDeduplicated: (after.dedup?.pages ?? 0) - (before.dedup?.pages ?? 0),
      bytes: after.bytesOnWire - before.bytesOnWire,
      durationMs: this.#between('scanned', null),
      dirtyPagesAfter: 0,
      suspectPages: 0,
    });
  }

  report(): TimesReport {
    // The state and PREPARE travel beside the switch: READY may be here before the switch's own answer.
    const readyMs = this.#between('scanned', this.#marks.has('ready') ? 'ready' : 'resumed');
    const transferMs = Math.max(
      0,
      Math.min(this.#between('scanned', 'transferred'), readyMs - this.#prepareMs),
    );
    const downtimeParts: DowntimeParts = {
      scanMs: this.#between('paused', 'scanned'),
      transferMs,
      stateMs: Math.max(0, readyMs - transferMs - this.#prepareMs),
      prepareMs: this.#prepareMs,
      commitMs: this.#between('ready', 'resumed'),
    };
    const evictionMs = this.#between('start', 'evicted');
    return {
      pauseWaitMs: this.#between('pauseAsked', 'paused'),
      downtimeMs: this.#between('paused', 'resumed'),
      downtimeParts,
      evictionMs,
      totalMs: this.#marks.has('complete') ? this.#between('start', 'complete') : evictionMs,
      gatherMs: this.#marks.has('complete') ? this.#between('resumed', 'complete') : 0,
      rounds: this.rounds,
    };
  }

  sample(now: {
    state: MigrationState;
    stats: NativeSenderStats | null;
    pagesTotal: number;
    waitingFor: string | null;
  }): Progress {
    const elapsedMs = this.#between('start', null);
    const bytesOnWire = now.stats?.bytesOnWire ?? 0;
    const interval = elapsedMs - this.#last.atMs;
    const bytesPerSecond = interval > 0 ? ((bytesOnWire - this.#last.bytes) * 1000) / interval : 0;
    this.#last = { atMs: elapsedMs, bytes: bytesOnWire };
    return {
      state: now.state,
      elapsedMs,
      round: this.roundUnderWay,
      dirtyPagesPerSecond: this.dirtyPagesPerSecond,
      bytesOnWire,
      bytesPerSecond: Math.max(0, bytesPerSecond),
      pagesPending: now.stats?.pagesPending ?? 0,
      pagesTotal: now.pagesTotal,
      expectedDowntimeMs: this.expectedDowntimeMs,
      remoteFaults: now.stats?.faultsServed ?? 0,
      bytesSaved: { compression: savedBy(now.stats?.compression), delta: savedBy(now.stats?.delta) },
      pagesFromBase: now.stats?.base.pagesSame ?? 0,
      pagesDeduplicated: now.stats?.dedup?.pages ?? 0,
      waitingFor: now.waitingFor,
    };
  }

  #mark(name: string): void {
    this.#marks.set(name, process.hrtime.bigint());
  }

  #markOnce(name: string): void {
    if (!this.#marks.has(name)) this.#mark(name);
  }

  #between(from: string, to: string | null): number {
    const start = this.#marks.get(from);
    const end = to === null ? process.hrtime.bigint() : this.#marks.get(to);
    return start === undefined || end === undefined ? 0 : this.#span(start, end);
  }

  #span(start: bigint, end: bigint): number {
    return Number(end - start) / 1e6;
  }
}
