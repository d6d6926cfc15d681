/**
 * The one form of every figure: a JSON object a line. `value` and `floor` are medians over `samples`; `ratio`
 * is value to floor, whichever of the two is better when larger; `reach` is the target in words, `reached`
 * whether it was met, both null where there is none.
 */
import { median } from './statistics.js';

export interface Sample {
  value: number;
  /** Taken right before or after `value`; null where there is no floor. */
  floor: number | null;
}

export interface Result {
  trial: string;
  case: string;
  /** null: could not be measured here; `note` says why. */
  value: number | null;
  unit: string;
  floor: number | null;
  ratio: number | null;
  reach: string | null;
  reached: boolean | null;
  samples: Sample[];
  note?: string;
}

export interface Medians {
  value: number;
  floor: number | null;
  ratio: number | null;
}

export interface Reach {
  words: string;
  met(medians: Medians): boolean;
}

export function summarize(
  trial: string,
  name: string,
  unit: string,
  samples: Sample[],
  reach: Reach | null,
  note?: string,
): Result {
  const floors = samples.flatMap((sample) => (sample.floor === null ? [] : [sample.floor]));
  const value = median(samples.map((sample) => sample.value));
  const floor = floors.length > 0 ? median(floors) : null;
  const ratio = floor !== null && floor !== 0 ? value / floor : null;
  return {
    trial,
    case: name,
    value,
    unit,
    floor,
    ratio,
    reach: reach?.words ?? null,
    reached: reach === null ? null : reach.met({ value, floor, ratio }),
    samples,
    ...(note === undefined ? {} : { note }),
  };
}

/** For figures that are better when small (latencies, times). */
export function atMostTimesFloor(factor: number, of: string): Reach {
  return {
    words: `at most ${factor} of ${of}`,
    met: ({ ratio }) => ratio !== null && ratio <= factor,
  };
}

/** For figures that are better when small, without a floor. */
export function atMost(limit: number, unit: string): Reach {
  return { words: `at most ${limit} ${unit}`, met: ({ value }) => value <= limit };
}

/** For figures that are better when large (rates). */
export function atLeastTimesFloor(factor: number, of: string): Reach {
  return {
    words: `at least ${factor} of ${of}`,
    met: ({ ratio }) => ratio !== null && ratio >= factor,
  };
}

/** The same, without a floor. */
export function atLeast(limit: number, unit: string): Reach {
  return { words: `at least ${limit} ${unit}`, met: ({ value }) => value >= limit };
}
