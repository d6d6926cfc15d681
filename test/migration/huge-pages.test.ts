/**
 * Guests in reserved huge pages of 2 MiB, to and from memory of either kind, in every mode, while they write: every byte
 * is what the journal says, on every host. What is lost takes whole huge pages with it, and never reads as zeros.
 */
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { trackers } from '../../src/trackers.js';
import { endHosts, type Host } from '../support/host.js';
import { HugePagePool } from '../support/huge-pages.js';
import {
  expectIntact,
  expectOneOwner,
  expectRuns,
  hosts,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
  startStages,
  through,
  via,
} from '../support/scenario.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

const UNIT = 512;
const PAGES = 4 * UNIT;
/** Three hosts' worth, and as much again for a test that was killed. */
const WANTED = 24;

const pool = new HugePagePool();
let why: string | null = null;

beforeAll(() => {
  why = pool.reserve(WANTED);
});
afterAll(() => pool.restore());

beforeEach((context) => {
  if (why) context.skip(why);
});

const doomed: Host[] = [];

/** Hosts that end with the test: a view keeps its memory, and the file behind it, until it is collected. */
async function doomedHosts<const Names extends string[]>(...names: Names) {
  const made = await hosts(...names);
  doomed.push(...(made as Host[]));
  return made;
}

afterEach(async () => {
  await closeProxies();
  for (const host of doomed.splice(0)) if (host.alive) await host.kill();
  await endHosts();
});

type Kind = 'huge' | 'allocate';

describe.each([
  ['huge', 'huge', ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid', 'scatter', 'scatter-hybrid']],
  ['allocate', 'huge', ['pre-copy', 'post-copy', 'hybrid', 'scatter']],
  ['huge', 'allocate', ['pre-copy', 'hybrid', 'scatter']],
] as const)('%s to %s', (from, to, modes) => {
  test.each(modes)('%s', async (mode) => {
    const [a, b] = await doomedHosts('a', 'b');
    const servers = mode.startsWith('scatter') ? await startStages('x', 'y') : [];
    const port = await listen(b, { kind: to satisfies Kind, rate: { batch: 64, restMs: 1 } });
    await startGuest(a, regionsOf(from, PAGES), { rate: { batch: 64, restMs: 1 } });
    await migrate(a, port, { mode, hybridRounds: 2, ...(servers.length > 0 ? via(...servers) : {}) });
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
    await expectRuns(b);
    await expectIntact(a);
    await expectOneOwner([a, b]);
  });
});

describe.each(['huge', 'allocate'] as const)('split, to %s', (to) => {
  test.each(['pre-copy', 'hybrid', 'scatter-pre-copy', 'scatter-hybrid'])('%s', async (mode) => {
    const [a, b] = await doomedHosts('a', 'b');
    const servers = mode.startsWith('scatter') ? await startStages('x', 'y') : [];
    const port = await listen(b, { kind: to, rate: { batch: 64, restMs: 1 } });
    await startGuest(a, regionsOf('huge', PAGES), { rate: { batch: 64, restMs: 1 } });
    await migrate(a, port, {
      mode,
      hybridRounds: 3,
      maxRounds: 6,
      splitHugePages: true,
      ...through(servers),
    });
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
    await expectRuns(b);
    await expectIntact(a);
    await expectOneOwner([a, b]);
  });
});

test.each([true, false])('what goes again for one write, split: %s', async (splitHugePages) => {
  const [a, b] = await doomedHosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('huge', PAGES), { rate: { batch: 1, restMs: 5 } });
  // Slow enough that it is written to in the first round.
  await migrate(a, port, {
    mode: 'pre-copy',
    bandwidth: 20e6,
    downtimeLimitMs: 1,
    maxRounds: 4,
    splitHugePages,
  });
  const { rounds, verified } = await report(a);
  expect(verified).toBe(true);
  const [first, second] = rounds.slice(1).map(({ pagesSent }) => pagesSent);
  expect(first).toBeGreaterThan(0);
  if (splitHugePages) expect((first ?? 0) + (second ?? 0)).toBeLessThan(UNIT);
  else expect(first).toBeGreaterThanOrEqual(UNIT - 1);
  await expectRuns(b);
});

