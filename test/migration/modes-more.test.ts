/** What callers may ask of a migration besides its mode, and guests that move again and again. */
import { afterEach, describe, expect, test } from 'vitest';
import { trackers } from '../../src/trackers.js';
import { endHosts } from '../support/host.js';
import {
  done,
  expectIntact,
  expectNothingLeft,
  expectOneOwner,
  expectRuns,
  expectStands,
  failure,
  hosts,
  inventory,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

afterEach(async () => {
  await closeProxies();
  await endHosts();
});

/** Dirties its whole memory faster than the bandwidth below carries it. */
const busy = { batch: 400, restMs: 1 };
const narrow = { bandwidth: 8 * 2 ** 20, downtimeLimitMs: 1 };

describe('rounds that do not converge', () => {
  test('are accepted, with a longer downtime', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'), { rate: busy });
    await migrate(a, port, { mode: 'pre-copy', ...narrow, maxRounds: 3 });
    const figures = await report(a);
    expect(figures).toMatchObject({ verified: true, switchedToPostCopy: false });
    expect(figures.rounds.length).toBeLessThanOrEqual(4);
    expect(figures.pagesResent).toBeGreaterThan(0);
    await expectRuns(b);
    await expectOneOwner([a, b]);
  });

  test('end the migration, and the guest was never paused', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'), { rate: busy });
    const before = await inventory(a);
    await migrate(a, port, { mode: 'pre-copy', ...narrow, maxRounds: 2, onNonConvergence: 'fail' });
    expect((await failure(a)).code).toBe('NOT_CONVERGED');
    expect(a.steps('g')).toEqual([]);
    await expectRuns(a);
    await b.untilStep('g', 'abandon');
    await expectNothingLeft(a, before);
  });

  test('go post-copy', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'), { rate: busy });
    await migrate(a, port, { mode: 'pre-copy', ...narrow, maxRounds: 2, onNonConvergence: 'post-copy' });
    expect(await report(a)).toMatchObject({ mode: 'pre-copy', verified: true, switchedToPostCopy: true });
    await expectRuns(b);
    await expectIntact(a);
    await expectOneOwner([a, b]);
  });
});

test('a held switchover goes on with rounds until it is let go', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'));
  await migrate(a, port, { mode: 'pre-copy', holdSwitchover: true });
  await a.untilState('migration', 'main', 'pre-switchover');
  await a.until('three more rounds', (event) => event.event === 'round' && (event['round'] as number) >= 4);
  expect(a.steps('g')).toEqual([]);
  await a.call('switchover');
  expect(await report(a)).toMatchObject({ verified: true });
  await expectRuns(b);
  await expectOneOwner([a, b]);
});

test('a switchover that is asked for ends the rounds of a guest that never converges', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'), { rate: busy });
  await migrate(a, port, { mode: 'hybrid', hybridRounds: 1000, ...narrow });
  await a.until('the second round', (event) => event.event === 'round' && (event['round'] as number) >= 2);
  await a.call('switchover');
  expect(await report(a)).toMatchObject({ verified: true, switchedToPostCopy: true });
  await expectRuns(b);
});

test('a bandwidth limit holds', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'));
  const limit = 4 * 2 ** 20;
  await migrate(a, port, { mode: 'stop-and-copy', bandwidth: limit });
  const figures = await report(a);
  // The burst that a token bucket allows is not more than a quarter of a second's worth.
  expect(figures.bytesOnWire / (figures.totalMs / 1000)).toBeLessThan(limit * 1.25);
  await expectRuns(b);
});

const works = trackers().filter(({ available }) => available);

describe.each(works.map(({ name }) => name))('the tracker %s', (tracker) => {
  test.each(['pre-copy', 'hybrid'])('in %s', async (mode) => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b);
    for (const kind of ['allocate', 'wasm'] as const) {
      await startGuest(a, regionsOf(kind), { guest: kind, rate: { batch: 64, restMs: 1 } });
      await migrate(a, port, { mode, tracker, maxRounds: 4 }, { key: kind, guest: kind });
      expect(await report(a, kind)).toMatchObject({ tracker, verified: true });
      await expectRuns(b, kind);
      await expectOneOwner([a, b], kind);
    }
  });
});

test('without a choice the tracker is the first that works here', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'));
  await migrate(a, port, { mode: 'pre-copy', maxRounds: 4 });
  expect(await report(a)).toMatchObject({ tracker: works[0]?.name, verified: true });
  await expectRuns(b);
});

test('a tracker that does not exist is refused, and the guest runs on', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'));
  const tracker = 'crystal-ball';
  await expect(migrate(a, port, { mode: 'pre-copy', tracker })).rejects.toThrow(/migrate\.tracker/);
  await expectRuns(a);
});

test.each([true, false])('verification: %s', async (verify) => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  for (const mode of ['stop-and-copy', 'post-copy']) {
    await startGuest(a, regionsOf('allocate'), { guest: mode });
    await migrate(a, port, { mode, verify }, { key: mode, guest: mode });
    expect(await report(a, mode)).toMatchObject({ verified: verify ? true : null });
    expect(await b.untilArrival(`main/${mode}`, 'complete')).toMatchObject({ ok: true });
    await expectRuns(b, mode);
  }
});

test('a guest of several regions of several kinds', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  const regions = (['allocate', 'shared', 'wasm', 'wasm-shared', 'allocate'] as const).map((kind, index) => ({
    kind,
    pages: 256 * (index + 1),
    maxPages: 2048,
  }));
  for (const mode of ['pre-copy', 'post-copy', 'hybrid']) {
    await startGuest(a, regions, { guest: mode });
    await migrate(a, port, { mode }, { key: mode, guest: mode });
    expect(await report(a, mode)).toMatchObject({ verified: true });
    expect((await expectIntact(b, mode)).pages).toBe(256 * 15);
    await expectOneOwner([a, b], mode);
    await a.call('end', { guest: mode });
    await b.call('end', { guest: mode });
  }
});

