/**
 * A destination written in C (examples/embed/destination.c, over libmemferry.so) receives from a source written in
 * TypeScript: every mode that it takes, and the bad days between PREPARE and RESUMED.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts } from '../support/host.js';
import {
  expectIntact,
  expectOneOwner,
  expectRuns,
  expectStands,
  failure,
  hosts,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';
import type { Host, Settled, Status } from '../support/host.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';
import { CDestination, endDestinations } from './c-destination.js';

afterEach(async () => {
  await closeProxies();
  await endDestinations();
  await endHosts();
});

/** Under ThreadSanitizer: which mode it is makes little difference to the destination's threads, but takes its time. */
const watched = process.env['MEMFERRY_EMBED_WATCHED'] !== undefined;
const MODES = watched ? ['hybrid'] : ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'];
const MODES_BETWEEN = watched ? ['post-copy'] : ['pre-copy', 'post-copy'];
const GRANT: Point = { on: 'control', direction: 'up', name: 'grant' };
const RESUMED: Point = { on: 'control', direction: 'down', name: 'resumed' };
const bounds = { inDoubtTimeoutMs: 1500, recoverTimeoutMs: 8000 };

async function expectHandedOver(a: Host, c: CDestination): Promise<void> {
  const { intervals } = await a.call<Status>('status', { guest: 'g' });
  const [first] = await c.interval();
  expect(intervals.length).toBeGreaterThan(0);
  for (const [, last] of intervals) expect(last).toBeLessThan(first);
}

async function begin(mode: string, options: Record<string, string | number> = {}, more: object = {}) {
  const [a] = await hosts('a');
  const c = await CDestination.start({
    'grant-timeout-ms': 15_000,
    'recover-timeout-ms': 8000,
    ...options,
  });
  const proxy = await TcpProxy.start(c.port);
  await startGuest(a, regionsOf('allocate'));
  const start = () => migrate(a, proxy.port, { ...bounds, mode, ...more });
  return { a, c, proxy, start };
}

describe.each(MODES)('%s', (mode) => {
  test.each([1, 4])('over %i channels', async (channels) => {
    const [a] = await hosts('a');
    const c = await CDestination.start();
    await startGuest(a, [...regionsOf('allocate'), ...regionsOf('shared')]);
    await migrate(a, c.port, { mode, channels, compress: 'lz4', dedup: false });
    expect(await report(a)).toMatchObject({ mode, state: 'completed', verified: true });
    expect(await c.until('complete')).toMatchObject({ verified: true });
    await c.until('ended');
    await expectStands(a);
    await expectIntact(a);
    await expectHandedOver(a, c);
    await c.expectSameAs(a, 2);
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
});

describe('what it does not take', () => {
  test('a guest that is larger than its limit', async () => {
    const [a] = await hosts('a');
    const c = await CDestination.start({ 'max-bytes': 2 ** 20 });
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, c.port, { mode: 'pre-copy' });
    expect((await failure(a)).code).toBe('NO_MEMORY');
    await expectRuns(a);
  });

  test('another secret', async () => {
    const [a] = await hosts('a');
    const c = await CDestination.start();
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, c.port, { mode: 'pre-copy', secret: 'a secret that is none of theirs' });
    expect((await failure(a)).code).toBe('AUTH_FAILED');
    await expectRuns(a);
    expect(c.names).toEqual(['listening']);
  });
});

