/**
 * Guests that misbehave, and callers that change their minds: the guest runs on at the source with every byte
 * right, the error says what it was, nothing stays on either host, and the same pair of hosts can do it again.
 */
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
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
  type Inventory,
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

let a: Host;
let b: Host;
let beforeA: Inventory;
let beforeB: Inventory;
let port: number;
let servers: Stage[];

beforeEach(async () => {
  [a, b] = await hosts('a', 'b');
});
afterEach(async () => {
  await closeProxies();
  await endHosts();
});

async function begin(
  args: { source?: object; destination?: object; listen?: object; kind?: 'wasm'; mode?: string } = {},
) {
  servers = await serversOf(args.mode ?? '');
  port = await listen(b, { options: args.listen ?? {}, behaviour: args.destination ?? {} });
  await startGuest(a, regionsOf(args.kind ?? 'allocate'), { behaviour: args.source ?? {} });
  beforeA = await inventory(a);
  beforeB = await inventory(b);
}

/** The guest never left, and nothing of the attempt is left. */
async function expectUntouched(): Promise<void> {
  await expectRuns(a);
  await expectOneOwner([a]);
  expect(b.steps('g')).not.toContain('resume');
  expect(await a.call('claimed', { guest: 'g' })).toEqual([false]);
  await expectNothingLeft(a, beforeA);
  await expectNothingLeft(b, beforeB);
  for (const server of servers) await expectEmpty(server);
}

async function movesNow(mode = 'hybrid'): Promise<void> {
  await migrate(a, port, { mode, ...through(servers) }, { key: 'again' });
  expect(await report(a, 'again')).toMatchObject({ verified: true });
  await expectRuns(b);
  await expectOneOwner([a, b]);
}

describe.each(['pre-copy', 'post-copy', 'scatter', 'scatter-pre-copy'])('%s', (mode) => {
  test.each([
    ['throws', { pause: 'throw' }, 'PAUSE_FAILED'],
    ['gives nothing', { pause: 'nothing' }, 'PAUSE_FAILED'],
    ['never returns', { pause: 'hang' }, 'PAUSE_TIMEOUT'],
    ['returns only when it was given up', { pause: 'late' }, 'PAUSE_TIMEOUT'],
  ])('a pause that %s', async (_, behaviour, code) => {
    await begin({ source: behaviour, mode });
    await migrate(a, port, {
      mode,
      ...through(servers),
      ...(code === 'PAUSE_TIMEOUT' ? { pauseTimeoutMs: 700 } : {}),
    });
    expect((await failure(a)).code).toBe(code);
    if (behaviour.pause === 'late') await a.untilStep('g', 'unpause');
    await expectUntouched();
    await a.call('behave', { guest: 'g', behaviour: { pause: 'ok' } });
    await movesNow(mode);
  });

  test.each([
    ['throws', 'throw', 'PREPARE_FAILED'],
    ['never returns', 'hang', 'PREPARE_TIMEOUT'],
  ])('a prepare that %s', async (_, prepare, code) => {
    const listen = prepare === 'hang' ? { prepareTimeoutMs: 700 } : {};
    await begin({ destination: { prepare }, listen, mode });
    await migrate(a, port, { mode, ...through(servers) });
    expect((await failure(a)).code).toBe(code);
    await b.untilStep('g', 'abandon');
    await expectUntouched();
  });

  test('a prepare that never returns, at a destination that waits longer than the source', async () => {
    await begin({ destination: { prepare: 'hang' }, listen: { prepareTimeoutMs: 60_000 }, mode });
    // Before READY it gathers as well there, and has time for that.
    const gathersFirst = mode === 'scatter-pre-copy' ? { gatherTimeoutMs: 500 } : {};
    await migrate(a, port, { mode, ...through(servers), prepareTimeoutMs: 700, ...gathersFirst });
    expect((await failure(a)).code).toBe('PREPARE_TIMEOUT');
    await b.untilStep('g', 'abandon');
    await expectUntouched();
  });
});

test("a prepare that reads the guest's memory gets the pages before the commit", async () => {
  await begin({ destination: { prepare: 'touch' } });
  await migrate(a, port, { mode: 'post-copy' });
  expect(await report(a)).toMatchObject({ verified: true });
  await expectRuns(b);
  await expectOneOwner([a, b]);
});