test('many migrations at once, in both directions, between two processes', async () => {
  const [a, b] = await hosts('a', 'b');
  const [toB, toA] = [await listen(b), await listen(a)];
  const modes = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'];
  const names = Array.from({ length: 12 }, (_, index) => `guest ${index}`);
  const side = (index: number) => (index % 2 === 0 ? a : b);
  await Promise.all(
    names.map((guest, index) =>
      startGuest(side(index), regionsOf('allocate', 256), { guest, rate: { batch: 4, restMs: 2 } }),
    ),
  );
  await Promise.all(
    names.map((guest, index) =>
      migrate(
        side(index),
        index % 2 === 0 ? toB : toA,
        { mode: modes[Math.floor(index / 2) % 4] as string, channels: 1 + (index % 3) },
        { key: guest, guest },
      ),
    ),
  );
  for (const [index, guest] of names.entries()) {
    expect(await report(side(index), guest)).toMatchObject({ verified: true });
    await expectRuns(side(index + 1), guest);
  }
});

test('more migrations than a listener takes: some are refused, none is damaged', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { options: { maxMigrations: 2 } });
  const proxy = await TcpProxy.start(port);
  const names = ['one', 'two', 'three', 'four'];
  for (const guest of names) await startGuest(a, regionsOf('allocate', 256), { guest });
  const held = [1, 2].map((nth) => proxy.at({ on: 'control', direction: 'up', name: 'state', nth }, 'hold'));
  for (const guest of names.slice(0, 2)) {
    await migrate(a, proxy.port, { mode: 'stop-and-copy' }, { key: guest, guest });
  }
  await Promise.all(held.map(({ reached }) => reached));
  for (const guest of names.slice(2)) {
    await migrate(a, proxy.port, { mode: 'stop-and-copy' }, { key: guest, guest });
    expect((await failure(a, guest)).code).toBe('LIMIT_EXCEEDED');
    await expectRuns(a, guest);
  }
  for (const { release } of held) release();
  for (const guest of names.slice(0, 2)) {
    expect(await report(a, guest)).toMatchObject({ verified: true });
    await expectRuns(b, guest);
  }
});

test.each(['allocate', 'wasm'] as const)(
  'a guest hops A, B, A, B, A back to back, by every mode (%s)',
  async (kind) => {
    const [a, b] = await hosts('a', 'b');
    const ports = { a: await listen(a), b: await listen(b) };
    await startGuest(a, regionsOf(kind));
    let [here, there] = [a, b];
    for (const mode of ['hybrid', 'post-copy', 'pre-copy', 'stop-and-copy']) {
      await migrate(here, ports[there.name as 'a' | 'b'], { mode }, { key: mode });
      expect(await report(here, mode)).toMatchObject({ verified: true });
      await here.call('end', { guest: 'g' });
      [here, there] = [there, here];
    }
    expect(here).toBe(a);
    await expectRuns(a);
  },
);

test('a guest leaves again before its last page has come: it says that it waits, and then goes', async () => {
  const [a, b, c] = await hosts('a', 'b', 'c');
  const toB = await listen(b, { rate: { batch: 0, restMs: 100_000 } });
  const toC = await listen(c);
  const proxy = await TcpProxy.start(toB);
  await startGuest(a, regionsOf('allocate'));
  const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
  await migrate(a, proxy.port, { mode: 'post-copy' });
  await held.reached;
  await b.untilStep('g', 'resume');
  await migrate(b, toC, { mode: 'hybrid' }, { key: 'on' });
  await b.until('waiting', (event) => event.event === 'waiting' && event['key'] === 'on');
  expect(b.steps('g')).not.toContain('pause');
  held.release();
  expect(await report(a)).toMatchObject({ verified: true });
  expect(await report(b, 'on')).toMatchObject({ verified: true });
  await expectRuns(c);
  await expectStands(a);
  await expectStands(b);
  await expectOneOwner([a, b, c]);
});

test('a guest that waits to leave again, and loses its pages, stays and says so', async () => {
  const [a, b, c] = await hosts('a', 'b', 'c');
  const idle = { batch: 0, restMs: 100_000 };
  const toB = await listen(b, { options: { recoverTimeoutMs: 1500 }, rate: idle });
  const toC = await listen(c);
  const proxy = await TcpProxy.start(toB);
  await startGuest(a, regionsOf('allocate'));
  const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
  await migrate(a, proxy.port, { mode: 'post-copy', recoverTimeoutMs: 1500 });
  await held.reached;
  await migrate(b, toC, { mode: 'hybrid' }, { key: 'on' });
  await b.until('waiting', (event) => event.event === 'waiting');
  await a.kill();
  expect((await failure(b, 'on')).code).toBe('PAGES_LOST');
  expect(c.events.some((event) => event.event === 'offer')).toBe(false);
});

test('progress ends with the migration, however that ends', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('allocate'));
  await migrate(a, port, { mode: 'hybrid' }, { key: 'well' });
  expect((await done(a, 'well')).ok).toBe(true);
  await a.until('its progress ended', (event) => event.event === 'progress-ended' && event['key'] === 'well');
  await startGuest(a, regionsOf('allocate'), { guest: 'other' });
  await migrate(a, 1, { mode: 'hybrid', connectTimeoutMs: 500 }, { key: 'ill', guest: 'other' });
  expect((await failure(a, 'ill')).code).toBe('CONNECT_FAILED');
  await a.until('its progress ended', (event) => event.event === 'progress-ended' && event['key'] === 'ill');
});
