/** What a file in figures/ exports: the figures that come from one session of measurements. */
import type { FigureResult } from './result.js';
import type { Rig } from './rig.js';

export interface FigureModule {
  readonly names: readonly string[];
  /** Measures what of its names is wanted, and gives each result as soon as there is one. */
  run(rig: Rig, wanted: ReadonlySet<string>, emit: (result: FigureResult) => void): Promise<void>;
}
