/**
 * Guests whose memory is reserved huge pages of other processes, at both ends: every mode, every byte compared with what
 * the source's owner had when it was paused; owners that are killed in the middle; what is lost is never zeros.
 */
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import type { MemferryError, Region } from '../../lib/index.js';
import { modes } from '../../lib/options/migrate.js';
import {
  closeAll,
  destination,
  expectArrives,
  expectSame,
  move,
  pages,
  resumed,
  type Source,
  servers,
  source,
  tracked,
} from '../support/attached-guests.js';
import { HugePagePool } from '../support/huge-pages.js';
import { buildOwner, features, removeOwner } from '../support/memory-owner.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const UNIT = 512;
/** Three owners' worth. */
const WANTED = (3 * pages) / UNIT;
const huge = { shared: true, huge: true };

const pool = new HugePagePool();
let why: string | null = null;

beforeAll(() => {
  why = pool.reserve(WANTED);
  buildOwner();
});
beforeEach((context) => {
  if (why) context.skip(why);
});
afterEach(async () => {
  await closeProxies();
  await closeAll();
});
afterAll(() => {
  pool.restore();
  removeOwner();
});

describe.each([
  ['huge to huge', huge, huge, modes],
  ['ordinary to huge', { shared: true }, huge, ['pre-copy', 'hybrid', 'scatter'] as const],
  ['private to huge', { shared: false }, huge, ['hybrid'] as const],
  ['huge to ordinary', huge, { shared: true }, ['pre-copy', 'hybrid', 'scatter'] as const],
] as const)('%s', (_name, here, there, each) => {
  test.each(each)('%s', async (mode) => {
    const from = await source(here);
    const to = await destination({ ...there, features: features.missingShmem | features.eventRemove });
    const via = mode.startsWith('scatter') ? await servers(2) : [];
    const migration = await move(from, to, { mode, via, maxRounds: 4 });
    await expectArrives(from, to, migration);
  });
});

test.each(['uffd-wp-async', 'hash-diff'] as const)('tracked by %s while it writes', async (tracker) => {
  const from = await source(huge);
  const to = await destination(huge);
  const migration = await move(from, to, { mode: 'pre-copy', tracker, maxRounds: 5 });
  await resumed(to, migration);
  await expectSame(from, to);
  expect(await migration.done).toMatchObject({ tracker, verified: true });
});

test('it arrives, and moves on from there', async () => {
  const from = await source(huge);
  const to = await destination({ ...huge, features: tracked });
  await (await move(from, to, { mode: 'post-copy' })).done;
  await (await to.arrival).complete;
  const region = to.region() as Region;
  await to.owner.ask('run 9');
  const second: Source = { ...from, owner: to.owner, region, paused: null };
  second.guest = {
    name: 'g',
    regions: [{ name: 'ram', region }],
    module: null,
    async pause() {
      await to.owner.ask('stop');
      second.paused = await to.owner.content();
      return new Uint8Array();
    },
    unpause() {},
  };
  from.region.close();
  from.owner.free();
  const further = await destination(huge);
  const migration = await move(second, further, { mode: 'hybrid' });
  await further.resumed;
  await expectSame(second, further);
  expect((await migration.done).verified).toBe(true);
});

describe('owners that are killed', () => {
  test("the source's, in the rounds: it fails at once", async () => {
    const from = await source(huge);
    const to = await destination(huge);
    const migration = await move(from, to, { mode: 'pre-copy', bandwidth: 2 * 2 ** 20 });
    await to.arrival;
    from.owner.child.kill('SIGKILL');
    await expect(migration.done).rejects.toMatchObject({ code: 'OWNER_GONE' });
    await to.abandoned;
  });

  test("the source's, after the switch: its file lives on, and all of it arrives", async () => {
    const from = await source(huge);
    const to = await destination(huge);
    const migration = await move(from, to, { mode: 'post-copy', bandwidth: 4 * 2 ** 20, verify: false });
    await resumed(to, migration);
    from.owner.child.kill('SIGKILL');
    await expectSame(from, to);
    await (await to.arrival).complete;
  });

  test.each(['hybrid', 'scatter'] as const)(
    "the destination's, with pages on their way: %s",
    async (mode) => {
      const from = await source(huge);
      const to = await destination(huge);
      const via = mode === 'scatter' ? await servers(1) : [];
      const bounds = { bandwidth: 4 * 2 ** 20, recoverTimeoutMs: 1500 };
      const migration = await move(from, to, { mode, via, maxRounds: 1, ...bounds });
      await resumed(to, migration);
      const arrival = await to.arrival;
      const failed = expect(arrival.complete).rejects.toMatchObject({ code: 'OWNER_GONE' });
      to.owner.child.kill('SIGKILL');
      await failed;
      await Promise.allSettled([migration.done]);
    },
  );
});

test('what is lost takes whole huge pages with it, and is never zeros', async () => {
  const from = await source(huge);
  const to = await destination(huge, { recoverTimeoutMs: 1500 });
  const proxy = await TcpProxy.start(to.port);
  const point = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 20 }, 'hold');
  const migration = await move(
    from,
    { ...to, port: proxy.port },
    { mode: 'post-copy', recoverTimeoutMs: 1500 },
  );
  await to.resumed;
  await point.reached;
  // Some of what was forwarded has been put in place, too.
  await to.owner.ask('read 0');
  proxy.cut();
  const error = await (await to.arrival).complete.then(
    () => null,
    (thrown: MemferryError) => thrown,
  );
  expect(error).toMatchObject({ code: 'PAGES_LOST' });
  const { runs } = (error as MemferryError).facts as { runs: { first: number; count: number }[] };
  for (const { first, count } of runs) expect([first % UNIT, count % UNIT]).toEqual([0, 0]);
  const lost = runs.reduce((sum, { count }) => sum + count, 0);
  expect(lost).toBeGreaterThan(0);
  expect(lost).toBeLessThan(pages);
  const paused = from.paused as Buffer;
  const isLost = (page: number) => runs.some(({ first, count }) => page >= first && page < first + count);
  for (let page = 0; page < pages; page += 7) {
    if (isLost(page)) continue;
    expect(await to.owner.ask(`read ${page}`)).toBe(String(paused.readBigUInt64LE(page * 4096)));
  }
  const { first, count } = runs[0] as { first: number; count: number };
  expect(await to.owner.ask(`read ${first + count - 1}`)).toBeNull();
  await expect.poll(() => to.owner.exitSignal).toBe('SIGBUS');
  await expect(migration.done).rejects.toBeInstanceOf(Error);
});
