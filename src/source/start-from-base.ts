/**
 * Before the first page, where the destination starts from a base: how fast is the link, is the base there in time,
 * does a sample match, and then the comparison of all. The guest runs meanwhile, its trackers armed; what it writes is
 * found by the next collect whatever was compared (native/transfer/base_comparison.h). The decisions are
 * decide-base.ts's.
 */
import type { MemferryError } from '../errors.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import type { DestinationMessage, SourceMessage } from '../protocol/messages.js';
import type { BaseReport } from '../report.js';
import { nodePages, sampleNodes } from '../protocol/base-sample.js';
import {
  type CompareDecision,
  type CompareInput,
  decideCompare,
  decideReplay,
  decideWait,
  decideWaitWithReplay,
  probeBytes,
  replayBounds,
} from './decide-base.js';
import type { SourceEngine } from './engine.js';

type BaseReady = Extract<DestinationMessage, { type: 'base-ready' }>;
type BaseProgress = Extract<DestinationMessage, { type: 'base-progress' }>;

export interface BaseOptions {
  base: 'auto' | 'always' | 'off';
  baseTimeoutMs: number;
  bandwidth: number;
  prepareTimeoutMs: number;
}

/** What there is to send, and how fast that would go. */
interface Sending {
  engine: SourceEngine;
  /** Of pages with content. */
  bytes: number;
  pageSize: number;
  /** Bytes a second. */
  link: number;
  plainMs: number;
}

/** All nodes that are left. */
const everyNode = Number.MAX_SAFE_INTEGER;

/** The source's part in a base; made when the destination says that it has one. */
export class StartFromBase {
  readonly #ready = deferred<BaseReady>();
  #progress: Omit<BaseProgress, 'type'> = { sampled: false, replays: false, fraction: 0, expectedMs: null };
  /** What a sample said. */
  #decision: CompareDecision | null = null;
  /** Of the base without the log that is applied to it. */
  #estimate: CompareDecision | null = null;
  #told: Deferred<void> = deferred();
  #toldAt = performance.now();
  readonly #report: BaseReport;

