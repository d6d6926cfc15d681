/**
 * The hosts or the network fail between READY and RESUMED, where nobody can know everything: the guest never
 * runs at two places, what can go on goes on, and what cannot says so within its bound and waits for proof.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts, type Host, type Settled } from '../support/host.js';
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
  regionsOf,
  report,
  serversOf,
  startGuest,
  through,
} from '../support/scenario.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

afterEach(async () => {
  await closeProxies();
  await endHosts();
});

const GRANT: Point = { on: 'control', direction: 'up', name: 'grant' };
const RESUMED: Point = { on: 'control', direction: 'down', name: 'resumed' };
const inDoubtTimeoutMs = 1500;
/** Of a destination with servers beside it: straight from the source, so that they have most of the guest. */
const little = { bandwidth: 1e6 };

const resolve = (host: Host, proof: object): Promise<Settled<'source' | 'destination'>> =>
  host.call('resolve', { proof });

async function begin(
  mode: string,
  options: { listen?: object; migrate?: object; target?: () => number } = {},
) {
  const [[a, b], servers] = await Promise.all([hosts('a', 'b'), serversOf(mode)]);
  const port = await listen(b, {
    options: { grantTimeoutMs: 15_000, ...(servers.length > 0 ? little : {}), ...options.listen },
  });
  const proxy = await TcpProxy.start(options.target ?? port);
  await startGuest(a, regionsOf('allocate'));
  const ways = through(servers);
  const start = () => migrate(a, proxy.port, { inDoubtTimeoutMs, mode, ...ways, ...options.migrate });
  /** Whoever has the guest now has all of it, and the servers nothing of it any more. */
  const settled = () => Promise.all(servers.map((server) => expectEmpty(server)));
  return { a, b, port, proxy, ways, start, settled };
}

