/** What a figure gives: points, the reaches checked on them, charts, and the paper's own numbers beside them. */
import { median } from '../support/statistics.js';
import type { Chart } from './chart.js';

export interface Point {
  /** A mode, and what distinguishes it from others of the same. */
  series: string;
  /** 'eviction', 'total', 'latency', … */
  measure: string;
  x: string | number;
  unit: string;
  /** The median of the samples; null: not available, `note` says why. */
  value: number | null;
  /** For times: how many line times `value` is. */
  lineTimes: number | null;
  samples: number[];
  note?: string;
}

export interface Check {
  what: string;
  reach: string;
  value: number | null;
  /** null: could not be checked. */
  reached: boolean | null;
}

export interface PaperNumber {
  what: string;
  value: number;
  unit: string;
  /** Section or table. */
  where: string;
  /** `given` in the text, `derived` from what is given, `described` in words only. */
  how: 'given' | 'derived' | 'described';
}

export interface FigureResult {
  /** As the command line names it. */
  figure: string;
  title: string;
  /** What the x of the points is. */
  xName: string;
  /** Sizes, trials, rates: what the figures hold for. */
  setting: Record<string, string | number>;
  points: Point[];
  checks: Check[];
  charts: Chart[];
  paper: PaperNumber[];
  notes: string[];
}

/** Samples by series, measure and x, in the order in which they first came. */
export class Samples {
  readonly #cells = new Map<
    string,
    { key: [string, string, string | number]; unit: string; samples: number[] }
  >();

  add(series: string, measure: string, x: string | number, unit: string, value: number): void {
    const name = JSON.stringify([series, measure, x]);
    const cell = this.#cells.get(name) ?? { key: [series, measure, x], unit, samples: [] };
    cell.samples.push(value);
    this.#cells.set(name, cell);
  }

  median(series: string, measure: string, x: string | number): number | null {
    const samples = this.#cells.get(JSON.stringify([series, measure, x]))?.samples ?? [];
    return samples.length > 0 ? median(samples) : null;
  }

  /** `lineSeconds`: the line time of a point that is a time; null where it has none. */
  points(lineSeconds: (x: string | number, measure: string) => number | null): Point[] {
    return [...this.#cells.values()].map(({ key: [series, measure, x], unit, samples }) => {
      const value = median(samples);
      const line = unit === 's' ? lineSeconds(x, measure) : null;
      return { series, measure, x, unit, value, lineTimes: line === null ? null : value / line, samples };
    });
  }
}

export function unavailable(series: string, measure: string, x: string | number, note: string): Point {
  return { series, measure, x, unit: 's', value: null, lineTimes: null, samples: [], note };
}

export function atMost(what: string, value: number | null, limit: number, of: string): Check {
  return {
    what,
    reach: `at most ${limit} of ${of}`,
    value,
    reached: value === null ? null : value <= limit,
  };
}

export function atLeast(what: string, value: number | null, limit: number, of: string): Check {
  return {
    what,
    reach: `at least ${limit} of ${of}`,
    value,
    reached: value === null ? null : value >= limit,
  };
}

export function quotient(a: number | null, b: number | null): number | null {
  return a === null || b === null ? null : a / b;
}
