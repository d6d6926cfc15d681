/**
 * A scatter to a destination written in C (examples/embed/destination.c): through VMD servers in processes of their own,
 * its source gone as soon as it is evicted, or a server with the only copy of some pages.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts, type Host } from '../support/host.js';
import {
  expectEmpty,
  expectIntact,
  expectRuns,
  expectStands,
  failure,
  hosts,
  migrate,
  PAGES,
  type Report,
  regionsOf,
  report,
  type Stage,
  stageStatus,
  startGuest,
  startStage,
  startStages,
  via,
} from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';
import { CDestination, endDestinations } from './c-destination.js';

afterEach(async () => {
  await closeProxies();
  await endDestinations();
  await endHosts();
});

const MB = 1e6;
/** A destination that takes little from the source, and from the servers in its own time. */
const slow = { bandwidth: MB, 'gather-limit': 4 * MB, 'rest-us': 20_000 };

const throughServers = ({ intermediaries }: Pick<Report, 'intermediaries'>) =>
  intermediaries.reduce((sum, { pages }) => sum + pages, 0);

async function evicted(host: Host): Promise<Report> {
  await host.until('main evicted', (event) => event.event === 'evicted' && event['key'] === 'main');
  return (await host.call<{ value: Report }>('evicted')).value;
}

/** Nothing that is read ahead gets through, until it is let go. */
function holdGather(...proxies: TcpProxy[]): () => void {
  // Whoever has no answer for two seconds dials again.
  const points = Array.from({ length: 30 }).flatMap(() =>
    proxies.map((proxy) => proxy.at({ on: 'stage', channel: 1, direction: 'down', name: 'pages' }, 'hold')),
  );
  return () => {
    for (const point of points) point.release();
  };
}

async function expectHandedOver(a: Host, c: CDestination): Promise<void> {
  const { intervals } = await a.call<{ intervals: [bigint, bigint][] }>('status', { guest: 'g' });
  const [first] = await c.interval();
  expect(intervals.length).toBeGreaterThan(0);
  for (const [, last] of intervals) expect(last).toBeLessThan(first);
}

test.each([
  ['scatter', 1],
  ['scatter', 2],
  ['scatter-pre-copy', 1],
  ['scatter-hybrid', 2],
] as const)('%s: every byte is right, and the servers let go; %i replicas', async (mode, replicas) => {
  const [a] = await hosts('a');
  const stages = await startStages('i', 'j');
  const c = await CDestination.start(mode === 'scatter' ? slow : { ...slow, bandwidth: 8 * MB });
  await startGuest(a, [...regionsOf('allocate'), ...regionsOf('shared')]);
  const compress = replicas === 1 ? 'off' : 'lz4';
  await migrate(a, c.port, { mode, maxRounds: 3, compress, replicas, ...via(...stages) });
  const figures = await report(a);
  expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
  expect(figures.intermediaries.map(({ failed }) => failed)).toEqual([null, null]);
  if (replicas === 1) expect(throughServers(figures)).toBeGreaterThan(0);
  const account = await c.until('complete');
  expect(account).toMatchObject({ verified: true });
  expect(account['pagesGathered']).toBeGreaterThan(0);
  await c.until('ended');
  await expectStands(a);
  await expectIntact(a);
  await expectHandedOver(a, c);
  await c.expectSameAs(a, 2);
  for (const stage of stages) await expectEmpty(stage);
  expect(c.names.filter((name) => !['stands', 'dumped'].includes(name))).toEqual([
    'listening',
    'accept',
    'prepare',
    'prepared',
    'resume',
    'complete',
    'ended',
  ]);
});

test.each([
  ['scatter', 1],
  ['scatter', 2],
  ['scatter-hybrid', 1],
] as const)(
  '%s: the source is killed once it is evicted, and every byte comes from the servers; %i replicas',
  async (mode, replicas) => {
    const [a] = await hosts('a');
    const stages = await startStages('i', 'j');
    const proxies = await Promise.all(stages.map(({ port }) => TcpProxy.start(port)));
    const release = holdGather(...proxies);
    const c = await CDestination.start({ bandwidth: 4 * MB, 'rest-us': 20_000, 'recover-timeout-ms': 3000 });
    // More than a socket takes.
    await startGuest(a, regionsOf('allocate', 8 * PAGES));
    await migrate(a, c.port, { mode, hybridRounds: 1, replicas, ...via(...proxies) });
    await evicted(a);
    const saved = await c.saveOf(a, 1);
    await a.kill();
    expect(c.names).not.toContain('complete');
    let pages = 0;
    for (const stage of stages) {
      const { held } = await stageStatus(stage);
      expect(held).toMatchObject([{ phase: 'committed', sealed: true }]);
      pages += held[0]?.pagesHeld ?? 0;
    }
    expect(pages).toBeGreaterThan(0);
    release();
    expect(await c.until('complete')).toMatchObject({ verified: true });
    await c.expectSaved(saved);
    for (const stage of stages) await expectEmpty(stage);
    await c.until('ended');
    expect(c.names).not.toContain('lost');
  },
);

