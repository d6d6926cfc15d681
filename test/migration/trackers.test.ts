/**
 * Every tracker that works here under whole migrations, with guests that write throughout, and two of them at once: what
 * one tracker resets or stops concerns the whole process. What arrives is compared byte by byte with the journal.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { trackers } from '../../lib/index.js';
import { endHosts } from '../support/host.js';
import {
  expectIntact,
  expectNothingLeft,
  expectOneOwner,
  expectRuns,
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

describe.each(trackers())('$name', ({ name, available, reason }) => {
  const when = available ? test : test.skip;
  when(`two guests leave at once, tracked (${reason || 'works here'})`, async () => {
    const [a, b] = await hosts('a', 'b');
    const beforeA = await inventory(a);
    const port = await listen(b);
    const leaving = [
      { guest: 'one', kind: 'allocate', mode: 'pre-copy' },
      { guest: 'two', kind: 'wasm-shared', mode: 'hybrid' },
    ] as const;
    for (const { guest, kind } of leaving) await startGuest(a, regionsOf(kind), { guest });
    for (const { guest, mode } of leaving)
      await migrate(a, port, { mode, tracker: name }, { key: guest, guest });
    for (const { guest } of leaving) {
      const figures = await report(a, guest);
      expect(figures).toMatchObject({ state: 'completed', verified: true, tracker: name });
      expect((await b.untilArrival(`main/${guest}`, 'complete')).ok).toBe(true);
      await expectRuns(b, guest);
      await expectIntact(a, guest);
      await expectOneOwner([a, b], guest);
    }
    for (const { guest } of leaving) await a.call('end', { guest });
    await expectNothingLeft(a, beforeA);
  });
});