describe.each(['pre-copy', 'post-copy', 'scatter', 'scatter-pre-copy'])('%s', (mode) => {
  test('GRANT is lost with the connection: the source redials, asks, and grants again', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, { migrate: { inDoubtTimeoutMs: 15_000 } });
    const point = proxy.at(GRANT, 'cut');
    await start();
    await point.reached;
    expect(b.steps('g')).not.toContain('resume');
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectRuns(b);
    await expectStands(a);
    await expectIntact(a);
    await expectOneOwner([a, b]);
    expect(b.steps('g').filter((step) => step === 'resume')).toHaveLength(1);
    expect(a.steps('g')).not.toContain('unpause');
    await settled();
  });

  test('RESUMED is lost with the connection: the source asks and is told', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, { migrate: { inDoubtTimeoutMs: 15_000 } });
    const point = proxy.at(RESUMED, 'cut');
    await start();
    await point.reached;
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectRuns(b);
    await expectStands(a);
    await expectOneOwner([a, b]);
    expect(b.steps('g').filter((step) => step === 'resume')).toHaveLength(1);
    await settled();
  });

  test('the network goes silent at GRANT, and comes back', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, { migrate: { inDoubtTimeoutMs: 15_000 } });
    const point = proxy.at(GRANT, 'stall');
    await start();
    await point.reached;
    // The source notices by itself: nothing ended, only nothing is heard.
    await proxy.nextDial();
    expect(b.steps('g')).not.toContain('resume');
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectRuns(b);
    await expectOneOwner([a, b]);
    await settled();
  });

  test('the destination dies before GRANT arrives: in doubt, until a fence brings the guest back', async () => {
    const { a, b, proxy, ways, start, settled } = await begin(mode);
    const beforeA = await inventory(a);
    const point = proxy.at(GRANT, () => b.killNow());
    await start();
    await point.reached;
    const since = performance.now();
    expect((await failure(a)).code).toBe('MIGRATION_IN_DOUBT');
    // Not the bound that it would have by default, nor that of a recovery.
    expect(performance.now() - since).toBeLessThan(20_000);
    expect(a.states('migration', 'main').at(-1)).toBe('failed');
    await expectStands(a);
    expect(a.steps('g')).not.toContain('unpause');
    // Nothing but proof: asking nobody again leaves it in doubt.
    expect(await resolve(a, { askAgain: true })).toMatchObject({
      ok: false,
      error: { code: 'MIGRATION_IN_DOUBT' },
    });
    await expectStands(a);
    expect(await resolve(a, { fence: 'destination-dead' })).toEqual({ ok: true, value: 'source' });
    await expectRuns(a);
    await proxy.close();
    await expectNothingLeft(a, beforeA);

    const [fresh] = await hosts('fresh');
    await migrate(a, await listen(fresh), { mode, ...ways }, { key: 'again' });
    expect(await report(a, 'again')).toMatchObject({ verified: true });
    await expectRuns(fresh);
    await expectOneOwner([a, fresh]);
    await settled();
  });

  test('the destination dies after it resumed and before it said so: in doubt, and never run here', async () => {
    const { a, b, proxy, start } = await begin(mode);
    // Killed right there: a source that is kept waiting asks by itself, and is told.
    const point = proxy.at(RESUMED, () => b.killNow());
    await start();
    await point.reached;
    expect((await failure(a)).code).toBe('MIGRATION_IN_DOUBT');
    expect(b.steps('g')).toContain('resume');
    await expectStands(a);
    expect(a.steps('g')).toEqual(['pause', 'paused']);
  });

  test('in doubt, then the network heals and the destination says that it runs the guest', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, { listen: { grantTimeoutMs: 30_000 } });
    const point = proxy.at(RESUMED, 'cut');
    await start();
    await point.reached;
    expect((await failure(a)).code).toBe('MIGRATION_IN_DOUBT');
    await expectStands(a);
    proxy.heal();
    expect(await resolve(a, { askAgain: true })).toEqual({ ok: true, value: 'destination' });
    await expectStands(a);
    // What the destination has not yet is still to be had: its pages come from the source as before.
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
    await expectRuns(b);
    await expectOneOwner([a, b]);
    await settled();
  });

  test('in doubt, then the destination says that it gave up: the guest runs here again', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, { listen: { grantTimeoutMs: 4000 } });
    const beforeB = await inventory(b);
    const point = proxy.at(GRANT, 'cut');
    await start();
    await point.reached;
    expect((await failure(a)).code).toBe('MIGRATION_IN_DOUBT');
    await b.untilStep('g', 'abandon');
    proxy.heal();
    expect(await resolve(a, { askAgain: true })).toEqual({ ok: true, value: 'source' });
    await expectRuns(a);
    await expectOneOwner([a]);
    expect(b.steps('g')).not.toContain('resume');
    await proxy.close();
    await expectNothingLeft(b, beforeB);
    await settled();
  });

  test('the destination gave up waiting for GRANT: the redialling source is refused and runs the guest', async () => {
    const { a, b, proxy, start, settled } = await begin(mode, {
      listen: { grantTimeoutMs: 4000 },
      migrate: { inDoubtTimeoutMs: 20_000 },
    });
    const point = proxy.at(GRANT, 'cut');
    await start();
    await point.reached;
    await b.untilStep('g', 'abandon');
    proxy.heal();
    const error = await failure(a);
    expect(error.code).not.toBe('MIGRATION_IN_DOUBT');
    await expectRuns(a);
    await expectOneOwner([a]);
    expect(b.steps('g')).not.toContain('resume');
    await settled();
  });

  test('the destination was restarted after GRANT: the guest is lost, and only a fence brings it back', async () => {
    let target = 0;
    const { a, b, port, proxy, start, settled } = await begin(mode, {
      target: () => target,
      migrate: { inDoubtTimeoutMs: 15_000 },
    });
    target = port;
    const point = proxy.at(GRANT, () => b.killNow());
    await start();
    await point.reached;
    const [restarted] = await hosts('restarted');
    target = await listen(restarted);
    expect((await failure(a)).code).toBe('GUEST_LOST');
    await expectStands(a);
    expect((await resolve(a, { askAgain: true })).ok).toBe(false);
    await expectStands(a);
    expect(await resolve(a, { fence: 'destination-dead' })).toEqual({ ok: true, value: 'source' });
    await expectRuns(a);
    expect(restarted.steps('g')).toEqual([]);
    await settled();
  });
});
