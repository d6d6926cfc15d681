/** A guest that a C program parks (memferry_park_*), through VMD servers in processes of their own, on good and bad days. */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { spawnSync } from 'node:child_process';
import { afterEach, describe, expect, test } from 'vitest';
import { Region, type ParkTicket, unpark } from '../../src/index.js';
import { endHosts } from '../support/host.js';
import {
  expectEmpty,
  SECRET,
  type Stage,
  stageStatus,
  startStage,
  startStages,
} from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';
import { contentOf, CParker, endParkers, type Said } from './c-parker.js';

const MIB = 2 ** 20;
const regions: Region[] = [];

afterEach(async () => {
  await endParkers();
  await closeProxies();
  await endHosts();
  for (const region of regions.splice(0)) region.close();
});

/** Claims it, and has every byte of it here. */
async function expectClaimed(ticket: ParkTicket, contents: readonly Buffer[]): Promise<void> {
  let state: Uint8Array | null = null;
  const unparked = await unpark(ticket, {
    secret: SECRET,
    recoverTimeoutMs: 8000,
    accept: (offer) => {
      const own = offer.regions.map(({ lengthBytes }) => Region.allocate({ lengthBytes }));
      regions.push(...own);
      return {
        regions: own,
        prepare: async (given: Uint8Array) => {
          state = Uint8Array.from(given);
        },
        resume: () => {},
        abandon: () => {},
      };
    },
  });
  try {
    expect(unparked.offer).toMatchObject({ name: 'parked in C', module: null, description: { cpus: 2 } });
    expect(unparked.offer.regions.map(({ name }) => name)).toEqual(contents.map((_, at) => `memory ${at}`));
    expect(await unparked.complete).toMatchObject({ verified: true });
    expect(state).toEqual(Uint8Array.of(1, 2, 3));
    for (const [index, content] of contents.entries()) {
      const view = unparked.regions[index]?.views[0] as Uint8Array;
      expect(Buffer.compare(view, content)).toBe(0);
    }
  } finally {
    await unparked[Symbol.asyncDispose]();
  }
}

async function phase(stage: Stage): Promise<string | undefined> {
  return (await stageStatus(stage)).held[0]?.phase;
}

/** It is where it was, nobody can have it, and no server keeps anything. */
async function expectHere(parker: CParker, stages: readonly Stage[], boundMs?: number): Promise<void> {
  expect(await parker.same()).toBe(true);
  for (const stage of stages) await expectEmpty(stage, boundMs);
}

test.each([
  [1, 'off'],
  [1, 'auto'],
  [2, 'lz4'],
  [2, 'zstd'],
] as const)(
  '%i replicas, compression %s: every byte of two regions, and claimed once',
  async (replicas, compress) => {
    const stages = await startStages('i', 'j', 'k');
    const contents = [contentOf(1500), contentOf(300, 7)];
    const parker = await CParker.start(stages, { replicas, compress }, contents);
    await expect(unpark(parker.ticket, { secret: SECRET })).rejects.toMatchObject({ code: 'VMD_REFUSED' });
    expect(await parker.evict()).toMatchObject({ code: 'OK' });
    const stats = await parker.stats();
    expect(stats).toMatchObject({ pagesPending: 0, servers: 3, serversFailed: 0 });
    expect(stats['evictionMs']).toBeGreaterThan(0);
    // A second time it is what it is.
    expect(await parker.evict()).toMatchObject({ code: 'OK' });
    const held = await Promise.all(stages.map(stageStatus));
    expect(held.map((status) => status.held[0]?.phase)).toEqual(['parked', 'parked', 'parked']);
    await parker.close();
    await parker.end();
    await expectClaimed(parker.ticket, contents);
    for (const stage of stages) await expectEmpty(stage);
  },
);

