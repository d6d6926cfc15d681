/**
 * Pre-copy rounds (Clark et al. 2005): copy everything while the guest runs, then again what it has written
 * since, until the rest is small enough, or there is no hope that it will be. The decision after each round
 * is convergence.ts's; this file carries it out.
 */
import { MemferryError } from '../errors.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { untilAborted } from '../protocol/bounded.js';
import type { Deferred } from '../protocol/deferred.js';
import { traitsOf } from '../protocol/mode-traits.js';
import type { Region } from '../region.js';
import type { DirtyTracker } from '../trackers.js';
import { applyNonConvergence, decideRound, type RoundSample } from './convergence.js';
import type { SourceEngine } from './engine.js';
import { worthWaitingFor } from './gather-wait.js';
import type { Measurements } from './measurements.js';

export interface PreCopyContext {
  engine: SourceEngine;
  trackers: readonly (DirtyTracker | null)[];
  regions: readonly Region[];
  options: ResolvedMigrateOptions;
  measured: Measurements;
  signal: AbortSignal;
  switchoverAsked: Deferred<void>;
  /** Tells the destination of memory that has grown; before each round. */
  followGrowth(): Promise<void>;
  /**
   * Resolves when the destination has all that it is to have before it takes over, or gets no more of it. After rounds
   * in which pages went as references, which it has to gather from servers at its own pace.
   */
  gathered(suspectPages: number): Promise<void>;
  /** Once, before the first round, when every page is pending and the trackers are armed. */
  startFromBase(): Promise<void>;
  /** The rounds could end here; the switchover is only held back by the caller's wish. */
  converged(): void;
}

/** How long a held switchover rests between rounds: long enough not to saturate a link for nothing. */
const heldRestMs = 50;
/** A list that the destination drops in a fraction of a millisecond. */
const fewPages = 64;
/** A guest that writes faster than lists travel would keep the passes going for ever. */
const maxDiscardPasses = 4;

/** Gives how the migration goes on. Rejects with NOT_CONVERGED by option, CANCELLED, or the engine's failure. */
export async function preCopy(context: PreCopyContext): Promise<'pre-copy' | 'post-copy'> {
  const { engine, options, measured, signal } = context;
  const hybrid = traitsOf(options.mode).boundedRounds;
  const pageSize = context.regions[0]?.pageSize ?? 4096;
  const history: RoundSample[] = [];
  for (const tracker of context.trackers) tracker?.arm();
  await untilAborted(engine.queuePopulated(), signal);
  await context.startFromBase();

  for (;;) {
    measured.roundUnderWay++;
    await context.followGrowth();
    const before = engine.stats();
    const started = performance.now();
    const suspectPages = await untilAborted(engine.round(), signal);
    const after = engine.stats();
    const pagesDeduplicated = (after.dedup?.pages ?? 0) - (before.dedup?.pages ?? 0);
    // The guest would stand still for it otherwise.
    if (worthWaitingFor(after.dedup?.pages ?? 0, after.pagesSent)) await context.gathered(suspectPages);
    const durationMs = performance.now() - started;
    const dirtyPagesAfter = await untilAborted(engine.queueDirty(), signal);
    const asked = context.switchoverAsked.settled;
    const sample: RoundSample = {
      pagesSent: after.pagesSent - before.pagesSent,
      pagesDeduplicated,
      bytes: after.bytesOnWire - before.bytesOnWire,
      durationMs,
      dirtyPagesAfter,
    };
    // Of bytes on the wire: the last pages may be those that cannot be packed.
    history.push(sample);
    measured.rounds.push({ round: history.length, ...sample, suspectPages });

    const decision = decideRound({
      history,
      pageSize,
      downtimeLimitMs: options.downtimeLimitMs,
      maxRounds: hybrid ? options.hybridRounds : options.maxRounds,
      // Rounds of references say little of what sending pages takes.
      throughputBytesPerSecond: after.dedup?.pages ? after.dedup.linkBytesPerSecond : null,
    });
    measured.expectedDowntimeMs = decision.expectedDowntimeMs;
    measured.dirtyPagesPerSecond = decision.dirtyPagesPerSecond;
    if (decision.action === 'another-round' && !asked) continue;

    let outcome: 'pre-copy' | 'post-copy' = hybrid ? 'post-copy' : 'pre-copy';
    if (decision.action === 'give-up' && !asked && !hybrid) {
      const choice = applyNonConvergence(options.onNonConvergence);
      if (choice === 'fail') {
        throw new MemferryError(
          'NOT_CONVERGED',
          `the rounds do not converge (${decision.reason}): a switchover now would take about ` +
            `${Math.round(decision.expectedDowntimeMs)} ms`,
          { facts: { rounds: history.length, expectedDowntimeMs: decision.expectedDowntimeMs } },
        );
      }
      if (choice === 'post-copy') outcome = 'post-copy';
    }
    if (options.holdSwitchover && !asked) {
      context.converged();
      const rest = new Promise((resolve) => setTimeout(resolve, heldRestMs));
      await untilAborted(Promise.race([context.switchoverAsked.promise, rest]), signal);
      if (!context.switchoverAsked.settled) continue;
    } else {
      context.converged();
    }
    if (outcome === 'post-copy') await discardWhileRunning(engine, signal);
    return outcome;
  }
}

/**
 * Before post-copy the destination must forget every page that is dirty here. Nearly all of that is done while
 * the guest still runs, in passes that each leave only what was written during the last one, so that the pause
 * drops a handful.
 */
export async function discardWhileRunning(engine: SourceEngine, signal: AbortSignal): Promise<void> {
  for (let pass = 0; pass < maxDiscardPasses; pass++) {
    const pages = await untilAborted(engine.discardDirty(), signal);
    if (pass > 0 && pages <= fewPages) return;
  }
}