describe('a server is lost', () => {
  /** `held`: of so many servers, from the last, the destination has no pages but those that its guest has waited for. */
  async function scattered(replicas: number, { recoverMs = 1500, held = 0 } = {}) {
    const [a] = await hosts('a');
    const stages = await startStages('i', 'j');
    const proxies = await Promise.all(stages.map(({ port }) => TcpProxy.start(port)));
    const c = await CDestination.start({
      ...slow,
      bandwidth: MB / 2,
      'gather-limit': 2 * MB,
      'recover-timeout-ms': recoverMs,
      'peer-timeout-ms': 8000,
    });
    const release = holdGather(...proxies.slice(proxies.length - held));
    await startGuest(a, regionsOf('allocate', 2 * PAGES));
    // Pages as they are: packed, the direct link would take more of them.
    await migrate(a, c.port, { mode: 'scatter', compress: 'off', replicas, ...via(...proxies) });
    await evicted(a);
    return { a, c, stages, proxies, release };
  }

  test.each(['killed', 'restarted'])(
    'the only one, %s, with the source gone: named, every other page is right, what is lost fails',
    async (disaster) => {
      const { a, c, stages, release } = await scattered(1, { held: 1 });
      const [i, j] = stages as [Stage, Stage];
      const saved = await c.saveOf(a, 1);
      await a.kill();
      await j.host.kill();
      release();
      if (disaster === 'restarted') await startStage('j', { port: j.port });
      const { pages, why } = await c.until('lost');
      expect(pages).toBeGreaterThan(0);
      expect(why).toContain('j');
      expect(await c.until('failed')).toMatchObject({ code: 'PAGES_LOST' });
      expect(c.names.indexOf('failed')).toBeLessThan(c.names.indexOf('lost'));
      expect(c.names).not.toContain('complete');
      await expectEmpty(i, 20_000);
      await c.expectSavedBut(saved);
      await c.until('ended');
    },
  );

  test('one of two replicas, with the source gone: nothing is lost', async () => {
    const { a, c, stages, release } = await scattered(2, { held: 1 });
    const [i, j] = stages as [Stage, Stage];
    const saved = await c.saveOf(a, 1);
    await a.kill();
    await j.host.kill();
    release();
    expect(await c.until('complete')).toMatchObject({ verified: true });
    await c.expectSaved(saved);
    await expectEmpty(i);
    expect(c.names).not.toContain('lost');
  });

  test('its network is cut for a moment: nothing is lost', async () => {
    const { a, c, proxies, stages } = await scattered(1, { recoverMs: 8000 });
    const saved = await c.saveOf(a, 1);
    await a.kill();
    proxies[1]?.cut();
    setTimeout(() => proxies[1]?.heal(), 500);
    expect(await c.until('complete')).toMatchObject({ verified: true });
    await c.expectSaved(saved);
    for (const stage of stages) await expectEmpty(stage);
  });
});

describe('before the commit', () => {
  test('a server is killed before the destination has opened the image: declined, and the guest runs on', async () => {
    const [a] = await hosts('a');
    const [i, j] = await startStages('i', 'j');
    const proxy = await TcpProxy.start(j.port);
    const c = await CDestination.start({ 'connect-timeout-ms': 1000, 'peer-timeout-ms': 8000 });
    await startGuest(a, regionsOf('allocate'));
    const point = proxy.at({ on: 'control', direction: 'up', name: 'open' }, 'hold');
    await migrate(a, c.port, { mode: 'scatter', recoverTimeoutMs: 1000, ...via(i, proxy) });
    await point.reached;
    await j.host.kill();
    const error = await failure(a);
    expect(error.message).toContain('j');
    await expectRuns(a);
    await expectEmpty(i);
    expect(c.names).toEqual(['listening']);
  });

  test('the destination is closed while it asks a server that says nothing: bounded', async () => {
    const [a] = await hosts('a');
    const [i] = await startStages('i');
    const proxy = await TcpProxy.start(i.port);
    const c = await CDestination.start();
    await startGuest(a, regionsOf('allocate'));
    const point = proxy.at({ on: 'control', direction: 'up', name: 'open' }, 'hold');
    await migrate(a, c.port, { mode: 'scatter', ...via(proxy) });
    await point.reached;
    const since = performance.now();
    c.say('close');
    await c.until('closed');
    expect(performance.now() - since).toBeLessThan(5000);
    await failure(a);
    await expectRuns(a);
    expect(c.names).toEqual(['listening', 'closed']);
  });

  test('prepare fails: the guest runs on at its source, which has the servers let go', async () => {
    const [a] = await hosts('a');
    const stages = await startStages('i', 'j');
    const c = await CDestination.start({ ...slow, prepare: 'fail' });
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, c.port, { mode: 'scatter', ...via(...stages) });
    expect((await failure(a)).code).toBe('PREPARE_FAILED');
    await c.until('ended');
    await expectRuns(a);
    for (const stage of stages) await expectEmpty(stage);
    expect(c.names).not.toContain('resume');
  });
});