test('park.c, and unpark.c', async () => {
  const stages = await startStages('i', 'j');
  const programs = process.env['MEMFERRY_EMBED_PROGRAMS'] ?? '';
  const directory = mkdtempSync(join(tmpdir(), 'memferry-park-'));
  try {
    const run = (program: string, ...args: string[]) =>
      spawnSync(join(programs, program), args, {
        env: { ...process.env, MEMFERRY_SECRET: SECRET },
        encoding: 'utf8',
        timeout: 50_000,
      });
    const [ticket, memory] = [join(directory, 'ticket'), join(directory, 'memory')];
    writeFileSync(memory, contentOf(2048));
    const servers = stages.map(({ port }) => `127.0.0.1:${port}`);
    const parked = run('park', ticket, memory, ...servers);
    expect(`${parked.status}: ${parked.stderr}`).toBe('0: ');
    expect(parked.stdout).toMatch(/^'sample' is parked after \d+ ms: \d+ pages at 2 servers\n$/);
    const unparked = run('unpark', ticket, directory);
    expect(`${unparked.status}: ${unparked.stderr}`).toBe('0: ');
    expect(unparked.stdout).toMatch(/^'sample' runs here: 4 bytes of state/);
    expect(readFileSync(join(directory, '0')).equals(readFileSync(memory))).toBe(true);
    for (const stage of stages) await expectEmpty(stage);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});

describe('no image is made', () => {
  test('a server that is dead is passed over; where all are, it says so', async () => {
    const [i, j] = await startStages('i', 'j');
    await i.host.kill();
    const parker = await CParker.start([i, j]);
    expect(parker.ticket.home).toBe(`127.0.0.1:${j.port}`);
    expect(await parker.evict()).toMatchObject({ code: 'OK' });
    await expectClaimed(parker.ticket, parker.contents);
    await j.host.kill();
    expect(await CParker.refused([i, j])).toMatchObject({ code: 'CONNECT_FAILED' });
  });

  test('no room, with the numbers and who did not answer; another secret', async () => {
    const [i, j] = [await startStage('i', { memoryBytes: 16 * MIB }), await startStage('j')];
    await j.host.kill();
    const small = await CParker.refused([i, j], {}, { pages: 5000 });
    expect(small).toMatchObject({ code: 'VMD_CAPACITY' });
    expect(small.text).toContain(`${5000 * 4096} bytes`);
    expect(small.text).toContain(`127.0.0.1:${j.port}`);
    // Two copies of each page have to be at two servers.
    expect(await CParker.refused([i], { replicas: 2 })).toMatchObject({ code: 'VMD_CAPACITY' });
    // One server by two addresses is one.
    const again = await CParker.refused([i, await TcpProxy.start(i.port)]);
    expect(again).toMatchObject({ code: 'INVALID_ARGUMENT', text: expect.stringContaining('named twice') });
    const stranger = await CParker.refused([i], {}, { secret: 'a secret that is none of theirs' });
    expect(stranger).toMatchObject({ code: 'AUTH_FAILED' });
    await expectEmpty(i);
  });

  test('one server refuses the image: the others let go of it', async () => {
    const stages = [await startStage('i'), await startStage('j', { maxImages: 1 })];
    const first = await CParker.start(stages.slice(1));
    const second = await CParker.refused(stages);
    expect(second).toMatchObject({ code: 'VMD_CAPACITY' });
    expect(second.text).toContain('j');
    await expectEmpty(stages[0] as Stage);
    // Closed before it was evicted.
    expect(await first.close()).toMatchObject({ code: 'OK' });
    await expectEmpty(stages[1] as Stage);
  });
});

describe('in the middle', () => {
  const pace = { bandwidth: 8 * MIB, 'stall-timeout-ms': 2000 };

  /** In front of a server that dies when more of the guest's pages come to it. */
  async function dying({ port, host }: Stage): Promise<TcpProxy> {
    const proxy = await TcpProxy.start(port);
    proxy.at({ on: 'stage', channel: 0, direction: 'up', name: 'pages', nth: 3 }, () => {
      host.killNow();
      void proxy.close();
    });
    return proxy;
  }

  test.each([1, 2] as const)(
    'a server is killed: its pages go to the others; %i replicas',
    async (replicas) => {
      const [i, j, k] = await startStages('i', 'j', 'k');
      const parker = await CParker.start([i, await dying(j), k], { ...pace, replicas }, [contentOf(4096)]);
      expect(await parker.evict()).toMatchObject({ code: 'OK' });
      expect(await parker.stats()).toMatchObject({ serversFailed: 1 });
      await parker.end();
      await expectClaimed(parker.ticket, parker.contents);
      for (const stage of [i, k]) await expectEmpty(stage);
    },
  );

  test('a server is killed, and the rest has no room: the guest stays', async () => {
    const [i, j] = [await startStage('i', { memoryBytes: 16 * MIB }), await startStage('j')];
    const parker = await CParker.start([i, await dying(j)], pace, [contentOf(6000)]);
    expect(await parker.evict()).toMatchObject({ code: 'VMD_CAPACITY' });
    await expectHere(parker, [i]);
    expect(await parker.evict()).toMatchObject({ code: 'INVALID_ARGUMENT' });
  });

  test('the home server is killed: the guest stays, and the other one lets go', async () => {
    const [i, j] = await startStages('i', 'j');
    const parker = await CParker.start([await dying(i), j], pace, [contentOf(4096)]);
    const { code, text } = await parker.evict();
    expect(code).toMatch(/^(PEER_LOST|VMD_LOST)$/);
    expect(text).toContain('i');
    await expectHere(parker, [j]);
  });

  test('the network of a server is cut for a moment, longer than its lease in all: it goes on', async () => {
    const [i, j] = await startStages('i', 'j');
    const proxy = await TcpProxy.start(j.port);
    // Four seconds are still to come then.
    const options = { bandwidth: 3 * MIB, 'stall-timeout-ms': 10_000, 'lease-ms': 2500 };
    const parker = await CParker.start([i, proxy], options, [contentOf(4096)]);
    const evicted = parker.evict();
    await parker.sent(400);
    proxy.cut();
    await proxy.nextDial();
    proxy.heal();
    expect(await evicted).toMatchObject({ code: 'OK' });
    expect(await parker.stats()).toMatchObject({ serversFailed: 0 });
    await expectClaimed(parker.ticket, parker.contents);
    for (const stage of [i, j]) await expectEmpty(stage);
  });

  test('cancelled: at once, and no server keeps anything', async () => {
    const stages = await startStages('i', 'j');
    // It would take seven seconds.
    const parker = await CParker.start(stages, { ...pace, bandwidth: 2 * MIB }, [contentOf(4096)]);
    const evicted = parker.evict();
    await parker.sent(400);
    const since = performance.now();
    parker.say('cancel');
    expect(await evicted).toMatchObject({ code: 'CANCELLED' });
    expect(performance.now() - since).toBeLessThan(5000);
    await expectHere(parker, stages);
  });

  test('the process is killed: the leases end it', async () => {
    const stages = await startStages('i', 'j');
    const parker = await CParker.start(stages, { ...pace, 'lease-ms': 500 }, [contentOf(4096)]);
    void parker.evict().catch(() => {});
    await parker.sent(400);
    await parker.end();
    for (const stage of stages) await expectEmpty(stage);
  });
});

describe('when every page is there', () => {
  test.each([1, 2] as const)(
    'a server dies that does not hold its pages yet: with %i replicas',
    async (replicas) => {
      const [i, j, k] = await startStages('i', 'j', 'k');
      const proxy = await TcpProxy.start(j.port);
      const parker = await CParker.start([i, proxy, k], { replicas, 'stall-timeout-ms': 2000 });
      proxy.at({ on: 'control', direction: 'up', name: 'hold' }, () => {
        j.host.killNow();
        void proxy.close();
      });
      const { code, text } = await parker.evict();
      if (replicas === 1) {
        expect(`${code}: ${text}`).toMatch(/^(PEER_LOST|CONNECT_FAILED): .*(j|127)/);
        await expectHere(parker, [i, k]);
      } else {
        expect(code).toBe('OK');
        await parker.end();
        await expectClaimed(parker.ticket, parker.contents);
      }
    },
  );

  test('the connection is lost at PREPARE: the guest stays', async () => {
    const [i, j] = await startStages('i', 'j');
    const proxy = await TcpProxy.start(i.port);
    const parker = await CParker.start([proxy, j], { 'lease-ms': 500, 'connect-timeout-ms': 1000 });
    proxy.at({ on: 'control', direction: 'up', name: 'prepare' }, 'cut');
    expect(await parker.evict()).toMatchObject({ code: 'PEER_LOST' });
    await expectHere(parker, [i, j]);
  });

  test('READY is lost with the connection: home is told, and the guest stays', async () => {
    const [i, j] = await startStages('i', 'j');
    const proxy = await TcpProxy.start(i.port);
    const parker = await CParker.start([proxy, j], { 'connect-timeout-ms': 10_000 });
    proxy.at({ on: 'control', direction: 'down', name: 'ready' }, () => {
      proxy.cut();
      proxy.heal();
    });
    expect(await parker.evict()).toMatchObject({ code: 'PEER_LOST' });
    await expectHere(parker, [i, j]);
  });

  test('cancelled while READY is on its way: the guest stays', async () => {
    const [i, j] = await startStages('i', 'j');
    const proxy = await TcpProxy.start(i.port);
    const parker = await CParker.start([proxy, j]);
    const point = proxy.at({ on: 'control', direction: 'down', name: 'ready', after: false }, 'hold');
    const evicted = parker.evict();
    await point.reached;
    parker.say('cancel');
    await parker.next('cancelled');
    setTimeout(() => point.release(), 300);
    expect(await evicted).toMatchObject({ code: 'CANCELLED' });
    await expectHere(parker, [i, j]);
  });
});

describe('the commit', () => {
  async function begun(
    options: object = {},
    inDoubtMs = 1200,
  ): Promise<{
    i: Stage;
    j: Stage;
    proxy: TcpProxy;
    parker: CParker;
  }> {
    const [i, j] = [await startStage('i', options), await startStage('j')];
    const proxy = await TcpProxy.start(i.port);
    const parker = await CParker.start([proxy, j], {
      'in-doubt-timeout-ms': inDoubtMs,
      'connect-timeout-ms': 10_000,
    });
    return { i, j, proxy, parker };
  }

  /** What has become of it, asked for as often as it takes. */
  async function known(parker: CParker): Promise<Said> {
    for (;;) {
      const said = await parker.evict();
      if (said.code !== 'MIGRATION_IN_DOUBT') return said;
    }
  }
  const grant = { on: 'control', direction: 'up', name: 'grant' } as const;
  const resumed = { on: 'control', direction: 'down', name: 'resumed' } as const;

  test.each([
    ['GRANT', grant],
    ['RESUMED', resumed],
  ])('%s is lost, and the network comes back: parked once', async (_, point) => {
    const { i, j, proxy, parker } = await begun({}, 15_000);
    proxy.at(point, () => {
      proxy.cut();
      void proxy.nextDial().then(() => proxy.heal());
    });
    expect(await parker.evict()).toMatchObject({ code: 'OK' });
    await expectClaimed(parker.ticket, parker.contents);
    for (const stage of [i, j]) await expectEmpty(stage);
  });

  test('GRANT is lost, and the network does not come back: in doubt, and asked again it is parked', async () => {
    const { i, j, proxy, parker } = await begun();
    proxy.at(grant, 'cut');
    const since = performance.now();
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    expect(performance.now() - since).toBeLessThan(20_000);
    expect(await phase(i)).toBe('parking');
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    // Too late for that.
    parker.say('cancel');
    proxy.heal();
    expect(await known(parker)).toMatchObject({ code: 'OK' });
    await expectClaimed(parker.ticket, parker.contents);
    for (const stage of [i, j]) await expectEmpty(stage);
  });

  test('in doubt, and claimed and gone before it is asked again: it was parked', async () => {
    const { i, j, proxy, parker } = await begun();
    proxy.at(resumed, 'cut');
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    expect(await phase(i)).toBe('parked');
    proxy.heal();
    await expectClaimed(parker.ticket, parker.contents);
    for (const stage of [i, j]) await expectEmpty(stage);
    expect(await known(parker)).toMatchObject({ code: 'OK' });
  });

  test('in doubt, and home refused meanwhile: asked again the guest is here, and nothing is kept', async () => {
    const { i, j, proxy, parker } = await begun({ grantTimeoutMs: 3000 });
    proxy.at(grant, 'cut');
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    await expect.poll(() => phase(i)).toBe(undefined);
    proxy.heal();
    expect(await known(parker)).toMatchObject({ code: 'PEER_LOST' });
    await expectHere(parker, [i, j]);
  });

  test('home dies at GRANT: in doubt; restarted, it knows nothing, and neither does anybody', async () => {
    const { i, proxy, parker } = await begun();
    proxy.at(grant, () => i.host.killNow());
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    await startStage('i', { port: i.port });
    expect(await known(parker)).toMatchObject({ code: 'GUEST_LOST' });
    expect(await parker.evict()).toMatchObject({ code: 'INVALID_ARGUMENT' });
    expect(await parker.close()).toMatchObject({ code: 'OK' });
  });

  test('closed in doubt: the servers keep it, and the ticket is good', async () => {
    const { i, j, proxy, parker } = await begun();
    proxy.at(resumed, 'cut');
    expect(await parker.evict()).toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    expect(await parker.close()).toMatchObject({ code: 'OK' });
    proxy.heal();
    await expectClaimed(parker.ticket, parker.contents);
    for (const stage of [i, j]) await expectEmpty(stage);
  });
});
