/**
 * Every mode, with a guest that writes throughout. What arrives is compared byte by byte with what the journal
 * of writes says, and the guest goes on writing at the destination while its pages are still on their way.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts } from '../support/host.js';
import {
  expectIntact,
  expectNothingLeft,
  expectOneOwner,
  expectRuns,
  expectStands,
  hosts,
  inventory,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';

afterEach(async () => {
  await endHosts();
});

const kinds = ['allocate', 'shared', 'wasm', 'wasm-shared'] as const;
const modes = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const;

describe.each(modes)('%s', (mode) => {
  test.each([1, 2, 4])('over %i channels, memory of every kind', async (channels) => {
    const [a, b] = await hosts('a', 'b');
    const beforeA = await inventory(a);
    const beforeB = await inventory(b);
    const port = await listen(b);
    for (const kind of kinds) {
      await startGuest(a, regionsOf(kind), { guest: kind });
      await migrate(a, port, { mode, channels }, { key: kind, guest: kind });
      const figures = await report(a, kind);
      expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
      expect(figures.switchedToPostCopy).toBe(mode === 'post-copy' || mode === 'hybrid');
      expect(figures.pagesZero).toBeGreaterThan(0);
      expect((await b.untilArrival(`main/${kind}`, 'complete')).ok).toBe(true);
      await expectRuns(b, kind);
      await expectIntact(a, kind);
      await expectStands(a, kind);
      await expectOneOwner([a, b], kind);
      expect(a.steps(kind)).toEqual(['pause', 'paused', 'departed', 'release']);
      expect(b.steps(kind)).toEqual(['prepare', 'prepared', 'resume']);
      await a.call('end', { guest: kind });
    }
    for (const kind of kinds) await b.call('end', { guest: kind });
    await b.call('closeListener');
    await expectNothingLeft(a, beforeA);
    await expectNothingLeft(b, beforeB);
  });
});
