/**
 * The guest runs at the destination and its pages are on their way when something breaks. A cut is survived: the
 * guest waits, both sides say so, and every byte is right afterwards. What is lost for good is named first, and
 * then reading it fails; it never reads as zeros.
 */
import { readdirSync, readFileSync } from 'node:fs';
import { afterEach, describe, expect, test } from 'vitest';
import { maxEpochs } from '../../lib/protocol/epochs.js';
import { endHosts, type Host } from '../support/host.js';
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
  type Stage,
  serversOf,
  startGuest,
  through,
} from '../support/scenario.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

afterEach(async () => {
  await closeProxies();
  await endHosts();
});

const RESUMED: Point = { on: 'control', direction: 'down', name: 'resumed' };
const PUSHED: Point = { on: 'data', direction: 'up', name: 'pages' };

interface Run {
  a: Host;
  b: Host;
  proxy: TcpProxy;
  servers: Stage[];
}

/**
 * A migration held at the moment when the destination has resumed and the source does not know yet. Not for long: half a
 * second after GRANT the source asks by itself. What is to happen in the push is set up before anything is waited for.
 */
async function resumedUnknown(
  mode: string,
  recoverTimeoutMs: number,
  rate = {},
  more = {},
): Promise<Run & { go(): void }> {
  const [[a, b], servers] = await Promise.all([hosts('a', 'b'), serversOf(mode)]);
  const port = await listen(b, { options: { recoverTimeoutMs }, rate });
  const proxy = await TcpProxy.start(port);
  await startGuest(a, regionsOf('allocate'));
  const point = proxy.at(RESUMED, 'hold');
  const written = mode.endsWith('hybrid')
    ? proxy.at({ on: 'data', direction: 'up', name: 'barrier' }, 'hold')
    : null;
  await migrate(a, proxy.port, {
    mode,
    hybridRounds: 1,
    channels: 2,
    inDoubtTimeoutMs: 20_000,
    recoverTimeoutMs,
    ...through(servers),
    ...more,
  });
  if (written) {
    await written.reached;
    // Some of it was sent before, so that there is something to push.
    for (let i = 0; i < 8; i++) await a.call('untilWrites', { guest: 'g' });
    written.release();
  }
  await point.reached;
  return { a, b, proxy, servers, go: () => point.release() };
}

/** A guest that runs and writes nothing, so that it asks for no page by itself. */
const idle = { batch: 0, restMs: 100_000 };

describe.each(['post-copy', 'hybrid', 'scatter', 'scatter-hybrid'])('%s', (mode) => {
  test('a cut in the push is survived', async () => {
    // Else servers have taken the rest, and the destination has it from them, before anybody misses the connection.
    const slowly = mode.startsWith('scatter') ? { bandwidth: 1e6 } : {};
    const rate = { batch: 1, restMs: 50 };
    const { a, b, proxy, servers, go } = await resumedUnknown(mode, 30_000, rate, slowly);
    const point = proxy.at(PUSHED, 'cut');
    go();
    await point.reached;
    await Promise.all([
      a.untilState('migration', 'main', 'postcopy-paused'),
      b.untilState('arrival', 'main/g', 'postcopy-paused'),
    ]);
    proxy.heal();
    const figures = await report(a);
    expect(figures).toMatchObject({ state: 'completed', verified: true });
    expect(figures.redials).toBeGreaterThanOrEqual(1);
    expect(a.states('migration', 'main')).toEqual(
      expect.arrayContaining(['postcopy-active', 'postcopy-paused', 'postcopy-recover', 'completed']),
    );
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
    await expectRuns(b);
    await expectStands(a);
    await expectOneOwner([a, b]);
    for (const server of servers) await expectEmpty(server);
  });
});

