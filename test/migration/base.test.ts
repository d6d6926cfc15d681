/**
 * A destination that starts from a base: whatever the base is worth, what arrives is what the journal of writes says,
 * byte by byte, and what was equal did not come.
 */
import { mkdtemp, open, rm, stat, truncate, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { change, changeWithLog, saveImages } from '../support/base-images.js';
import { endHosts, type Host } from '../support/host.js';
import {
  done,
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
  startGuest,
  startStages,
  via,
} from '../support/scenario.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

let directory = '';
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'memferry-base-'));
});
afterEach(async () => {
  await closeProxies();
  await endHosts();
  await rm(directory, { recursive: true, force: true });
});

const PAGE = 4096;
const quiet = { batch: 1, restMs: 200 };

/**
 * A link in front of `port` that is measured as very slow, and is not: what has to happen in 2 % of the time of sending
 * everything may take seconds then, on a busy machine too.
 */
async function slowAtFirst(port: number): Promise<number> {
  const proxy = await TcpProxy.start(port);
  const probed = proxy.at({ on: 'data', direction: 'up', name: 'probe' }, 'hold');
  probed.reached.then(
    () => setTimeout(() => probed.release(), 3000),
    () => {},
  );
  return proxy.port;
}

/** A guest on `a`, and image files of its regions as they are now. */
async function guestWithImages(
  a: Host,
  regions = regionsOf('allocate'),
  rate: object = quiet,
): Promise<string[]> {
  await startGuest(a, regions, { rate });
  return saveImages(a, directory, regions.length);
}

async function arrives(a: Host, b: Host, port: number, options: object = {}): Promise<Report> {
  await migrate(a, port, { base: 'always', ...options });
  const figures = await report(a);
  expect(figures).toMatchObject({ state: 'completed', verified: true });
  expect((await b.untilArrival('main/g', 'complete')).ok).toBe(true);
  await expectRuns(b);
  await expectIntact(b);
  await expectStands(a);
  await expectOneOwner([a, b]);
  return figures;
}

const modes = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const;

describe.each(modes)('%s', (mode) => {
  test('a base that is equal: next to nothing comes', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    const { base, pagesSent } = await arrives(a, b, await listen(b, { bases }), { mode });
    expect(base).toMatchObject({ used: true, reason: 'always', problem: null });
    expect(base?.pagesSame).toBeGreaterThan(0.9 * PAGES);
    expect(base?.pagesCompared).toBe(PAGES);
    // Pages of zeros would have cost next to nothing.
    expect(base?.bytesSaved).toBeGreaterThan(0.25 * PAGES * PAGE);
    expect(base?.bytesSaved).toBeLessThan((base?.pagesSame ?? 0) * PAGE);
    expect(pagesSent).toBeLessThan(0.1 * PAGES);
  });

  test('a fifth has changed', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await change(bases[0] as string, 5);
    const { base, bytesOnWire } = await arrives(a, b, await listen(b, { bases }), { mode });
    expect(base?.pagesSame).toBeGreaterThan(0.7 * PAGES);
    expect(base?.pagesSame).toBeLessThan(0.81 * PAGES);
    expect(bytesOnWire).toBeLessThan(0.3 * PAGES * PAGE);
  });

  test('everything has changed', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await change(bases[0] as string, 1);
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode });
    expect(base?.pagesSame).toBe(0);
  });

  test('a guest that writes as fast as it can', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a, [...regionsOf('allocate'), ...regionsOf('wasm-shared')], {
      batch: 64,
      restMs: 0,
    });
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode, maxRounds: 6 });
    expect(base?.used).toBe(true);
    expect(base?.pagesSame).toBeGreaterThan(0);
  });
});

