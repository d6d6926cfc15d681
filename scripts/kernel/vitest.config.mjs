/** What vitest.config.ts says, as one project: each is a server of its own, which where instructions are emulated costs much. */
export default {
  test: {
    include: ['test/unit/**/*.test.ts', 'test/migration/**/*.test.ts'],
    pool: 'forks',
    fileParallelism: false,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    cache: false,
  },
};
