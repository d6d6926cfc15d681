/**
 * The scatter modes, through VMD servers in processes of their own. The destination takes so little by itself that
 * most of the guest goes through the servers; the guest writes throughout, and every byte is compared with what the
 * journal of writes says. What happens when a server is lost is in scatter-loss.test.ts.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts, type Host, type HostEvent } from '../support/host.js';
import {
  expectEmpty,
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
  PAGES,
  type Report,
  regionsOf,
  report,
  stageStatus,
  startGuest,
  startStage,
  startStages,
  via,
} from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

afterEach(async () => {
  await closeProxies();
  await endHosts();
});

const MB = 1e6;
const kinds = ['allocate', 'shared', 'wasm', 'wasm-shared'] as const;
const modes = ['scatter', 'scatter-pre-copy', 'scatter-hybrid'] as const;

/** A destination that takes little from the source, and from the servers in its own time. */
const slow = { bandwidth: 2 * MB, gatherLimit: 4 * MB };
/** Straight from the source next to nothing, however long the servers take to get theirs; until that is lifted. */
const trickle = 0.05 * MB;
/** And by its faults, which nothing holds back, next to nothing too. */
const still = { batch: 1, restMs: 100 };
/** For tests in which no server is lost: one that is slow stays. */
const patient = { stallTimeoutMs: 20_000 };
/** It writes all the time, but not so often that faults alone would fetch its memory. */
const calm = { batch: 2, restMs: 5 };

/** Whether the destination has every page already. */
const arrived = (host: Host, guest = 'g') =>
  host.events.some(
    (event) =>
      event.event === 'arrival' && event['key'] === `main/${guest}` && event['promise'] === 'complete',
  );

function evicted(host: Host, key = 'main'): Promise<HostEvent> {
  return host.until(`${key} evicted`, (event) => event.event === 'evicted' && event['key'] === key);
}

const throughServers = ({ intermediaries }: Pick<Report, 'intermediaries'>) =>
  intermediaries.reduce((sum, { pages }) => sum + pages, 0);

describe.each(modes)('%s', (mode) => {
  test('memory of every kind, in part through the servers, of which nothing is left', async () => {
    const [a, b] = await hosts('a', 'b');
    const stages = await startStages('i', 'j');
    const before = await Promise.all([a, b].map(inventory));
    const port = await listen(b, { options: slow, rate: still });
    // In a round what is on its way straight to the destination is waited for.
    const bandwidth = mode === 'scatter' ? trickle : 8 * MB;
    for (const kind of kinds) {
      await startGuest(a, regionsOf(kind), { guest: kind });
      // As they are: packed, the direct link would take more of them than this test leaves to it.
      const options = { mode, maxRounds: 3, compress: 'off', ...patient, ...via(...stages) };
      await b.call('limit', { limits: { bandwidth } });
      await migrate(a, port, options, { key: kind, guest: kind });
      await evicted(a, kind);
      await b.call('limit', { limits: { bandwidth: 0 } });
      const figures = await report(a, kind);
      expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
      expect(figures.switchedToPostCopy).toBe(mode !== 'scatter-pre-copy');
      expect(figures.intermediaries.map(({ name, failed }) => [name, failed])).toEqual([
        ['i', null],
        ['j', null],
      ]);
      // Before the switch nothing that waits in a socket is taken back, and one can hold nearly all of this memory.
      expect(throughServers(figures)).toBeGreaterThan(mode === 'scatter' ? PAGES / 2 : 0);
      expect(figures.pagesDirect + throughServers(figures)).toBe(PAGES);
      expect(await b.untilArrival(`main/${kind}`, 'complete')).toMatchObject({ ok: true });
      await expectRuns(b, kind);
      await expectIntact(a, kind);
      await expectStands(a, kind);
      await expectOneOwner([a, b], kind);
      expect(a.steps(kind)).toEqual(['pause', 'paused', 'departed', 'release']);
      expect(b.steps(kind)).toEqual(['prepare', 'prepared', 'resume']);
      for (const stage of stages) await expectEmpty(stage);
      for (const host of [a, b]) await host.call('end', { guest: kind });
    }
    await b.call('closeListener');
    for (const [index, host] of [a, b].entries()) {
      await expectNothingLeft(host, before[index] as (typeof before)[number]);
    }
  });
});

