import { defineConfig } from 'vitest/config';

// A process a file (forks): native threads, signal handlers and userfaultfds of one cannot reach another.
// No retries anywhere: a test that fails sometimes has found something.
export default defineConfig({
  test: {
    projects: [
      {
        test: {
          name: 'unit',
          include: ['test/unit/**/*.test.ts'],
          pool: 'forks',
          testTimeout: 20_000,
          hookTimeout: 20_000,
          expect: { poll: { timeout: 15_000 } },
        },
      },
      {
        test: {
          // Real processes that load the machine and measure time against bounds: one file at a time.
          name: 'migration',
          include: ['test/migration/**/*.test.ts'],
          pool: 'forks',
          fileParallelism: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
          expect: { poll: { timeout: 15_000 } },
        },
      },
      {
        test: {
          // Against the installed core: `npm test -- embed` builds what these run.
          name: 'embed',
          include: ['test/embed/**/*.test.ts'],
          pool: 'forks',
          fileParallelism: false,
          testTimeout: 60_000,
          hookTimeout: 60_000,
          expect: { poll: { timeout: 15_000 } },
        },
      },
    ],
  },
});