test('hops onward, tracked by write protection', async (context) => {
  const tracker = 'uffd-wp-async';
  if (!trackers().some(({ name, available }) => name === tracker && available)) {
    context.skip(`no ${tracker} here`);
  }
  const [a, b, c] = await doomedHosts('a', 'b', 'c');
  const [toB, toC] = await Promise.all([listen(b), listen(c)]);
  await startGuest(a, regionsOf('huge', PAGES), { rate: { batch: 32, restMs: 1 } });
  await migrate(a, toB, { mode: 'hybrid', hybridRounds: 1, tracker });
  expect(await report(a)).toMatchObject({ verified: true, tracker, switchedToPostCopy: true });
  expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
  await expectRuns(b);
  await migrate(b, toC, { mode: 'hybrid', hybridRounds: 1, tracker });
  expect(await report(b)).toMatchObject({ verified: true, tracker, switchedToPostCopy: true });
  expect(await c.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
  await expectRuns(c);
  await expectIntact(b);
  await expectOneOwner([a, b, c]);
});

test('the tracker by write protection is chosen without a word, for nobody else has the file', async () => {
  const [a, b] = await doomedHosts('a', 'b');
  const port = await listen(b);
  await startGuest(a, regionsOf('huge', PAGES));
  await migrate(a, port, { mode: 'pre-copy' });
  const figures = await report(a);
  const works = trackers().find(({ name, available }) => available && name.startsWith('uffd-'));
  expect(figures.tracker).toBe(works?.name ?? 'hash-diff');
  await expectRuns(b);
});

describe('pages on their way', () => {
  const idle = { batch: 0, restMs: 100_000 };
  const PUSHED: Point = { on: 'data', direction: 'up', name: 'pages' };

  async function resumed(recoverTimeoutMs: number) {
    const [a, b] = await doomedHosts('a', 'b');
    const port = await listen(b, { kind: 'huge', options: { recoverTimeoutMs }, rate: idle });
    const proxy = await TcpProxy.start(port);
    await startGuest(a, regionsOf('huge', PAGES));
    const point = proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'hold');
    await migrate(a, proxy.port, { mode: 'post-copy', channels: 2, recoverTimeoutMs });
    await point.reached;
    return { a, b, proxy, go: () => point.release() };
  }

  test('a cut is survived', async () => {
    const { a, b, proxy, go } = await resumed(30_000);
    const point = proxy.at({ ...PUSHED, nth: 4 }, 'cut');
    go();
    await point.reached;
    const reading = b.call('touch', { guest: 'g', index: 0, page: PAGES - 1 });
    await a.untilState('migration', 'main', 'postcopy-paused');
    proxy.heal();
    await reading;
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectIntact(b);
    await expectOneOwner([a, b]);
  });

  test('the source is killed: whole huge pages are named, the others are right, and no zeros are read', async () => {
    const { a, b, proxy, go } = await resumed(1500);
    const point = proxy.at({ ...PUSHED, nth: 14 }, () => a.killNow());
    go();
    await point.reached;
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({
      ok: false,
      error: { code: 'PAGES_LOST' },
    });
    await b.untilStep('g', 'lost');
    const runs = await b.call<{ first: number; count: number }[]>('lost', { guest: 'g' });
    const lost = runs.reduce((sum, { count }) => sum + count, 0);
    expect(lost).toBeGreaterThan(0);
    for (const { first, count } of runs) expect([first % UNIT, count % UNIT]).toEqual([0, 0]);
    const check = await b.call<{ wrong: unknown[]; pages: number }>('check', { guest: 'g', except: runs });
    expect(check).toMatchObject({ wrong: [], pages: PAGES - lost });
    const { first, count } = runs[0] as { first: number; count: number };
    await expect(b.call('touch', { guest: 'g', index: 0, page: first + count - 1 })).rejects.toThrow();
    expect(await b.exited).toMatchObject({ signal: 'SIGBUS' });
  });
});