describe.each(['scatter', 'scatter-hybrid'])(
  '%s: the source is evicted long before the destination is complete',
  (mode) => {
    test.each([1, 2])('and may be killed then; %i replicas', async (replicas) => {
      const [a, b] = await hosts('a', 'b');
      const [i, j] = await startStages('i', 'j');
      // The destination takes many seconds for what the servers have, more than anything below. In a round what is on
      // its way straight there is waited for.
      const bandwidth = mode === 'scatter' ? trickle : slow.bandwidth;
      const port = await listen(b, { options: { bandwidth, gatherLimit: 0.1 * MB }, rate: calm });
      await startGuest(a, regionsOf('allocate', 2 * PAGES));
      await migrate(a, port, { mode, hybridRounds: 1, replicas, ...patient, ...via(i, j) });
      expect(await evicted(a)).toMatchObject({ ok: true });
      const { value } = await a.call<{ value: Report }>('evicted');
      await a.kill();
      expect(arrived(b)).toBe(false);
      for (const stage of [i, j]) {
        const { held } = await stageStatus(stage);
        expect(held).toMatchObject([{ phase: 'committed', sealed: true }]);
        expect(held[0]?.pagesHeld).toBeGreaterThan(0);
      }
      // A page at two servers counts for the one that it was sent to.
      expect(value.pagesDirect + throughServers(value)).toBe(2 * PAGES);
      await b.call('limit', { limits: { bandwidth: 0, gatherLimit: 0 } });
      await expectRuns(b);
      const { value: account } = await b.call<{ value: object }>('arrival', {
        key: 'main/g',
        promise: 'complete',
      });
      expect(account).toMatchObject({ verified: true, intermediaries: [{ failed: null }, { failed: null }] });
      await expectRuns(b);
      for (const stage of [i, j]) await expectEmpty(stage);
    });
  },
);

test('eviction does not wait for a destination that gathers at a crawl', async () => {
  const [a, b] = await hosts('a', 'b');
  const [i, j] = await startStages('i', 'j');
  const port = await listen(b, { options: { bandwidth: 0.2 * MB, gatherLimit: 0.2 * MB }, rate: calm });
  await startGuest(a, regionsOf('allocate', 2 * PAGES));
  await migrate(a, port, { mode: 'scatter', ...via(i, j) });
  // By the destination's own pace it would have been 40 s.
  expect(await evicted(a)).toMatchObject({ ok: true });
  const { value } = await a.call<{ value: Report }>('evicted');
  expect(value.evictionMs).toBeLessThan(20_000);
  expect(arrived(b)).toBe(false);
  await b.call('limit', { limits: { bandwidth: 0, gatherLimit: 0 } });
  expect(await report(a)).toMatchObject({ verified: true });
  await expectRuns(b);
  for (const stage of [i, j]) await expectEmpty(stage);
});

test('releaseAsEvicted: the source gives its memory back while the rest still goes out', async () => {
  const [a, b] = await hosts('a', 'b');
  const [i, j] = await startStages('i', 'j');
  const proxy = await TcpProxy.start(j.port);
  const port = await listen(b, { options: slow, rate: calm });
  await startGuest(a, regionsOf('allocate', 8 * PAGES));
  const quarter = 8 * PAGES * 4096 * 0.25;
  let most = await a.call<number>('residentBytes');
  // As long as this is not acknowledged the source is not evicted.
  const held = proxy.at({ on: 'stage', channel: 0, direction: 'up', name: 'pages' }, 'hold');
  const options = { mode: 'scatter', releaseAsEvicted: true, bandwidth: 16 * MB, stallTimeoutMs: 40_000 };
  await migrate(a, port, { ...options, ...via(i, proxy) });
  await held.reached;
  let now = most;
  for (const end = performance.now() + 25_000; most - now < quarter && performance.now() < end; ) {
    now = await a.call<number>('residentBytes');
    most = Math.max(most, now);
    // Asking costs memory too.
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  expect(most - now).toBeGreaterThan(quarter);
  expect(a.events.some(({ event }) => event === 'evicted')).toBe(false);
  held.release();
  await b.call('limit', { limits: { bandwidth: 0, gatherLimit: 0 } });
  expect(await report(a)).toMatchObject({ verified: true });
  await expectRuns(b);
  await expectOneOwner([a, b]);
});

describe('servers without room for the guest', () => {
  const narrow = { memoryBytes: 16 * 2 ** 20 };

  test('VMD_CAPACITY says how much there is, and the guest runs on at the source', async () => {
    const [a, b] = await hosts('a', 'b');
    const stage = await startStage('narrow', narrow);
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate', 4 * PAGES));
    await migrate(a, port, { mode: 'scatter', ...via(stage) });
    const error = await failure(a);
    expect(error).toMatchObject({
      code: 'VMD_CAPACITY',
      facts: { bytes: 16 * 2 ** 20, servers: [{ name: 'narrow', freeBytes: expect.any(Number) }] },
    });
    await expectRuns(a);
    expect(a.steps('g')).toEqual([]);
    await expectEmpty(stage);
  });

  test('one server is none for two replicas', async () => {
    const [a, b] = await hosts('a', 'b');
    const [stage] = await startStages('i');
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, port, { mode: 'scatter', replicas: 2, ...via(stage) });
    expect(await failure(a)).toMatchObject({ code: 'VMD_CAPACITY' });
    await expectRuns(a);
  });

  test.each(modes)('onCapacity "direct": %s goes on without them', async (mode) => {
    const [a, b] = await hosts('a', 'b');
    const stage = await startStage('narrow', narrow);
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate', 4 * PAGES));
    await migrate(a, port, { mode, maxRounds: 3, onCapacity: 'direct', ...via(stage) });
    const figures = await report(a);
    expect(figures).toMatchObject({ mode, verified: true, intermediaries: [] });
    await expectRuns(b);
    await expectOneOwner([a, b]);
    await expectEmpty(stage);
  });
});

