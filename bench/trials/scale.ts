/**
 * Hybrid migrations of 1 to 8 GiB whose guest writes at 100 MB/s: time a GiB against 1 GiB's, and what each
 * side held at its peak beyond the region and an idle process.
 */
import { loadAddon } from '../support/addon.js';
import { type MigrationFigures, migrateOnce } from '../support/migrations.js';
import { atMostTimesFloor } from '../support/result.js';
import { paired, type Trial } from '../support/trial.js';

const gib = 2 ** 30;
const mib = 2 ** 20;
const writerBytesPerSecond = 100e6;
const gibibytes = [1, 2, 4, 8];

export async function run(trial: Trial): Promise<void> {
  const { pageSize } = loadAddon();
  const taken = new Map<number, MigrationFigures[]>(gibibytes.map((size) => [size, []]));
  for (let round = trial.samples(3); round > 0; round--) {
    for (const size of gibibytes) {
      const figures = await migrateOnce({ lengthBytes: size * gib, writerBytesPerSecond, mode: 'hybrid' });
      taken.get(size)?.push(figures);
    }
  }
  const times = (size: number): number[] =>
    (taken.get(size) ?? []).map(({ report }) => report.totalMs / size);
  for (const size of gibibytes) {
    const reach = size === 1 ? null : atMostTimesFloor(1.15, "1 GiB's");
    trial.report(`time-a-gib-at-${size}-gib`, 'ms', paired(times(size), size === 1 ? [] : times(1)), reach);
    const allowed = 64 + (8 * size * gib) / pageSize / mib;
    for (const side of ['source', 'destination'] as const) {
      const figures = (taken.get(size) ?? []).map(({ extraBytes }) => extraBytes[side] / mib);
      trial.report(`extra-memory-${side}-${size}-gib`, 'MiB', paired(figures, []), {
        words: `at most ${allowed} MiB: 64 and 8 bytes a page`,
        met: ({ value }) => value <= allowed,
      });
    }
  }
}
