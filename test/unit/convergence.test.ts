/** The decision after each pre-copy round, on synthetic guests whose right answer is known. */
import { describe, expect, it } from 'vitest';
import {
  applyNonConvergence,
  type ConvergenceDecision,
  type ConvergenceInput,
  decideRound,
  type RoundSample,
} from '../../src/source/convergence.js';

const pageSize = 4096;
const GIB = 2 ** 30;
const linkBytesPerSecond = 100e6;

interface Guest {
  regionPages: number;
  /** Pages dirtied within `ms`, in round `round` (0 is the first, full one). */
  dirtied(ms: number, round: number): number;
}

/** Runs rounds over a link of 100 MB/s until the decision is something else than another one. */
function migrate(
  guest: Guest,
  options: Partial<ConvergenceInput> = {},
): { rounds: RoundSample[]; end: ConvergenceDecision } {
  const history: RoundSample[] = [];
  let pages = guest.regionPages;
  for (;;) {
    const end = decideRound({ history, pageSize, downtimeLimitMs: 300, maxRounds: 1000, ...options });
    if (end.action !== 'another-round') return { rounds: history, end };
    if (history.length > 1000) throw new Error('never ends');
    const bytes = pages * pageSize;
    const durationMs = (bytes / linkBytesPerSecond) * 1000;
    const dirtyPagesAfter = Math.min(
      guest.regionPages,
      Math.round(guest.dirtied(durationMs, history.length)),
    );
    history.push({ pagesSent: pages, pagesDeduplicated: 0, bytes, durationMs, dirtyPagesAfter });
    pages = dirtyPagesAfter;
  }
}

const pagesAt = (bytesPerSecond: number, ms: number) => (bytesPerSecond * ms) / 1000 / pageSize;

/** Repeatable noise in [-1, 1). */
function noise(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 31 - 1;
  };
}