describe('what a base may be', () => {
  test('shorter than the region', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await truncate(bases[0] as string, (PAGES / 2) * PAGE + 100);
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode: 'hybrid' });
    expect(base?.pagesSame).toBeGreaterThan(0.4 * PAGES);
  });

  test('longer than the region', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    const file = await open(bases[0] as string, 'a');
    await file.write(Buffer.alloc(10 * PAGE, 0xab));
    await file.close();
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode: 'post-copy' });
    expect(base?.pagesSame).toBeGreaterThan(0.9 * PAGES);
  });

  test.each([
    ['vanishes', (path: string) => unlink(path), 'ENOENT'],
    ['is empty', (path: string) => truncate(path, 0), 'empty'],
    ['is a directory', async () => {}, 'regular'],
  ])('a file that %s: everything comes', async (_, spoil, problem) => {
    const [a, b] = await hosts('a', 'b');
    const [path] = await guestWithImages(a);
    await spoil(path as string);
    const bases = [problem === 'regular' ? directory : path];
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode: 'post-copy' });
    expect(base).toMatchObject({ used: false, pagesSame: 0 });
    expect(base?.problem).not.toBeNull();
  });

  test.each(modes)('one of two regions: %s', async (mode) => {
    const [a, b] = await hosts('a', 'b');
    const paths = await guestWithImages(a, [...regionsOf('allocate'), ...regionsOf('shared')]);
    const { base } = await arrives(a, b, await listen(b, { bases: [null, paths[1]] }), { mode });
    expect(base?.pagesCompared).toBe(PAGES);
    expect(base?.pagesSame).toBeGreaterThan(0.9 * PAGES);
  });

  test('in place', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a, regionsOf('wasm'));
    await change(bases[0] as string, 3);
    const { base } = await arrives(a, b, await listen(b, { bases, inPlace: true }), { mode: 'pre-copy' });
    expect(base?.pagesSame).toBeGreaterThan(0.6 * PAGES);
  });

  test('one that is never ready is not waited for', async () => {
    const [a, b] = await hosts('a', 'b');
    await startGuest(a, regionsOf('allocate'), { rate: quiet });
    const port = await listen(b, { behaviour: { base: 'hang' } });
    const { base } = await arrives(a, b, port, { mode: 'post-copy', base: 'auto' });
    expect(base).toMatchObject({ used: false, reason: 'not-ready' });
  });

  test('asked for in any case, one that is never ready is waited for as long as was said', async () => {
    const [a, b] = await hosts('a', 'b');
    await startGuest(a, regionsOf('allocate'), { rate: quiet });
    const port = await listen(b, { behaviour: { base: 'hang' } });
    const { base } = await arrives(a, b, port, { mode: 'hybrid', baseTimeoutMs: 300 });
    expect(base).toMatchObject({ used: false, reason: 'not-ready' });
  });

  test.each(['hybrid', 'post-copy'])(
    '%s: by measured rates, over a link that is slower than hashing',
    async (mode) => {
      const [a, b] = await hosts('a', 'b');
      const bases = await guestWithImages(a);
      await change(bases[0] as string, 5);
      const port = await slowAtFirst(await listen(b, { bases }));
      const { base } = await arrives(a, b, port, { mode, base: 'auto' });
      expect(base).toMatchObject({ used: true, reason: 'saves' });
      expect(base?.pagesSame).toBeGreaterThan(0.7 * PAGES);
    },
  );

  test.each(['hybrid', 'post-copy'])(
    '%s: one that has nothing in common is let go after a sample',
    async (mode) => {
      const [a, b] = await hosts('a', 'b');
      const bases = await guestWithImages(a);
      await change(bases[0] as string, 1);
      const port = await slowAtFirst(await listen(b, { bases }));
      const { base } = await arrives(a, b, port, { mode, base: 'auto' });
      expect(base).toMatchObject({ used: false, reason: 'nothing-matches', pagesSame: 0 });
      expect(base?.pagesCompared).toBeLessThan(PAGES);
    },
  );

  test.each(['stop-and-copy', 'post-copy'])(
    '%s: where tracking hashes everything, none is compared unless asked for in any case',
    async (mode) => {
      const [a, b] = await hosts('a', 'b');
      const bases = await guestWithImages(a);
      const port = await listen(b, { bases });
      const { base } = await arrives(a, b, port, { mode, base: 'auto', tracker: 'hash-diff' });
      expect(base).toMatchObject({ used: false, reason: 'no-tracker', pagesCompared: 0 });
    },
  );

  test('post-copy: tracking that hashes everything, asked for', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    const { base } = await arrives(a, b, await listen(b, { bases }), {
      mode: 'post-copy',
      tracker: 'hash-diff',
    });
    expect(base?.pagesSame).toBeGreaterThan(0.8 * PAGES);
  });

  test('post-copy of a guest of which no tracker sees all: everything goes', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await a.call('behave', { guest: 'g', behaviour: { check: 'no-rounds' } });
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode: 'post-copy' });
    expect(base).toMatchObject({ used: false, reason: 'no-tracker', pagesCompared: 0 });
  });

  test('one that the source does not want is not even laid out', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    const { base } = await arrives(a, b, await listen(b, { bases }), { mode: 'hybrid', base: 'off' });
    expect(base).toBeNull();
  });
});