describe('a cut again while it recovers', () => {
  const again: Point[] = [
    { on: 'demand', direction: 'up', name: 'hello', fromEpoch: 1 },
    { on: 'demand', direction: 'down', name: 'bitmap', fromEpoch: 1 },
    { on: 'demand', direction: 'down', name: 'bitmap-end', fromEpoch: 1 },
    { on: 'data', direction: 'up', name: 'hello', fromEpoch: 1, nth: 2 },
    { on: 'data', direction: 'up', name: 'pages', fromEpoch: 1 },
    { on: 'data', direction: 'down', name: 'barrier-ack', fromEpoch: 1 },
  ];
  test.each(again.map((point) => [`${point.on} ${point.direction} ${point.name}`, point] as const))(
    'at %s',
    async (_, where) => {
      const { a, b, proxy, go } = await resumedUnknown('post-copy', 30_000);
      const first = proxy.at(PUSHED, 'cut');
      go();
      await first.reached;
      const second = proxy.at(where, 'cut');
      proxy.heal();
      await second.reached;
      proxy.heal();
      expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
      await expectRuns(b);
      await expectOneOwner([a, b]);
    },
  );
});

test('more cuts than there are tokens in advance', async () => {
  const rate = { batch: 1, restMs: 50 };
  const { a, b, proxy, go } = await resumedUnknown('post-copy', 30_000, rate, { bandwidth: 4e5 });
  const pieces = () => proxy.counts.get('data up pages') ?? 0;
  const first = proxy.at(PUSHED, 'cut');
  go();
  await first.reached;
  proxy.heal();
  for (let cuts = 1; cuts < maxEpochs + 16; cuts++) {
    // Something gets through each time: without that, so many are the end.
    const before = pieces();
    await expect.poll(pieces, { timeout: 20_000, interval: 2 }).toBeGreaterThan(before + 1);
    proxy.cut();
    proxy.heal();
  }
  const figures = await report(a);
  expect(figures).toMatchObject({ state: 'completed', verified: true });
  expect(figures.redials).toBeGreaterThanOrEqual(maxEpochs);
  await expectRuns(b);
  await expectStands(a);
  await expectOneOwner([a, b]);
});

test('whoever reads a missing page during a cut waits, and gets the right bytes', async () => {
  const { a, b, proxy, go } = await resumedUnknown('post-copy', 30_000, idle);
  const point = proxy.at(PUSHED, 'cut');
  const expected = await a.call<number>('touch', { guest: 'g', index: 0, page: 42 });
  go();
  await point.reached;
  await b.untilState('arrival', 'main/g', 'postcopy-paused');
  let answered = false;
  const reading = b.call<number>('touch', { guest: 'g', index: 0, page: 42 }).finally(() => {
    answered = true;
  });
  // The process itself goes on: another of its threads answers, the reader does not.
  for (let i = 0; i < 5; i++) await b.call('inventory');
  expect(answered).toBe(false);
  proxy.heal();
  expect(await reading).toBe(expected);
  expect(await report(a)).toMatchObject({ verified: true });
  await expectIntact(b);
});