describe('before the commit', () => {
  test.each(['fail', 'hang'])('prepare: %s', async (prepare) => {
    const { a, c, start } = await begin('hybrid', {
      prepare,
      ...(prepare === 'hang' ? { 'prepare-timeout-ms': 1000 } : {}),
    });
    await start();
    expect((await failure(a)).code).toBe(prepare === 'fail' ? 'PREPARE_FAILED' : 'PREPARE_TIMEOUT');
    await c.until('abandon');
    await c.until('ended');
    expect(c.names).not.toContain('resume');
    await expectRuns(a);
    await expectOneOwner([a]);
  });

  const points: [string, string, Point][] = [
    ['pre-copy', 'in a round', { on: 'data', direction: 'up', name: 'pages', nth: 3 }],
    ['post-copy', 'at the switch', { on: 'data', direction: 'up', name: 'switch' }],
    ['hybrid', 'at PREPARE', { on: 'control', direction: 'up', name: 'prepare' }],
    ['post-copy', 'at READY', { on: 'control', direction: 'down', name: 'ready' }],
  ];
  describe.each(points)('%s, %s', (mode, _, at) => {
    test.each(['cut', 'killed'])('%s', async (disaster) => {
      const { a, c, proxy, start } = await begin(mode, {
        'grant-timeout-ms': 1500,
        'recover-timeout-ms': 1500,
      });
      const point = proxy.at(at, disaster === 'cut' ? 'cut' : () => c.killNow());
      await start();
      await point.reached;
      expect(['PEER_LOST', 'CHANNEL_LOST', 'CONNECT_FAILED', 'PREPARE_TIMEOUT']).toContain(
        (await failure(a)).code,
      );
      await expectRuns(a);
      await expectOneOwner([a]);
      if (disaster === 'cut') await c.until('ended');
      expect(c.names).not.toContain('resume');
    });
  });
});

describe.each(MODES_BETWEEN)('between READY and RESUMED, %s', (mode) => {
  test('GRANT is lost with the connection: the source asks, and grants again', async () => {
    const { a, c, proxy, start } = await begin(mode, {}, { inDoubtTimeoutMs: 15_000 });
    const point = proxy.at(GRANT, 'cut');
    await start();
    await point.reached;
    expect(c.names).not.toContain('resume');
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectStands(a);
    await c.until('complete');
    await expectHandedOver(a, c);
    await c.expectSameAs(a, 1);
    expect(c.names.filter((name) => name === 'resume')).toHaveLength(1);
  });

  test('RESUMED is lost with the connection: the source asks and is told', async () => {
    const { a, c, proxy, start } = await begin(mode, {}, { inDoubtTimeoutMs: 15_000 });
    const point = proxy.at(RESUMED, 'cut');
    await start();
    await point.reached;
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectStands(a);
    await expectHandedOver(a, c);
    expect(c.names.filter((name) => name === 'resume')).toHaveLength(1);
  });

  test('the destination gave up waiting for GRANT: the redialling source is refused and runs the guest', async () => {
    const { a, c, proxy, start } = await begin(
      mode,
      { 'grant-timeout-ms': 4000 },
      { inDoubtTimeoutMs: 20_000 },
    );
    const point = proxy.at(GRANT, 'cut');
    await start();
    await point.reached;
    await c.until('ended');
    proxy.heal();
    expect((await failure(a)).code).not.toBe('MIGRATION_IN_DOUBT');
    await expectRuns(a);
    await expectOneOwner([a]);
    expect(c.names).not.toContain('resume');
  });

  test('the destination dies before GRANT arrives: in doubt, until a fence brings the guest back', async () => {
    const { a, c, proxy, start } = await begin(mode);
    const point = proxy.at(GRANT, () => c.killNow());
    await start();
    await point.reached;
    expect((await failure(a)).code).toBe('MIGRATION_IN_DOUBT');
    await expectStands(a);
    const fenced = await a.call<Settled<string>>('resolve', { proof: { fence: 'destination-dead' } });
    expect(fenced).toEqual({ ok: true, value: 'source' });
    await expectRuns(a);
  });
});

describe('after the commit', () => {
  const PAGES: Point = { on: 'data', direction: 'up', name: 'pages', nth: 4 };

  test('a cut in the push: the guest waits, and goes on with every byte right', async () => {
    const { a, c, proxy, start } = await begin('post-copy');
    const point = proxy.at(PAGES, 'cut');
    await start();
    await point.reached;
    await c.until('resume');
    proxy.heal();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await c.until('complete');
    await expectHandedOver(a, c);
    await c.expectSameAs(a, 1);
  });

  test('a source that dies in the push: the loss is told, then access fails', async () => {
    const { a, c, proxy, start } = await begin('post-copy', { 'recover-timeout-ms': 1500 });
    const point = proxy.at(PAGES, () => process.kill(a.pid, 'SIGKILL'));
    await start();
    await point.reached;
    expect((await c.until('lost'))['pages']).toBeGreaterThan(0);
    expect(await c.until('failed')).toMatchObject({ code: 'PAGES_LOST' });
    expect(c.names.indexOf('failed')).toBeLessThan(c.names.indexOf('lost'));
  });
});