  constructor(
    /** Of each region, as the destination has them; 0 for a region without a base. */
    readonly pages: readonly number[],
    private readonly options: BaseOptions,
    private readonly send: (message: SourceMessage) => void,
    private readonly signal: AbortSignal,
  ) {
    this.#report = {
      used: false,
      reason: 'not-ready',
      problem: null,
      pagesSame: 0,
      bytesSaved: 0,
      pagesCompared: 0,
      bytesExchanged: 0,
      roundTrips: 0,
      waitMs: 0,
      compareMs: 0,
      fillMs: 0,
      replayMs: 0,
      replay: 'none',
      sourceCpuMs: 0,
      destinationCpuMs: 0,
      linkBytesPerSecond: null,
    };
  }

  onProgress(message: BaseProgress): void {
    this.#progress = message;
    this.#toldAt = performance.now();
    this.#told.resolve();
  }

  onReady(message: BaseReady): void {
    this.#ready.resolve(message);
    this.#told.resolve();
  }

  /** The connection is gone, or the destination gave up. */
  fail(error: MemferryError): void {
    this.#ready.reject(error);
    this.#told.reject(error);
  }

  /** `drop`: what is not confirmed is let go of before the guest pauses. */
  async run(engine: SourceEngine, pageSize: number, drop: boolean): Promise<void> {
    const bytes = engine.stats().base.pagesWithContent * pageSize;
    const link = await this.#measureLink(engine, bytes);
    this.#report.linkBytesPerSecond = link;
    const sending: Sending = { engine, bytes, pageSize, link, plainMs: (bytes * 1000) / link };
    const ready = await this.#await(sending);
    this.#report.problem = ready.problem;
    this.#report.fillMs = ready.fillMs;
    this.#report.replayMs = ready.replayMs;
    if (ready.replayMs > 0 && this.#report.replay === 'none') this.#report.replay = 'applied';
    const started = performance.now();
    if (ready.ready) await this.#compare(sending);
    await untilAborted(engine.endBase(drop), this.signal);
    this.#report.compareMs = performance.now() - started;
  }

  /** There is nothing to compare by: no tracker. The destination is told, since it waits for no page until then. */
  async decline(problem: string): Promise<void> {
    this.#report.problem = problem;
    this.#report.reason = 'no-tracker';
    await this.#cancel();
  }

  report(engine: SourceEngine): BaseReport {
    const { base } = engine.stats();
    return {
      ...this.#report,
      pagesSame: base.pagesSame,
      bytesSaved: base.bytesSame,
      pagesCompared: base.pagesCompared,
      bytesExchanged: base.bytesOut + base.bytesIn,
      roundTrips: base.roundTrips,
      sourceCpuMs: base.sourceHashUs / 1000,
      destinationCpuMs: base.destinationHashUs / 1000,
    };
  }

  async #measureLink(engine: SourceEngine, bytes: number): Promise<number> {
    const probe = probeBytes(bytes);
    const started = performance.now();
    await untilAborted(engine.probe(probe), this.signal);
    const measured = (probe * 1000) / Math.max(performance.now() - started, 0.01);
    return this.options.bandwidth > 0 ? Math.min(measured, this.options.bandwidth) : measured;
  }

  async #await(sending: Sending): Promise<BaseReady> {
    const { base, baseTimeoutMs } = this.options;
    const { plainMs } = sending;
    const started = performance.now();
    let replayingSince: number | null = null;
    try {
      for (;;) {
        if (this.#ready.settled) return await untilAborted(this.#ready.promise, this.signal);
        const now = performance.now();
        const elapsedMs = now - started;
        const late = elapsedMs >= baseTimeoutMs;
        const sinceToldMs = Math.min(elapsedMs, now - this.#toldAt);
        const { fraction, expectedMs, sampled, replays } = this.#progress;
        if (sampled && base === 'auto' && !(replays ? this.#estimate : this.#decision)) {
          // Before it is all there: a base that has nothing in common is not worth any wait.
          const { action } = replays ? await this.#makeEstimate(sending) : await this.#sample(sending);
          if (action === 'plain' && !replays) return await this.#cancel();
          continue;
        }
        if (replays && fraction >= 1) {
          replayingSince ??= now;
          const bounds = replayBounds(plainMs, this.#estimate);
          const input = { elapsedMs: now - replayingSince, sinceToldMs, expectedMs, ...bounds };
          if (late || (base === 'auto' && decideReplay(input) === 'skip')) return await this.#withoutReplay();
        } else {
          const input = { elapsedMs, sinceToldMs, fraction, expectedMs, plainMs };
          const decide = () =>
            replays
              ? decideWaitWithReplay(input, this.#estimate)
              : decideWait({ ...input, worthMs: this.#decision?.worthMs ?? null });
          if (late || (base === 'auto' && decide() === 'give-up')) {
            this.#report.reason = 'not-ready';
            return await this.#cancel();
          }
        }
        this.#told = deferred();
        this.#told.promise.catch(() => {});
        // Timers that are due run before sockets are read: what came while this thread stood still counts first.
        const look = new Promise<void>((resolve) => setTimeout(() => setImmediate(resolve), 20));
        await untilAborted(Promise.race([this.#told.promise, look]), this.signal);
      }
    } finally {
      this.#report.waitMs = performance.now() - started;
    }
  }

  /** The base is to do as it is, if it is worth anything. */
  async #withoutReplay(): Promise<BaseReady> {
    if (this.#estimate?.action === 'plain') {
      this.#report.reason = this.#estimate.reason;
      return await this.#cancel();
    }
    return await this.#letGo('base-skip-replay');
  }

  #cancel(): Promise<BaseReady> {
    return this.#letGo('base-cancel');
  }

  /** No page may leave before the destination has stopped writing its regions. */
  async #letGo(type: 'base-cancel' | 'base-skip-replay'): Promise<BaseReady> {
    if (this.#progress.replays) this.#report.replay = 'skipped';
    this.send({ type });
    const { prepareTimeoutMs } = this.options;
    const ready = await untilAborted(
      within(
        this.#ready.promise,
        prepareTimeoutMs,
        'PREPARE_TIMEOUT',
        `the destination did not let go of its base within ${prepareTimeoutMs} ms`,
      ),
      this.signal,
    );
    // What was ready in the same moment is as good as any.
    return ready;
  }

  async #sample(sending: Sending): Promise<CompareDecision> {
    const sampleMs = await this.#compareSample(sending, 'sample');
    const { pagesCompared, pagesSame } = sending.engine.stats().base;
    this.#decision = this.#decide(sending, { sampledPages: pagesCompared, samePages: pagesSame, sampleMs });
    this.#report.reason = this.#decision.reason;
    return this.#decision;
  }

  /** Of the base as it is before the log is applied to it. */
  async #makeEstimate(sending: Sending): Promise<CompareDecision> {
    const sampleMs = await this.#compareSample(sending, 'estimate');
    const { pagesEstimated, pagesAlike } = sending.engine.stats().base;
    const sampled = { sampledPages: pagesEstimated, samePages: pagesAlike, sampleMs };
    this.#estimate = this.#decide(sending, sampled);
    return this.#estimate;
  }

  /** Gives ms. */
  async #compareSample({ engine }: Sending, depth: 'sample' | 'estimate'): Promise<number> {
    const nodes = this.pages.reduce((sum, pages) => sum + Math.ceil(pages / nodePages), 0);
    const started = performance.now();
    await untilAborted(engine.compareBase(sampleNodes(nodes), depth), this.signal);
    return performance.now() - started;
  }

  #decide(
    { bytes, pageSize, link }: Sending,
    sampled: Pick<CompareInput, 'sampledPages' | 'samePages' | 'sampleMs'>,
  ): CompareDecision {
    return decideCompare({ bytes, pageSize, linkBytesPerSecond: link, ...sampled });
  }

  async #compare(sending: Sending): Promise<void> {
    const { base } = this.options;
    if (base === 'auto' && (this.#decision ?? (await this.#sample(sending))).action === 'plain') return;
    await untilAborted(sending.engine.compareBase(everyNode, 'all'), this.signal);
    this.#report.used = true;
    this.#report.reason = base === 'always' ? 'always' : 'saves';
  }
}