describe('past the bound', () => {
  const lostOf = (host: Host) =>
    host.call<{ region: number; first: number; count: number }[]>('lost', { guest: 'g' });

  async function cutForGood(disaster: 'cut' | 'killed', mode = 'post-copy') {
    // What servers are sent arrives there, whatever becomes of the source.
    const slowly = mode === 'scatter' ? { bandwidth: 2e6 } : {};
    const run = await resumedUnknown(mode, 2000, idle, slowly);
    const { a, b, proxy, go } = run;
    // Some of the pages have come, on each channel.
    const point = proxy.at(
      { ...PUSHED, nth: mode === 'scatter' ? 1 : 5 },
      disaster === 'cut' ? 'cut' : () => a.killNow(),
    );
    go();
    await point.reached;
    const since = performance.now();
    const complete = await b.untilArrival('main/g', 'complete');
    expect(performance.now() - since).toBeLessThan(20_000);
    expect(complete).toMatchObject({ ok: false, error: { code: 'PAGES_LOST' } });
    await b.untilStep('g', 'lost');
    const runs = await lostOf(b);
    expect(runs.length).toBeGreaterThan(0);
    expect((complete.error as { facts: object }).facts).toMatchObject({ runs });
    return { ...run, runs };
  }

  test.each([
    ['cut', 'post-copy'],
    ['killed', 'post-copy'],
    ['killed', 'scatter'],
  ] as const)(
    'the source is gone (%s, %s): the lost pages are named, the others are right, and the guest can be ended',
    async (disaster, mode) => {
      const { a, b, runs } = await cutForGood(disaster, mode);
      const check = await b.call<{ wrong: unknown[]; pages: number }>('check', { guest: 'g', except: runs });
      expect(check.wrong).toEqual([]);
      const lost = runs.reduce((sum, { count }) => sum + count, 0);
      expect(check.pages).toBe(1024 - lost);
      if (disaster === 'cut') {
        expect(['GUEST_LOST', 'PAGES_LOST', 'PEER_LOST']).toContain((await failure(a)).code);
        await expectStands(a);
        expect(a.steps('g')).not.toContain('unpause');
      }
      await b.call('end', { guest: 'g' });
    },
  );

  test('the way to the destination is cut for good while servers take part: they have the rest', async () => {
    const { a, b, proxy, servers, go } = await resumedUnknown('scatter', 5000, idle, { bandwidth: 2e6 });
    const point = proxy.at(PUSHED, 'cut');
    go();
    await point.reached;
    await b.untilState('arrival', 'main/g', 'postcopy-paused');
    expect(await a.until('evicted', (event) => event.event === 'evicted')).toMatchObject({ ok: true });
    expect(await b.untilArrival('main/g', 'complete')).toMatchObject({ ok: true });
    await expectIntact(b);
    await expectStands(a);
    await expectOneOwner([a, b]);
    for (const server of servers) await expectEmpty(server);
  });

  // No connection ends, and nobody waits for a page: 10 s of silence, 30 s for the answer to the destination's own question.
  test('the source is stopped, and the guest touches nothing: it is noticed all the same', async () => {
    const { a, b, proxy, go } = await resumedUnknown('post-copy', 2000, idle);
    const point = proxy.at({ ...PUSHED, nth: 5 }, () => void process.kill(a.pid, 'SIGSTOP'));
    go();
    await point.reached;
    const since = performance.now();
    await b.untilState('arrival', 'main/g', 'postcopy-paused', 60_000);
    expect(performance.now() - since).toBeGreaterThan(30_000);
    const complete = await b.untilArrival('main/g', 'complete', 20_000);
    expect(complete).toMatchObject({ ok: false, error: { code: 'PAGES_LOST' } });
    await b.untilStep('g', 'lost');
    const runs = await lostOf(b);
    const lost = runs.reduce((sum, { count }) => sum + count, 0);
    expect(lost).toBeGreaterThan(0);
    const check = await b.call<{ wrong: unknown[]; pages: number }>('check', { guest: 'g', except: runs });
    expect(check).toMatchObject({ wrong: [], pages: 1024 - lost });
    process.kill(a.pid, 'SIGCONT');
    point.release();
    expect(['GUEST_LOST', 'PAGES_LOST', 'PEER_LOST']).toContain((await failure(a)).code);
    await expectStands(a);
    await b.call('end', { guest: 'g' });
  }, 120_000);

  test('reading a lost page ends its process by SIGBUS, and reads no zeros', async () => {
    const { b, runs } = await cutForGood('cut');
    const first = runs[0]?.first as number;
    await expect(b.call('touch', { guest: 'g', index: 0, page: first })).rejects.toThrow();
    expect(await b.exited).toMatchObject({ signal: 'SIGBUS' });
  });

  test('who waits for a page when it is lost does not wait for ever', async () => {
    const { a, b, proxy, go } = await resumedUnknown('post-copy', 2000, idle);
    const point = proxy.at(PUSHED, 'cut');
    go();
    await point.reached;
    const reading = b.call('touch', { guest: 'g', index: 0, page: 1000 });
    await expect(reading).rejects.toThrow();
    expect(await b.exited).toMatchObject({ signal: 'SIGBUS' });
    // The loss had been reported before that.
    expect(b.steps('g')).toContain('lost');
    expect(['GUEST_LOST', 'PAGES_LOST', 'PEER_LOST']).toContain((await failure(a)).code);
  });
});

