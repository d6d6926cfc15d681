/**
 * What a trial is given: a way to report figures, how many samples to take, and floors to run. A trial file in
 * bench/trials/ exports `run`; it is executed by trial-main.ts in a process of its own.
 */
import { type Reach, type Result, type Sample, summarize } from './result.js';

export interface Trial {
  readonly name: string;
  /** The samples a case takes: `usual`, unless the command line asks for another number. */
  samples(usual: number): number;
  report(name: string, unit: string, samples: Sample[], reach: Reach | null, note?: string): void;
  /** A case that cannot be measured on this machine. */
  skip(name: string, why: string): void;
}

export interface TrialModule {
  run(trial: Trial): Promise<void>;
}

export function makeTrial(name: string, samplesAsked: number | null, emit: (result: Result) => void): Trial {
  return {
    name,
    samples: (usual) => samplesAsked ?? usual,
    report: (label, unit, samples, reach, note) => {
      emit(summarize(name, label, unit, samples, reach, note));
    },
    skip: (label, why) => {
      emit({
        trial: name,
        case: label,
        value: null,
        unit: '',
        floor: null,
        ratio: null,
        reach: null,
        reached: null,
        samples: [],
        note: why,
      });
    },
  };
}

/**
 * Takes `count` rounds of the measurements, one after another, each round in the other direction than the one
 * before, so that none always runs on the machine that another left warm. Gives the figures by measurement.
 */
export async function takeTurns(
  count: number,
  measurements: readonly (() => Promise<number> | number)[],
): Promise<number[][]> {
  const figures: number[][] = measurements.map(() => []);
  for (let round = 0; round < count; round++) {
    const turns = [...measurements.keys()];
    if (round % 2 === 1) turns.reverse();
    for (const turn of turns) figures[turn]?.push((await measurements[turn]?.()) as number);
  }
  return figures;
}

/** Figures that were taken in the same rounds, as samples. */
export function paired(values: readonly number[], floors: readonly number[]): Sample[] {
  return values.map((value, i) => ({ value, floor: floors[i] ?? null }));
}

export async function interleave(
  count: number,
  value: () => Promise<number> | number,
  floor: () => Promise<number> | number,
): Promise<Sample[]> {
  const [floors, values] = await takeTurns(count, [floor, value]);
  return paired(values as number[], floors as number[]);
}
