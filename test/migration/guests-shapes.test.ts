/**
 * Programs of other shapes than SQLite's: several mutable globals and a table that grows (Lua, from npm, unchanged),
 * threads over one shared memory that the host gives (a module by hand), host objects in tables. And what cannot move:
 * named before the migration begins, and the guest runs on.
 */
import { afterEach, describe, expect, test } from 'vitest';
import * as w from '../support/guests/wasm-builder.js';
import { endHosts, type Host } from '../support/host.js';
import { failure, hosts, listen, migrate, report } from '../support/scenario.js';

afterEach(endHosts);

const lua = new URL('../../examples/lua/lua.mjs', import.meta.url).href;
const threads = new URL('../support/guests/threads.mjs', import.meta.url).href;
const holding = new URL('../support/guests/holding.mjs', import.meta.url).href;
const modules = { lua, threads, holding };
const LONG_MS = 120_000;

async function ask<T>(host: Host, request: unknown, worker = 0): Promise<T> {
  const answer = await host.call<{ ok: boolean; value: T; error?: { message: string } }>(
    'request',
    { guest: 'g', request, worker },
    LONG_MS,
  );
  if (!answer.ok) throw new Error(answer.error?.message);
  return answer.value;
}

const start = (host: Host, module: keyof typeof modules, options: object = {}) =>
  host.call('startWorker', { guest: 'g', module, url: modules[module], options }, LONG_MS);

const base64 = (module: Uint8Array) => Buffer.from(module).toString('base64');

async function move(from: Host, to: Host, mode: string, key: string, listener: number) {
  await migrate(from, listener, { mode, prepareTimeoutMs: LONG_MS }, { guest: 'g', key });
  expect(await report(from, key, LONG_MS)).toMatchObject({ verified: true });
  await to.untilArrival(`main/g`, 'resumed');
}

test.each(['hybrid', 'post-copy'])(
  'Lua goes on in the middle of a coroutine, there and back, %s',
  async (mode) => {
    const [a, b] = await hosts('a', 'b');
    const ports = [await listen(a, { modules }), await listen(b, { modules })];
    await start(a, 'lua');
    const program = `
      numbers = coroutine.wrap(function() local i = 0; while true do i = i + 1; note('number ' .. i); coroutine.yield(i) end end)
      heap = {}
      for i = 1, 200000 do heap[i] = 'value ' .. i end
      return numbers()`;
    expect(await ask(a, { run: program })).toBe(1);
    await move(a, b, mode, 'there', ports[1] as number);
    expect(await ask(b, { run: 'return numbers() + numbers()' })).toBe(5);
    await move(b, a, mode, 'back', ports[0] as number);
    expect(await ask(a, { run: 'return numbers()' })).toBe(4);
    expect(await ask(a, { run: `return heap[200000] .. ', ' .. #heap` })).toBe('value 200000, 200000');
    expect(await ask(a, 'noted')).toEqual(['number 1', 'number 2', 'number 3', 'number 4']);
    expect(await ask(a, { run: `for i = 1, 2000000 do heap[i] = i end return #heap` })).toBe(2_000_000);
  },
  120_000,
);

/** `count(n)`: memory word 0 += 1, atomically, n times; gives how often this instance has counted. */
const counting = w.wasmModule(
  w.types(w.func([w.I32], [w.I32])),
  w.imports(['e', 'memory', 2, [3, 1, 64]]),
  w.functions(0),
  w.globals([w.I32, true, [0x41, 0]]),
  w.exports_(['count', 0, 0]),
  w.code([
    ...[0x03, 0x40, 0x41, 0, 0x41, 1, 0xfe, 0x1e, 2, 0, 0x1a],
    ...[0x23, 0, 0x41, 1, 0x6a, 0x24, 0],
    ...[0x20, 0, 0x41, 1, 0x6b, 0x22, 0, 0x0d, 0, 0x0b, 0x23, 0],
  ]),
);

