/**
 * Whether pre-copy goes on, ends, or has no hope: one pure function of the rounds so far. No clock, no I/O.
 *
 * A round sends what was dirty at its start; meanwhile the guest dirties pages again. With a dirty rate below
 * the link's, each round is shorter than the last (geometrically, Clark et al. 2005, section 2.1), until the
 * rest is the writable working set, which no further round makes smaller. That is what `not-shrinking` notices.
 */
import { z } from 'zod';
import type { NonConvergence } from '../options.js';
import { parse } from '../options/fields.js';

/** One finished round. */
export interface RoundSample {
  /** With content. */
  pagesSent: number;
  /** Beside these, as references: their time is in the round's, and they have no bytes on the wire to speak of. */
  pagesDeduplicated: number;
  /** On the wire, headers and all. */
  bytes: number;
  /** How long it took. */
  durationMs: number;
  /** Pages that the guest dirtied meanwhile: the next round's work. */
  dirtyPagesAfter: number;
}

/** What `decideRound` decides by. */
export interface ConvergenceInput {
  /** Oldest first; every round so far. */
  history: readonly RoundSample[];
  /** In bytes. */
  pageSize: number;
  /** As `MigrateOptions.downtimeLimitMs`. */
  downtimeLimitMs: number;
  /** As `MigrateOptions.maxRounds`. */
  maxRounds: number;
  /** Bytes of pages a second, where the caller knows better than the last rounds do. */
  throughputBytesPerSecond?: number | null;
  /** What a switchover costs besides the pages (state, prepare, one round trip), in ms. */
  fixedDowntimeMs?: number;
}

/** What `decideRound` decides, and by which estimates. */
export interface ConvergenceDecision {
  /** `give-up`: no further round helps; `MigrateOptions.onNonConvergence` says what follows. */
  action: 'another-round' | 'switch-over' | 'give-up';
  /** Why. */
  reason: 'first-round' | 'shrinking' | 'converged' | 'max-rounds' | 'not-shrinking';
  /** If the guest were paused now. Infinity while there is nothing to estimate it from. */
  expectedDowntimeMs: number;
  /** In the last round; 0 before there was one. */
  dirtyPagesPerSecond: number;
  /** Of page content, as it was given or over the last three rounds; null while nothing was sent. */
  throughputBytesPerSecond: number | null;
}

/** Rounds without progress before we believe it: one or two may be noise, a burst, or a garbage collection. */
const PATIENCE_ROUNDS = 3;
/** Progress: the best of the last rounds is below this part of the best of all rounds before them. */
const PROGRESS_RATIO = 0.9;
/**
 * A round this much below its predecessor is progress of its own. After a burst the rest is far above what it
 * once was and still falls geometrically: giving up then would be giving up in the middle of a descent.
 */
const DESCENT_RATIO = 0.75;
/** The throughput is averaged over the last rounds: the first is often slower (cold caches, slow start). */
const THROUGHPUT_ROUNDS = 3;

const amount = z.number().nonnegative();
const inputSchema = z.object({
  history: z.array(
    z.object({
      pagesSent: amount,
      pagesDeduplicated: amount,
      bytes: amount,
      durationMs: amount,
      dirtyPagesAfter: amount,
    }),
  ),
  pageSize: z.number().positive(),
  downtimeLimitMs: amount,
  maxRounds: amount,
  throughputBytesPerSecond: amount.nullish(),
  fixedDowntimeMs: amount.optional(),
});

/**
 * Whether pre-copy makes another round, switches over or gives up. Pure, for simulations and glue; a migration uses
 * the same.
 * @throws INVALID_ARGUMENT
 */
export function decideRound(input: ConvergenceInput): ConvergenceDecision {
  parse(inputSchema, input, 'decideRound');
  const { history, pageSize, downtimeLimitMs, maxRounds, fixedDowntimeMs = 0 } = input;
  const throughputBytesPerSecond = input.throughputBytesPerSecond ?? throughputOf(history, pageSize);
  const last = history.at(-1);
  const estimates = {
    expectedDowntimeMs: last
      ? fixedDowntimeMs + transferMs(last.dirtyPagesAfter * pageSize, throughputBytesPerSecond)
      : Number.POSITIVE_INFINITY,
    dirtyPagesPerSecond: last && last.durationMs > 0 ? (last.dirtyPagesAfter * 1000) / last.durationMs : 0,
    throughputBytesPerSecond,
  };
  if (!last) return { action: 'another-round', reason: 'first-round', ...estimates };
  // With nothing dirty left a further round could not change anything, whatever the fixed costs are.
  if (last.dirtyPagesAfter === 0 || estimates.expectedDowntimeMs <= downtimeLimitMs) {
    return { action: 'switch-over', reason: 'converged', ...estimates };
  }
  if (history.length >= maxRounds) return { action: 'give-up', reason: 'max-rounds', ...estimates };
  if (!isShrinking(history)) return { action: 'give-up', reason: 'not-shrinking', ...estimates };
  return { action: 'another-round', reason: 'shrinking', ...estimates };
}

/** What follows a `give-up`, by the caller's option. */
export function applyNonConvergence(choice: NonConvergence): 'switch-over' | 'fail' | 'post-copy' {
  switch (choice) {
    case 'switch-over': // accept the longer downtime
    case 'post-copy': // the guest moves first, the rest follows
    case 'fail': // it stays, and NOT_CONVERGED says why
      return choice;
  }
}

function isShrinking(history: readonly RoundSample[]): boolean {
  const dirty = history.map((round) => round.dirtyPagesAfter);
  const recent = dirty.slice(-PATIENCE_ROUNDS);
  const before = dirty.slice(0, -PATIENCE_ROUNDS);
  if (before.length === 0) return true;
  if (Math.min(...recent) < PROGRESS_RATIO * Math.min(...before)) return true;
  const [previous, last] = dirty.slice(-2) as [number, number];
  return last <= DESCENT_RATIO * previous;
}

/** Bytes of page content a second over the last rounds; null while nothing was sent. */
function throughputOf(history: readonly RoundSample[], pageSize: number): number | null {
  let bytes = 0;
  let milliseconds = 0;
  for (const round of history.slice(-THROUGHPUT_ROUNDS)) {
    // Zero pages cost next to nothing on the wire: counting them as content would promise the impossible for
    // pages that are not zeros. The same with references: the last pages may go without.
    bytes += Math.min(round.bytes, round.pagesSent * pageSize);
    milliseconds += round.durationMs;
  }
  return bytes > 0 && milliseconds > 0 ? (bytes * 1000) / milliseconds : null;
}

function transferMs(bytes: number, bytesPerSecond: number | null): number {
  if (bytes === 0) return 0;
  return bytesPerSecond ? (bytes * 1000) / bytesPerSecond : Number.POSITIVE_INFINITY;
}
