import { availableParallelism } from 'node:os';
import { defineConfig } from 'vitest/config';

/**
 * Of the tests of migrations those that mostly wait, for a slow link or a process to start, and may wait longer: of time
 * they want no more than that nothing hangs, and they use nothing that there is one of on a machine. Two of these files run
 * at once. A new file is not among them until somebody has looked.
 */
const BESIDE_ANOTHER = [
  'arrival-ends',
  'attach',
  'bad-days-before-grant',
  'bad-days-commit',
  'bad-days-guests',
  'bad-days-hostile',
  'bad-days-postcopy',
  'bad-days-worker',
  'base',
  'combinations',
  'demo-by-hand',
  'encodings',
  'guests-growing',
  'guests-guide',
  'guests-python',
  'guests-shapes',
  'kvm',
  'misuse',
  'modes',
  'modes-more',
  'park',
  'parked-base',
  'references',
  'replay',
  'scatter',
  'scatter-loss',
  'unpark-base',
  'vmd-by-hand',
].map((name) => `test/migration/${name}.test.ts`);

// A process a file (forks): native threads, signal handlers and userfaultfds of one cannot reach another.
const processes = {
  pool: 'forks',
  testTimeout: 120_000,
  hookTimeout: 120_000,
  expect: { poll: { timeout: 15_000 } },
} as const;

// No retries anywhere: a test that fails sometimes has found something.
export default defineConfig({
  test: {
    projects: [
      {
        test: {
          ...processes,
          name: 'unit',
          include: ['test/unit/**/*.test.ts'],
          maxWorkers: Math.max(2, availableParallelism() - 1),
          testTimeout: 20_000,
          hookTimeout: 20_000,
        },
      },
      {
        test: {
          ...processes,
          name: 'migration-beside',
          include: BESIDE_ANOTHER,
          maxWorkers: 2,
          sequence: { groupOrder: 1 },
        },
      },
      {
        test: {
          // Real processes that load the machine and measure time against bounds: one file at a time.
          ...processes,
          name: 'migration',
          include: ['test/migration/**/*.test.ts'],
          exclude: BESIDE_ANOTHER,
          fileParallelism: false,
        },
      },
      {
        test: {
          // Against the installed core: `npm test -- embed` builds what these run.
          ...processes,
          name: 'embed',
          include: ['test/embed/**/*.test.ts'],
          fileParallelism: false,
        },
      },
    ],
  },
});