describe('a destination that declines', () => {
  test.each([
    ['throws in accept', { destination: { accept: 'throw' } }, 'PREPARE_FAILED'],
    ['has no memory for it', { listen: { maxBytes: 2 ** 20 } }, 'NO_MEMORY'],
  ])('%s', async (_, args, code) => {
    await begin(args);
    await migrate(a, port, { mode: 'hybrid' });
    expect((await failure(a)).code).toBe(code);
    await expectUntouched();
  });

  test('never answers the offer', async () => {
    await begin({ destination: { accept: 'hang' } });
    await migrate(a, port, { mode: 'hybrid' }, { abortable: true });
    await b.until('the offer', (event) => event.event === 'offer');
    await a.call('abort');
    expect((await failure(a)).code).toBe('CANCELLED');
    await expectRuns(a);
    await expectNothingLeft(a, beforeA);
  });

  test('two guests fit one after the other, not both at once', async () => {
    await begin({ listen: { maxBytes: 6 * 2 ** 20 } });
    await startGuest(a, regionsOf('allocate'), { guest: 'second' });
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'control', direction: 'up', name: 'state' }, 'hold');
    await migrate(a, proxy.port, { mode: 'stop-and-copy' });
    await held.reached;
    await migrate(a, port, { mode: 'stop-and-copy' }, { key: 'second', guest: 'second' });
    expect((await failure(a, 'second')).code).toBe('NO_MEMORY');
    held.release();
    expect(await report(a)).toMatchObject({ verified: true });
  });
});

describe('two at once', () => {
  test('a second migration of a region that moves is refused, and the first goes on', async () => {
    await begin();
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
    await migrate(a, proxy.port, { mode: 'pre-copy' });
    await held.reached;
    await migrate(a, port, { mode: 'pre-copy' }, { key: 'second' });
    expect((await failure(a, 'second')).code).toBe('REGION_BUSY');
    await expect(a.call('closeRegion', { guest: 'g', index: 0 })).rejects.toMatchObject({
      code: 'REGION_BUSY',
    });
    held.release();
    expect(await report(a)).toMatchObject({ verified: true });
    await expectRuns(b);
    await expectIntact(a);
  });

  test('a migration whose memory vanishes with its thread fails, and takes nothing else with it', async () => {
    await begin({ kind: 'wasm' });
    await startGuest(a, regionsOf('allocate'), { guest: 'neighbour' });
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
    await migrate(a, proxy.port, { mode: 'pre-copy' });
    await held.reached;
    await a.call('terminateWriter', { guest: 'g' });
    expect((await failure(a)).code).toBe('REGION_GONE');
    await b.untilStep('g', 'abandon');
    await migrate(a, port, { mode: 'hybrid' }, { key: 'neighbour', guest: 'neighbour' });
    expect(await report(a, 'neighbour')).toMatchObject({ verified: true });
    await expectRuns(b, 'neighbour');
  });
});

/** A place for every state before the commit. */
const places: [string, string, Point][] = [
  ['setup', 'pre-copy', { on: 'control', direction: 'up', name: 'offer' }],
  ['setup, connecting', 'pre-copy', { on: 'data', direction: 'up', name: 'hello' }],
  ['active', 'pre-copy', { on: 'data', direction: 'up', name: 'pages', nth: 2 }],
  ['device, the state', 'hybrid', { on: 'control', direction: 'up', name: 'state' }],
  ['device, the switch', 'post-copy', { on: 'data', direction: 'up', name: 'switch' }],
  ['device, preparing', 'post-copy', { on: 'control', direction: 'up', name: 'prepare' }],
  ['device, READY on its way', 'stop-and-copy', { on: 'control', direction: 'down', name: 'ready' }],
  ['setup, servers have room', 'scatter', { on: 'control', direction: 'up', name: 'offer' }],
  ['active, servers have pages', 'scatter-pre-copy', { on: 'control', direction: 'up', name: 'state' }],
  ['device, servers have pages', 'scatter-hybrid', { on: 'control', direction: 'down', name: 'ready' }],
];

describe.each(places)('cancelled in %s', (_, mode, where) => {
  test.each(['abort', 'cancel', 'dispose'])('by %s', async (how) => {
    await begin({ listen: { grantTimeoutMs: 3000 }, mode });
    const proxy = await TcpProxy.start(port);
    const held = proxy.at(where, 'hold');
    await migrate(a, proxy.port, { mode, ...through(servers) }, { abortable: true });
    await held.reached;
    await a.call(how);
    expect((await failure(a)).code).toBe('CANCELLED');
    expect(a.states('migration', 'main').at(-1)).toBe('cancelled');
    held.release();
    await proxy.close();
    await expectUntouched();
  });
});

test('held in pre-switchover, then cancelled', async () => {
  await begin();
  await migrate(a, port, { mode: 'pre-copy', holdSwitchover: true });
  await a.untilState('migration', 'main', 'pre-switchover');
  expect(a.steps('g')).not.toContain('pause');
  await a.call('cancel');
  expect((await failure(a)).code).toBe('CANCELLED');
  await expectUntouched();
  await movesNow();
});