describe('decideRound', () => {
  it('starts with a round', () => {
    const decision = decideRound({ history: [], pageSize, downtimeLimitMs: 300, maxRounds: 30 });
    expect(decision).toMatchObject({
      action: 'another-round',
      reason: 'first-round',
      dirtyPagesPerSecond: 0,
    });
    expect(decision.expectedDowntimeMs).toBe(Number.POSITIVE_INFINITY);
  });

  it('switches over at once when nothing was written', () => {
    const { rounds, end } = migrate(
      { regionPages: GIB / pageSize, dirtied: () => 0 },
      { downtimeLimitMs: 1, fixedDowntimeMs: 5 },
    );
    expect(rounds).toHaveLength(1);
    expect(end).toMatchObject({ action: 'switch-over', reason: 'converged', expectedDowntimeMs: 5 });
  });

  for (const part of [0.1, 0.3, 0.5, 0.7, 0.85]) {
    it(`converges when the dirty rate is ${part} of the link`, () => {
      const { rounds, end } = migrate({
        regionPages: GIB / pageSize,
        dirtied: (ms) => pagesAt(part * linkBytesPerSecond, ms),
      });
      expect(end).toMatchObject({ action: 'switch-over', reason: 'converged' });
      expect(end.expectedDowntimeMs).toBeLessThanOrEqual(300);
      // The series is geometric: round k leaves GiB * part^k, and 300 ms are 30 MB.
      expect(rounds).toHaveLength(Math.ceil(Math.log(30e6 / GIB) / Math.log(part)));
    });
  }

  for (const part of [1, 1.5, 10]) {
    it(`gives up when the dirty rate is ${part} times the link`, () => {
      const { rounds, end } = migrate({
        regionPages: GIB / pageSize,
        dirtied: (ms) => pagesAt(part * linkBytesPerSecond, ms),
      });
      expect(end).toMatchObject({ action: 'give-up', reason: 'not-shrinking' });
      expect(rounds.length).toBeLessThanOrEqual(4);
      expect(end.dirtyPagesPerSecond * pageSize).toBeGreaterThan(0.9 * linkBytesPerSecond);
    });
  }

  it('gives up on a plateau: the writable working set', () => {
    // 64 MiB that are all written within any round, far more than 300 ms worth.
    const { rounds, end } = migrate({
      regionPages: GIB / pageSize,
      dirtied: () => (64 * 2 ** 20) / pageSize,
    });
    expect(end).toMatchObject({ action: 'give-up', reason: 'not-shrinking' });
    expect(rounds).toHaveLength(4);
    expect(end.expectedDowntimeMs).toBeCloseTo((64 * 2 ** 20 * 1000) / linkBytesPerSecond, 3);
  });

  for (let seed = 1; seed <= 20; seed++) {
    it(`gives up on a noisy plateau before long (seed ${seed})`, () => {
      const random = noise(seed);
      const { rounds, end } = migrate({
        regionPages: GIB / pageSize,
        dirtied: () => 16384 * (1 + 0.1 * random()),
      });
      expect(end).toMatchObject({ action: 'give-up', reason: 'not-shrinking' });
      expect(rounds.length).toBeLessThanOrEqual(8);
    });

    it(`is not thrown off by noise while the rounds shrink (seed ${seed})`, () => {
      const random = noise(seed);
      const { end } = migrate({
        regionPages: GIB / pageSize,
        dirtied: (ms) => pagesAt(0.7 * linkBytesPerSecond, ms) * (1 + 0.2 * random()),
      });
      expect(end.reason).toBe('converged');
    });
  }

  it('outlasts a burst in the middle of a descent', () => {
    const { rounds, end } = migrate({
      regionPages: GIB / pageSize,
      dirtied: (ms, round) => (round === 3 ? 200_000 : pagesAt(0.5 * linkBytesPerSecond, ms)),
    });
    expect(end.reason).toBe('converged');
    expect(rounds.length).toBeGreaterThan(6);
  });

  it('does not go on for ever with a guest that swings', () => {
    const { end } = migrate({
      regionPages: GIB / pageSize,
      dirtied: (_ms, round) => (round % 2 === 0 ? 100_000 : 40_000),
    });
    expect(end).toMatchObject({ action: 'give-up', reason: 'not-shrinking' });
  });

  it('gives up after maxRounds, but not when the last one converged', () => {
    const slow: Guest = {
      regionPages: GIB / pageSize,
      dirtied: (ms) => pagesAt(0.8 * linkBytesPerSecond, ms),
    };
    const { rounds, end } = migrate(slow, { maxRounds: 5 });
    expect(rounds).toHaveLength(5);
    expect(end).toMatchObject({ action: 'give-up', reason: 'max-rounds' });
    const quick = migrate({ regionPages: 1000, dirtied: () => 0 }, { maxRounds: 1 });
    expect(quick.end.reason).toBe('converged');
  });

  it('counts the fixed cost and a throughput that the caller knows', () => {
    const history = [
      { pagesSent: 1000, pagesDeduplicated: 0, bytes: 4096e3, durationMs: 40.96, dirtyPagesAfter: 1000 },
    ];
    const base = { history, pageSize, downtimeLimitMs: 45, maxRounds: 30 };
    expect(decideRound(base)).toMatchObject({ action: 'switch-over' });
    expect(decideRound(base).expectedDowntimeMs).toBeCloseTo(40.96, 6);
    expect(decideRound({ ...base, fixedDowntimeMs: 5 })).toMatchObject({ action: 'another-round' });
    const halved = decideRound({ ...base, throughputBytesPerSecond: 50e6 });
    expect(halved.action).toBe('another-round');
    expect(halved.expectedDowntimeMs).toBeCloseTo(81.92, 6);
  });

  it('promises nothing from references, unless the link is known', () => {
    const references = {
      pagesSent: 0,
      pagesDeduplicated: 10_000,
      bytes: 400_000,
      durationMs: 100,
      dirtyPagesAfter: 1000,
    };
    const base = { history: [references], pageSize, downtimeLimitMs: 20, maxRounds: 30 };
    expect(decideRound(base)).toMatchObject({ action: 'another-round', throughputBytesPerSecond: null });
    const half = { ...references, pagesSent: 1000, bytes: 4096e3 + 400_000 };
    expect(decideRound({ ...base, history: [half] }).throughputBytesPerSecond).toBeCloseTo(40.96e6, 0);
    // What the last pages take is another matter.
    const known = decideRound({ ...base, throughputBytesPerSecond: 100e6 });
    expect(known.action).toBe('another-round');
    expect(known.expectedDowntimeMs).toBeCloseTo(40.96, 6);
  });

  it('promises nothing from rounds in which only zeros went out', () => {
    const zeros = { pagesSent: 262144, pagesDeduplicated: 0, bytes: 0, durationMs: 10, dirtyPagesAfter: 10 };
    const decision = decideRound({ history: [zeros], pageSize, downtimeLimitMs: 300, maxRounds: 30 });
    expect(decision).toMatchObject({ action: 'another-round', throughputBytesPerSecond: null });
    expect(decision.expectedDowntimeMs).toBe(Number.POSITIVE_INFINITY);
  });

  it('takes any page size', () => {
    const round = {
      pagesSent: 64,
      pagesDeduplicated: 0,
      bytes: 64 * 65536,
      durationMs: 42,
      dirtyPagesAfter: 32,
    };
    const decision = decideRound({ history: [round], pageSize: 65536, downtimeLimitMs: 22, maxRounds: 30 });
    expect(decision.action).toBe('switch-over');
    expect(decision.expectedDowntimeMs).toBeCloseTo(21, 6);
  });
});

it('applies the option for rounds without hope', () => {
  expect((['switch-over', 'fail', 'post-copy'] as const).map(applyNonConvergence)).toEqual([
    'switch-over',
    'fail',
    'post-copy',
  ]);
});
