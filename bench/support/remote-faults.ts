/** What `fault`, `fault-lab` and `scatter` share: a post-copy pair after its switchover, touched and pushed. */
import type { TouchFigures, TouchParameters } from './engine-destination.js';
import { EnginePair, type PairOptions } from './engine-pair.js';
import { quantile } from './statistics.js';

/** What a fault floor prints. */
export interface FaultFloor {
  p50Us: number;
  p99Us: number;
  pagesPerSecond: number;
}

/** Well above a read of a present page, well below any remote fault. */
const faultThresholdUs = 4;

/** Several times what any push takes; one that hangs ends its trial. */
const pushTimeoutMs = 60_000;

export async function postCopyPair(lengthBytes: number, options: PairOptions): Promise<EnginePair> {
  const pair = new EnginePair(options);
  try {
    await Promise.all([
      pair.source.call('allocate', { lengthBytes, seed: 1 }),
      pair.destination.call('allocate', { lengthBytes, touched: false }),
    ]);
    await pair.connect({ pagingFromStart: true, mayPage: true, discardFirst: true });
    await pair.source.call('switchOver');
    return pair;
  } catch (error) {
    await pair.stop();
    throw error;
  }
}

export type Touching = Pick<TouchParameters, 'order' | 'touches' | 'everyMs' | 'skip' | 'untilTold'>;

export function touch(pair: EnginePair, touching: Touching): Promise<TouchFigures> {
  const parameters = { ...touching, seed: 3, faultThresholdUs };
  return pair.destination.call<TouchFigures>('touch', parameters, pushTimeoutMs);
}

export async function touchIdle(
  lengthBytes: number,
  options: PairOptions,
  touching: Touching,
): Promise<TouchFigures> {
  const pair = await postCopyPair(lengthBytes, options);
  try {
    return await touch(pair, touching);
  } finally {
    await pair.stop();
  }
}

export interface PushFigures {
  /** From the push's start until every page was acknowledged. */
  milliseconds: number;
  /** Pages that were asked for rather than pushed. */
  pagesAsked: number;
  /** Empty where nobody touched. */
  latenciesUs: Float64Array;
}

/** A full push, with or without somebody who touches pages meanwhile; every byte is compared afterwards. */
export async function pushAll(
  lengthBytes: number,
  options: PairOptions,
  touching: Touching | null,
): Promise<PushFigures> {
  const pair = await postCopyPair(lengthBytes, options);
  try {
    await pair.source.call('startPush');
    const touched = touching === null ? null : touch(pair, touching);
    const [milliseconds, faults] = await Promise.all([
      pair.source.call<number>('evicted', null, pushTimeoutMs),
      touched,
    ]);
    await pair.compare();
    const { faults: seen } = await pair.destination.call<{ faults: { count: number } }>('stats');
    return { milliseconds, pagesAsked: seen.count, latenciesUs: faults?.latenciesUs ?? new Float64Array(0) };
  } finally {
    await pair.stop();
  }
}

export function latency(figures: { latenciesUs: Float64Array }, q: number): number {
  return quantile(figures.latenciesUs, q);
}