describe('scatter modes', () => {
  test.each(['scatter', 'scatter-pre-copy', 'scatter-hybrid'])(
    '%s: what is equal needs no server',
    async (mode) => {
      const [a, b] = await hosts('a', 'b');
      const [s, t] = await startStages('s', 't');
      const bases = await guestWithImages(a);
      await change(bases[0] as string, 4);
      const port = await listen(b, { bases });
      const { base } = await arrives(a, b, port, { mode, ...via(s, t) });
      expect(base?.used).toBe(true);
      // How many it has written since is the guest's business.
      expect(base?.pagesSame).toBeGreaterThan(0);
      await expectEmpty(s);
      await expectEmpty(t);
    },
  );
});

describe('a guest that comes back', () => {
  test.each(modes)('%s: to the stale copy that its host kept in a file', async (mode) => {
    const [a, b] = await hosts('a', 'b');
    await startGuest(a, regionsOf('allocate'), { rate: quiet });
    const portB = await listen(b, { rate: quiet });
    const keepStaleCopy = { directory, maxBytes: PAGES * PAGE };
    await migrate(a, portB, { mode, keepStaleCopy }, { key: 'there' });
    expect(await report(a, 'there')).toMatchObject({ verified: true, base: null });
    await expectRuns(b);
    const portA = await listen(a, { staleCopies: directory });
    await a.call('end', { guest: 'g' });
    await migrate(b, portA, { mode, base: 'always' }, { key: 'back' });
    const { base, verified } = await report(b, 'back');
    expect(verified).toBe(true);
    expect(base?.pagesSame).toBeGreaterThan(0.8 * PAGES);
    await expectRuns(a);
    await expectIntact(a);
    await expectStands(b);
  });

  test('its stale copy is for none but its hosts, whatever name a guest has', async () => {
    const [a, b, other] = await hosts('a', 'b', 'other');
    await startGuest(a, regionsOf('allocate'), { rate: quiet });
    const keepStaleCopy = { directory, maxBytes: PAGES * PAGE };
    await migrate(a, await listen(b, { rate: quiet }), { keepStaleCopy }, { key: 'there' });
    await report(a, 'there');
    const portA = await listen(a, { staleCopies: directory });
    await a.call('end', { guest: 'g' });
    await startGuest(other, regionsOf('allocate'), { rate: quiet });
    await migrate(other, portA, { base: 'always' });
    expect(await report(other)).toMatchObject({ verified: true, base: null });
    await expectRuns(a);
  });

  test('to the memory that it left', async () => {
    const [a, b] = await hosts('a', 'b');
    await startGuest(a, regionsOf('wasm-shared'), { rate: quiet });
    const portB = await listen(b, { rate: quiet });
    await migrate(a, portB, { mode: 'hybrid' }, { key: 'there' });
    await report(a, 'there');
    await expectRuns(b);
    const portA = await listen(a, { fromGuest: 'g' });
    await migrate(b, portA, { mode: 'hybrid', base: 'always' }, { key: 'back' });
    const { base } = await report(b, 'back');
    expect(base?.pagesSame).toBeGreaterThan(0.8 * PAGES);
    await expectRuns(a);
  });

  test('a budget that does not hold the guest keeps nothing, and says so', async () => {
    const [a, b] = await hosts('a', 'b');
    await startGuest(a, regionsOf('allocate'));
    const keepStaleCopy = { directory: join(directory, 'none'), maxBytes: PAGES * PAGE - 1 };
    await migrate(a, await listen(b), { keepStaleCopy });
    expect(await report(a)).toMatchObject({ state: 'completed' });
    await a.until('a warning', (event) => event['code'] === 'MEMFERRY_NO_STALE_COPY');
    await expect(stat(keepStaleCopy.directory)).rejects.toThrow();
  });
});