test('aborted before it began', async () => {
  await begin();
  await migrate(a, port, { mode: 'pre-copy', holdSwitchover: true }, { abortable: true, key: 'x' });
  await a.call('abort', { key: 'x' });
  expect((await failure(a, 'x')).code).toBe('CANCELLED');
  await expectUntouched();
});

describe('after the commit', () => {
  test.each(['abort', 'cancel'])('%s does nothing', async (how) => {
    await begin();
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'hold');
    await migrate(a, proxy.port, { mode: 'post-copy' }, { abortable: true });
    await held.reached;
    await a.call(how);
    held.release();
    expect(await report(a)).toMatchObject({ state: 'completed', verified: true });
    await expectRuns(b);
    await expectOneOwner([a, b]);
  });

  test('dispose lets go, and the guest still never runs here', async () => {
    await begin({ listen: { recoverTimeoutMs: 1500 } });
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'hold');
    await migrate(a, proxy.port, { mode: 'post-copy', recoverTimeoutMs: 1500, inDoubtTimeoutMs: 2000 });
    await held.reached;
    await a.call('dispose');
    await expectStands(a);
    expect(a.steps('g')).not.toContain('unpause');
    await proxy.close();
    await expectNothingLeft(a, beforeA);
  });

  test('the destination disposes of an arrival before it resumed: the guest runs on at the source', async () => {
    await begin();
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'control', direction: 'up', name: 'state' }, 'hold');
    await migrate(a, proxy.port, { mode: 'pre-copy' });
    await held.reached;
    await b.call('disposeArrival', { key: 'main/g' });
    expect(['CANCELLED', 'PEER_LOST', 'CHANNEL_LOST']).toContain((await failure(a)).code);
    held.release();
    await proxy.close();
    await expectUntouched();
  });

  test('the destination closes its listener in the middle of a round', async () => {
    await begin();
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
    await migrate(a, proxy.port, { mode: 'pre-copy' });
    await held.reached;
    await b.call('closeListener');
    expect(['CANCELLED', 'PEER_LOST', 'CHANNEL_LOST']).toContain((await failure(a)).code);
    await expectRuns(a);
    await expectNothingLeft(a, beforeA);
  });
});

describe('a WebAssembly memory that grows', () => {
  const grow = (pages: number) => a.call<number>('grow', { guest: 'g', index: 0, pages });
  test.each([
    ['before it moves', null],
    ['while it connects', { on: 'data', direction: 'up', name: 'hello' }],
    ['in the first round', { on: 'data', direction: 'up', name: 'pages', nth: 2 }],
    ['at the end of a round', { on: 'data', direction: 'up', name: 'barrier', nth: 1 }],
  ] as [string, Point | null][])('%s', async (_, where) => {
    for (const mode of ['pre-copy', 'hybrid', 'post-copy', 'stop-and-copy']) {
      if (mode === 'post-copy' || mode === 'stop-and-copy') {
        // Their first page is sent when the guest stands already.
        if (where && where.name !== 'hello') continue;
      }
      const guest = 'g';
      await startGuest(a, regionsOf('wasm'), { guest });
      const listenPort = await listen(b, { key: mode });
      const proxy = await TcpProxy.start(listenPort);
      const held = where ? proxy.at(where, 'hold') : null;
      if (!where) await grow(1280);
      await migrate(a, proxy.port, { mode }, { key: mode });
      await held?.reached;
      if (where) expect(await grow(1280)).toBe(1280);
      held?.release();
      expect(await report(a, mode)).toMatchObject({ verified: true, heapBytes: expect.any(Number) });
      expect((await expectIntact(b)).pages).toBe(1280);
      await expectRuns(b);
      await expectIntact(a);
      await a.call('end', { guest });
      await b.call('end', { guest });
    }
  });

  test('after it has arrived, its pages still on their way', async () => {
    port = await listen(b, { rate: { batch: 0, restMs: 100_000 } });
    await startGuest(a, regionsOf('wasm'));
    const proxy = await TcpProxy.start(port);
    const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
    await migrate(a, proxy.port, { mode: 'post-copy' });
    await held.reached;
    await b.untilStep('g', 'resume');
    expect(await b.call('grow', { guest: 'g', index: 0, pages: 1536 })).toBe(1536);
    // A page that never was at the source: zeros, at once.
    expect(await b.call('touch', { guest: 'g', index: 0, page: 1500 })).toBe(0);
    held.release();
    expect(await report(a)).toMatchObject({ verified: true });
    expect((await expectIntact(b)).pages).toBe(1536);
  });
});