test.each(['stop-and-copy', 'pre-copy', 'hybrid', 'post-copy'])(
  'threads over one shared memory move together while all of them count, %s',
  async (mode) => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { modules });
    await start(a, 'threads', {
      workers: 3,
      sharedMemory: { initialPages: 1, maximumPages: 64 },
      data: { wasm: base64(counting) },
    });
    expect(await ask(a, { op: 'grow', pages: 31 })).toBe(1);
    await ask(a, { op: 'poke', at: 2 ** 19 - 1, value: 77 }, 2);
    const times = 20_000;
    const counted = [0, 0, 0];
    let over = false;
    const count = async (worker: number) => {
      for (let host = a; !over || host === a; ) {
        const answer = await host.call<{ ok: boolean; value: number; error?: { code: string } }>(
          'request',
          { guest: 'g', request: { op: 'count', times }, worker },
          LONG_MS,
        );
        if (answer.ok) counted[worker] = answer.value;
        else if (answer.error?.code === 'GUEST_MOVED') host = b;
        else throw new Error(JSON.stringify(answer));
      }
    };
    const counters = Promise.all([0, 1, 2].map(count));
    await migrate(a, port, { mode }, { guest: 'g' });
    expect(await report(a, 'main', LONG_MS)).toMatchObject({ verified: true });
    over = true;
    await counters;
    // No increment is lost, and none happens twice: what the threads count apart is what the memory has.
    expect(await ask(b, { op: 'sum' }, 1)).toBe(counted.reduce((sum, each) => sum + each, 0));
    for (const [worker, before] of counted.entries()) {
      expect(await ask(b, { op: 'count', times: 5 }, worker)).toBe(before + 5);
    }
    expect(await ask(b, { op: 'peek', at: 2 ** 19 - 1 }, 0)).toBe(77);
  },
  120_000,
);

const imports = w.imports(
  ['e', 'memory', 2, [0, 2]],
  ['e', 'functions', 1, [w.FUNCREF, 0, 4]],
  ['e', 'objects', 1, [w.EXTERNREF, 0, 6]],
);
const data = { wasm: base64(w.wasmModule(imports)) };

test('host objects in tables: those that both sides build, those registered by name, and plain values', async () => {
  const [a, b] = await hosts('a', 'b');
  const ports = [await listen(a, { modules }), await listen(b, { modules })];
  await start(a, 'holding', { data });
  await ask(a, { op: 'values' });
  await move(a, b, 'hybrid', 'there', ports[1] as number);
  expect(await ask(b, { op: 'are-values' })).toEqual([true, true, true]);
  await move(b, a, 'post-copy', 'back', ports[0] as number);
  expect(await ask(a, { op: 'are-values' })).toEqual([true, true, true]);
});

describe('what cannot move', () => {
  /** Nobody listens there: a migration that had begun would end in another error. */
  const nobody = 9;
  const held: [string, object, object, string, RegExp][] = [
    [
      'an object with a finalizer',
      { op: 'cursor' },
      { op: 'forget' },
      'GUEST_UNMOVABLE',
      /^an object with a finalizer \(Cursor\) that JavaScript holds/,
    ],
    [
      'an open file',
      { op: 'open', path: '/etc/passwd' },
      { op: 'close' },
      'GUEST_BUSY',
      /^host file \/etc\/passwd$/,
    ],
    [
      'a file handle',
      { op: 'open-handle', path: '/etc/group' },
      { op: 'close-handle' },
      'GUEST_BUSY',
      /^host file \/etc\/group$/,
    ],
    ['a thread of its own', { op: 'thread' }, { op: 'end-thread' }, 'GUEST_BUSY', /^a thread of its own/],
    [
      'a host function without a name',
      { op: 'function' },
      { op: 'no-function' },
      'GUEST_UNMOVABLE',
      /^table 0:0, slot 1: the host function "onRow" that is not registered by name$/,
    ],
    [
      'a host object',
      { op: 'object' },
      { op: 'no-object' },
      'GUEST_UNMOVABLE',
      /^table 0:1, slot 5: an externref to a host object \(object of class Object\)$/,
    ],
  ];

  test('is named before the migration begins, and the guest runs on', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { modules });
    await start(a, 'holding', { data });
    for (const [what, hold, letGo, code, name] of held) {
      await ask(a, hold);
      await migrate(a, nobody, { mode: 'hybrid' }, { guest: 'g', key: what });
      const { code: told, facts } = await failure(a, what);
      expect(told, what).toBe(code);
      expect((facts as unknown as { names: string[] }).names, what).toContainEqual(
        expect.stringMatching(name),
      );
      expect(await ask(a, { op: 'alive' }), what).toBe(true);
      await ask(a, letGo);
    }
    // What is garbage already stands in nobody's way, and with everything let go the guest moves.
    await ask(a, { op: 'garbage' });
    await move(a, b, 'hybrid', 'moves', port);
    expect(await ask(b, { op: 'alive' })).toBe(true);
  }, 120_000);

  test('at the destination alone is named by it, before the first page', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { modules });
    await start(a, 'holding', { data: { ...data, namesAtSource: ['only-here'] } });
    await migrate(a, port, { mode: 'hybrid' }, { guest: 'g' });
    const { code, message } = await failure(a);
    expect(code).toMatch(/GUEST_UNMOVABLE|DECLINED|REFUSED/);
    expect(message).toMatch(/host function "only-here", which is not registered here/);
    expect(b.states('arrival', 'main/g')).not.toContain('active');
    expect(await ask(a, { op: 'alive' })).toBe(true);
  });
});