describe('replay', () => {
  /** As the test's log: an offset and a value. */
  /** A base in which every fifth page is other than the guest's, and the log that makes it equal again. */
  async function behind(a: Host): Promise<{ bases: string[]; replayLog: Uint8Array }> {
    const bases = await guestWithImages(a);
    return { bases, replayLog: await changeWithLog(bases[0] as string, 5) };
  }

  test('an exact log: what differed is equal', async () => {
    const [a, b] = await hosts('a', 'b');
    const { bases, replayLog } = await behind(a);
    const { base } = await arrives(a, b, await listen(b, { bases, replay: 'exact' }), { replayLog });
    expect(base?.pagesSame).toBeGreaterThan(0.95 * PAGES);
    expect(b.events.find(({ event }) => event === 'replay')).toMatchObject({ bytes: replayLog.length });
  });

  test.each(['diverge', 'throw'])('a log whose application does %s: exact all the same', async (replay) => {
    const [a, b] = await hosts('a', 'b');
    const { bases, replayLog } = await behind(a);
    const { base } = await arrives(a, b, await listen(b, { bases, replay }), {
      replayLog,
      mode: 'post-copy',
    });
    expect(base?.pagesSame).toBeGreaterThan(0.7 * PAGES);
    expect(base?.pagesSame).toBeLessThan(0.81 * PAGES);
  });

  test('one that never ends is called off', async () => {
    const [a, b] = await hosts('a', 'b');
    const { bases, replayLog } = await behind(a);
    const options = { replayLog, base: 'auto' };
    const { base } = await arrives(a, b, await listen(b, { bases, replay: 'hang' }), options);
    expect(base).toMatchObject({ replay: 'skipped' });
  });
});

describe('bad days during the comparison', () => {
  const points: { step: string; point: Point }[] = [
    { step: 'the probe', point: { on: 'data', direction: 'up', name: 'probe' } },
    { step: 'the base is ready', point: { on: 'control', direction: 'down', name: 'base-ready' } },
    { step: 'the first question', point: { on: 'data', direction: 'up', name: 'tree-request' } },
    { step: 'the hashes', point: { on: 'data', direction: 'down', name: 'tree' } },
    { step: 'the equal pages', point: { on: 'data', direction: 'up', name: 'same' } },
    { step: 'the end', point: { on: 'data', direction: 'up', name: 'base-end' } },
  ];

  describe.each(points)('$step', ({ point }) => {
    test.each(['killed', 'cut'])(
      '%s: the guest runs on at the source, and leaves later',
      async (disaster) => {
        const [a, b, fresh] = await hosts('a', 'b', 'fresh');
        const bases = await guestWithImages(a);
        await change(bases[0] as string, 5);
        const port = await listen(b, { bases });
        const proxy = await TcpProxy.start(port);
        const beforeA = await inventory(a);
        const deed = disaster === 'killed' ? () => b.killNow() : 'cut';
        const reached = proxy.at(point, deed);
        await migrate(a, proxy.port, { base: 'always', mode: 'post-copy' });
        await reached.reached;
        const { code } = await failure(a);
        expect(['PEER_LOST', 'CHANNEL_LOST', 'CONNECT_FAILED']).toContain(code);
        await expectRuns(a);
        expect(a.steps('g')).not.toContain('pause');
        if (disaster === 'cut') await b.untilStep('g', 'abandon');
        await proxy.close();
        await expectNothingLeft(a, beforeA);
        const again = await listen(fresh, { bases });
        await migrate(a, again, { base: 'always' }, { key: 'again' });
        expect(await done(a, 'again')).toMatchObject({ ok: true, value: { verified: true } });
        await expectRuns(fresh);
        await expectIntact(a);
      },
    );
  });

  test('a destination that is killed after the switch loses the guest as ever, and says so', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await change(bases[0] as string, 1);
    const port = await listen(b, { bases });
    const proxy = await TcpProxy.start(port);
    const point: Point = { on: 'data', direction: 'up', name: 'pages', nth: 2 };
    const reached = proxy.at(point, () => b.killNow());
    await migrate(a, proxy.port, {
      inDoubtTimeoutMs: 2000,
      recoverTimeoutMs: 2000,
      base: 'always',
      mode: 'post-copy',
    });
    await reached.reached;
    const { code } = await failure(a);
    expect(['GUEST_LOST', 'MIGRATION_IN_DOUBT', 'RECOVERY_TIMEOUT']).toContain(code);
  });

  test('a cut after the switch: confirmed pages are not sent again', async () => {
    const [a, b] = await hosts('a', 'b');
    const bases = await guestWithImages(a);
    await change(bases[0] as string, 2);
    const port = await listen(b, { bases });
    const proxy = await TcpProxy.start(port);
    const point: Point = { on: 'data', direction: 'up', name: 'pages', nth: 2 };
    const reached = proxy.at(point, 'cut');
    await migrate(a, proxy.port, { base: 'always', mode: 'post-copy' });
    await reached.reached;
    proxy.heal();
    const { base, redials, verified, pagesSent, pagesResent } = await report(a);
    expect(verified).toBe(true);
    expect(redials).toBeGreaterThan(0);
    expect(base?.pagesSame).toBeGreaterThan(0.4 * PAGES);
    expect(pagesSent - pagesResent).toBeLessThan(0.6 * PAGES);
    await expectRuns(b);
  });
});