describe('a server that is no use', () => {
  const other = { secret: 'a secret that nobody else here knows' };

  test.each(['wrong secret', 'not there'])('%s: the only one, and the guest runs on', async (how) => {
    const [a, b] = await hosts('a', 'b');
    const stage = await startStage('s', how === 'wrong secret' ? other : {});
    if (how === 'not there') await stage.host.kill();
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, port, { mode: 'scatter', ...via(stage) });
    const error = await failure(a);
    expect(error.code).toBe(how === 'wrong secret' ? 'AUTH_FAILED' : 'CONNECT_FAILED');
    expect(error.message).toContain(`127.0.0.1:${stage.port}`);
    await expectRuns(a);
    expect(a.steps('g')).toEqual([]);
    expect(b.events.some(({ event }) => event === 'offer')).toBe(false);
  });

  test.each(['wrong secret', 'not there'])('%s: the others do, and the report tells', async (how) => {
    const [a, b] = await hosts('a', 'b');
    const [useless, stage] = await Promise.all([
      startStage('useless', how === 'wrong secret' ? other : {}),
      startStage('useful'),
    ]);
    if (how === 'not there') await useless.host.kill();
    const port = await listen(b, { options: { ...slow, bandwidth: trickle }, rate: still });
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, port, { mode: 'scatter', compress: 'off', ...patient, ...via(useless, stage) });
    await evicted(a);
    await b.call('limit', { limits: { bandwidth: 0 } });
    const figures = await report(a);
    expect(figures).toMatchObject({
      verified: true,
      intermediaries: [
        { name: 'useful', failed: null },
        { name: `127.0.0.1:${useless.port}`, pages: 0, bytes: 0, failed: expect.any(String) },
      ],
    });
    expect(throughServers(figures)).toBeGreaterThan(PAGES / 2);
    await expectRuns(b);
  });
});

test('two guests at once through the same servers are kept apart', async () => {
  const [a, b, c] = await hosts('a', 'b', 'c');
  const stages = await startStages('i', 'j');
  const [toB, toC] = [
    await listen(b, { options: { ...slow, bandwidth: trickle }, rate: still }),
    await listen(c, { options: { ...slow, bandwidth: trickle }, rate: still }),
  ];
  // Of one shape, so that what is one's page is a page of the other's as well.
  await startGuest(a, regionsOf('allocate'), { guest: 'one', rate: { seed: 0x1111 } });
  await startGuest(a, regionsOf('allocate'), { guest: 'two', rate: { seed: 0x2222, batch: 64 } });
  const options = { mode: 'scatter', compress: 'off', ...patient, ...via(...stages) };
  await Promise.all([
    migrate(a, toB, options, { key: 'one', guest: 'one' }),
    migrate(a, toC, { ...options, replicas: 2 }, { key: 'two', guest: 'two' }),
  ]);
  await Promise.all([evicted(a, 'one'), evicted(a, 'two')]);
  await Promise.all([b, c].map((host) => host.call('limit', { limits: { bandwidth: 0 } })));
  const reports = await Promise.all([report(a, 'one'), report(a, 'two')]);
  for (const figures of reports) {
    expect(figures.verified).toBe(true);
    expect(throughServers(figures)).toBeGreaterThan(PAGES / 2);
  }
  await expectRuns(b, 'one');
  await expectRuns(c, 'two');
  await expectOneOwner([a, b], 'one');
  await expectOneOwner([a, c], 'two');
  for (const stage of stages) await expectEmpty(stage);
});