test('the destination is killed while its pages come: the source says that the guest is lost, and never runs it', async () => {
  const { a, b, proxy, go } = await resumedUnknown('post-copy', 2000);
  const point = proxy.at({ ...PUSHED, nth: 3 }, () => b.killNow());
  const before = await inventory(a);
  go();
  await point.reached;
  const since = performance.now();
  expect(await failure(a)).toMatchObject({ code: 'GUEST_LOST', facts: { pages: expect.any(Number) } });
  expect(performance.now() - since).toBeLessThan(20_000);
  await expectStands(a);
  expect(a.steps('g')).not.toContain('unpause');
  // It ran there and is gone: not even proof that the destination is dead makes our old copy the guest.
  expect((await a.call<{ ok: boolean }>('resolve', { proof: { fence: 'destination-dead' } })).ok).toBe(false);
  await expectStands(a);
  await proxy.close();
  expect((await inventory(a)).registered).toBeLessThanOrEqual(before.registered);
});

/** One of its threads stands in the kernel until a page comes. */
function waitsForPage({ pid }: Host): boolean {
  return readdirSync(`/proc/${pid}/task`).some((task) => {
    try {
      return readFileSync(`/proc/${pid}/task/${task}/wchan`, 'utf8').includes('handle_userfault');
    } catch {
      return false; // it has ended meanwhile
    }
  });
}

describe('an end in the middle of post-copy does not hang', () => {
  test.each(['worker.terminate', 'process.exit', 'the listener closed', 'the arrival disposed'])(
    '%s',
    async (how) => {
      const { b, proxy, go } = await resumedUnknown('post-copy', 60_000, idle);
      const point = proxy.at(PUSHED, 'cut');
      go();
      await point.reached;
      await b.untilState('arrival', 'main/g', 'postcopy-paused');
      const reading = b.call('touch', { guest: 'g', index: 0, page: 1000 }).catch(() => 'ended');
      await expect.poll(() => waitsForPage(b)).toBe(true);
      if (how === 'process.exit') {
        await b.call('exit', { code: 7 });
        // Poisoned and woken: the reader may get its SIGBUS before the process is out.
        const { code, signal } = await b.exited;
        expect([7, 'SIGBUS']).toContain(signal ?? code);
      } else if (how === 'worker.terminate') {
        await b.call('disposeArrival', { key: 'main/g' }).catch(() => {});
        await b.call('terminateWriter', { guest: 'g' }).catch(() => {});
      } else if (how === 'the listener closed') {
        await b.call('closeListener').catch(() => {});
      } else {
        await b.call('disposeArrival', { key: 'main/g' }).catch(() => {});
      }
      expect(await reading).toBe('ended');
      // What JavaScript itself reads and cannot have is the end of its process, at once and not silently.
      if (how !== 'process.exit') expect(await b.exited).toMatchObject({ signal: 'SIGBUS' });
    },
  );
});

test('nothing is left on either side after a recovered migration', async () => {
  const [a, b] = await hosts('a', 'b');
  const beforeB = await inventory(b);
  const port = await listen(b, { options: { recoverTimeoutMs: 30_000 } });
  const proxy = await TcpProxy.start(port);
  await startGuest(a, regionsOf('allocate'));
  const beforeA = await inventory(a);
  const cut = proxy.at({ ...PUSHED, nth: 3 }, 'cut');
  await migrate(a, proxy.port, { mode: 'post-copy', recoverTimeoutMs: 30_000 });
  await cut.reached;
  proxy.heal();
  expect(await report(a)).toMatchObject({ verified: true });
  await expectRuns(b);
  await b.call('end', { guest: 'g' });
  await b.call('closeListener');
  await proxy.close();
  await expectNothingLeft(a, beforeA);
  await expectNothingLeft(b, beforeB);
});

test('a source that is closed during a cut does not wait for its end, and says what was lost', async () => {
  const { a, b, proxy, go } = await resumedUnknown('post-copy', 60_000, idle);
  const point = proxy.at({ ...PUSHED, nth: 2 }, 'cut');
  go();
  await point.reached;
  await a.untilState('migration', 'main', 'postcopy-paused');
  // Nor for the minute that it would go on redialling.
  await a.call('dispose', {}, 20_000);
  expect(await failure(a)).toMatchObject({ code: 'GUEST_LOST', facts: { pages: expect.any(Number) } });
  await expectStands(a);
  expect(b.alive).toBe(true);
});
