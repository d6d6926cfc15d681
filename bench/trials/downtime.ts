/**
 * Downtime of a guest that overwrites pages at 100 MB/s, by size, mode and part. The floor is the bare scan
 * that finds as many dirty pages in as large a region; post-copy has no scan, and a floor of 0.
 */
import { loadAddon } from '../support/addon.js';
import { type MigrationFigures, migrateOnce } from '../support/migrations.js';
import { runFloor } from '../support/processes.js';
import type { Reach } from '../support/result.js';
import { median } from '../support/statistics.js';
import { paired, type Trial } from '../support/trial.js';

const writerBytesPerSecond = 100e6;
const sizes = [
  { name: '256-mib', lengthBytes: 256 * 2 ** 20, samples: 7 },
  { name: '1-gib', lengthBytes: 2 ** 30, samples: 7 },
  { name: '4-gib', lengthBytes: 4 * 2 ** 30, samples: 3 },
];
const parts = ['scanMs', 'transferMs', 'stateMs', 'prepareMs', 'commitMs'] as const;

const belowFive: Reach = { words: 'below 5 ms', met: ({ value }) => value < 5 };
const nearScan: Reach = {
  words: 'at most 3 ms over the bare final scan',
  met: ({ value, floor }) => value <= (floor ?? 0) + 3,
};

/** Pages that a writer at this rate has dirtied by the final scan, at most: those of the last round. */
function dirtyPages({ report }: MigrationFigures, pageSize: number): number {
  const last = report.rounds.at(-1);
  if (last === undefined) return 0;
  const written = (last.durationMs / 1000) * (writerBytesPerSecond / pageSize);
  return Math.min(Math.round(written), report.heapBytes / pageSize);
}

export async function run(trial: Trial): Promise<void> {
  const { pageSize } = loadAddon();
  for (const { name, lengthBytes, samples } of sizes) {
    for (const mode of ['hybrid', 'post-copy'] as const) {
      const taken: MigrationFigures[] = [];
      const floors: number[] = [];
      for (let round = trial.samples(samples); round > 0; round--) {
        const figures = await migrateOnce({ lengthBytes, writerBytesPerSecond, mode });
        taken.push(figures);
        if (mode === 'post-copy') {
          floors.push(0);
          continue;
        }
        const args = ['--bytes', lengthBytes, '--dirty', dirtyPages(figures, pageSize), '--scans', 3];
        floors.push(median((await runFloor<{ scanMs: number[] }>('scan_floor', args)).scanMs));
      }
      trial.report(
        `${mode}-${name}`,
        'ms',
        paired(
          taken.map(({ report }) => report.downtimeMs),
          floors,
        ),
        lengthBytes === 2 ** 30 ? belowFive : nearScan,
      );
      for (const part of parts) {
        const figures = taken.map(({ report }) => report.downtimeParts[part]);
        trial.report(`${mode}-${name}-${part.slice(0, -2)}`, 'ms', paired(figures, []), null);
      }
    }
  }
}
