/** Every tracker that this kernel has, in real migrations; and that one is chosen by itself which works here. */
import { afterEach, describe, expect, test } from 'vitest';
import { trackers } from '../../src/trackers.js';
import { endHosts } from '../support/host.js';
import {
  expectOneOwner,
  expectRuns,
  hosts,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';

afterEach(async () => {
  await endHosts();
});

const probes = trackers();
const busy = { batch: 64, restMs: 1 };

describe.each(probes)('the tracker $name', ({ name: tracker, available, reason }) => {
  const migration = available
    ? test
    : (name: string, _body: () => unknown) => test.skip(`${name} (${reason})`, () => {});
  for (const mode of ['pre-copy', 'hybrid']) {
    migration(`in ${mode}`, async () => {
      const [a, b] = await hosts('a', 'b');
      const port = await listen(b);
      for (const kind of ['allocate', 'wasm'] as const) {
        await startGuest(a, regionsOf(kind), { guest: kind, rate: busy });
        await migrate(a, port, { mode, tracker, maxRounds: 4 }, { key: kind, guest: kind });
        expect(await report(a, kind)).toMatchObject({ tracker, verified: true });
        await expectRuns(b, kind);
        await expectOneOwner([a, b], kind);
      }
    });
  }
});

test('without a choice it is the first that works here', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'), { rate: busy });
  await migrate(a, port, { mode: 'pre-copy', maxRounds: 4 });
  const first = probes.find(({ available }) => available)?.name;
  expect(await report(a)).toMatchObject({ tracker: first, verified: true });
  await expectRuns(b);
});
