/** Guests that move, by hand: everything but the engine. */
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';

import { Region } from '../../lib/region.js';
import { SharedMemory } from '../../lib/worker/shared-memory.js';
import { WorkerGuest, workerGuests } from '../../lib/worker/index.js';
import {
  guestModule,
  type Moved,
  moveByHand,
  offerOf,
  sqliteModule,
  wasmMemories,
} from '../support/guests/by-hand.js';
import * as b from '../support/guests/wasm-builder.js';

const modules = {
  sqlite: sqliteModule,
  program: guestModule('program.mjs'),
  heap: guestModule('heap.mjs'),
  busy: guestModule('busy.mjs'),
  broken: guestModule('broken.mjs'),
};
const guests: WorkerGuest[] = [];
let before: ReadonlyMap<number, number>;

async function start(name: keyof typeof modules, options: object = {}): Promise<WorkerGuest> {
  const guest = await WorkerGuest.start({ module: { name, url: modules[name] }, ...options });
  guests.push(guest);
  return guest;
}

async function move(guest: WorkerGuest, meanwhile?: () => Promise<void>): Promise<Moved> {
  const moved = await moveByHand(guest, { modules }, before, meanwhile);
  guests.push(moved.guest);
  return moved;
}

const program = (bytes: Uint8Array, more: object = {}) => ({
  data: { wasm: Buffer.from(bytes).toString('base64'), ...more },
});

beforeEach(() => {
  before = wasmMemories();
});
afterEach(async () => {
  await Promise.all(guests.splice(0).map((guest) => guest.terminate()));
});

it('runs on where its new owner throws at being told of it', async () => {
  const warned = new Promise<Error>((resolve) => process.once('warning', resolve));
  const source = await start('sqlite');
  await source.request({ op: 'exec', sql: 'CREATE TABLE t (id INTEGER PRIMARY KEY)' });
  const onGuest = () => {
    throw new Error('not now');
  };
  const { guest } = await moveByHand(source, { modules, onGuest }, before);
  guests.push(guest);
  expect(await warned).toMatchObject({ code: 'MEMFERRY_ON_GUEST_THREW' });
  expect(await guest.request({ op: 'exec', sql: 'INSERT INTO t VALUES (1)' })).toBeDefined();
});

describe('a SQLite database', () => {
  it('goes on in the middle of a transaction, and moves on again', async () => {
    const source = await start('sqlite');
    await source.request({ op: 'exec', sql: 'CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)' });
    await source.request({
      op: 'apply',
      id: 'one',
      statements: [{ sql: "INSERT INTO t (v) VALUES ('one')" }],
    });
    await source.request({ op: 'fill', databaseBytes: 24 * 2 ** 20 });
    await source.request({ op: 'exec', sql: "BEGIN; INSERT INTO t (v) VALUES ('two')" });
    const first = await move(source);
    expect(source.status).toBe('departed');
    await expect(source.request({ op: 'stats' })).rejects.toMatchObject({ code: 'GUEST_MOVED' });
    expect(await first.guest.request({ op: 'stats' })).toMatchObject({ inTransaction: true });
    await first.guest.request({ op: 'exec', sql: 'ROLLBACK' });
    expect(await first.guest.request({ op: 'all', sql: 'SELECT v FROM t' })).toEqual([{ v: 'one' }]);
    expect(await first.guest.request({ op: 'apply', id: 'one', statements: [] })).toEqual({
      id: 'one',
      applied: false,
    });
    await first.guest.request({ op: 'run', sql: 'INSERT INTO t (v) VALUES (?)', params: ['three'] });

    before = new Map([...wasmMemories()].filter(([, length]) => length < 24 * 2 ** 20));
    const second = await move(first.guest);
    expect(await second.guest.request({ op: 'all', sql: 'SELECT v FROM t ORDER BY id' })).toEqual([
      { v: 'one' },
      { v: 'three' },
    ]);
    // The heap still grows, by the glue's own means.
    await second.guest.request({ op: 'fill', databaseBytes: 48 * 2 ** 20 });
    expect(await second.guest.request({ op: 'integrity' })).toEqual(['ok']);
  });

  it('may grow while its destination is set up already', async () => {
    const source = await start('sqlite');
    await source.request({ op: 'fill', databaseBytes: 20 * 2 ** 20 });
    const { guest } = await move(source, async () => {
      const length = source.regions[0]?.region.lengthBytes ?? 0;
      await source.request({ op: 'fill', databaseBytes: 70 * 2 ** 20 });
      expect(source.regions[0]?.region.refresh()).toBeGreaterThan(length);
    });
    expect(await guest.request({ op: 'integrity' })).toEqual(['ok']);
    await guest.request({ op: 'apply', id: 'after', statements: [] });
    await guest.request({ op: 'fill', databaseBytes: 90 * 2 ** 20 });
    expect(await guest.request({ op: 'integrity' })).toEqual(['ok']);
  });

  it('of which JavaScript keeps a statement refuses, by its text, until it is finalized', async () => {
    const source = await start('sqlite');
    await source.request({ op: 'exec', sql: 'CREATE TABLE t (id INTEGER PRIMARY KEY, v TEXT)' });
    await source.request({ op: 'exec', sql: "INSERT INTO t (v) VALUES ('one'), ('two')" });
    const sql = 'SELECT v FROM t ORDER BY id';
    const cursor = await source.request({ op: 'open', sql });
    expect(await source.request({ op: 'next', cursor })).toEqual({ v: 'one' });
    const refused = { code: 'GUEST_BUSY', names: [`statement that is not finalized: ${sql}`] };
    await expect(source.check()).rejects.toMatchObject({ code: 'GUEST_BUSY' });
    await expect(source.pause()).rejects.toMatchObject(refused);
    // Nothing became of it.
    expect(await source.request({ op: 'next', cursor })).toEqual({ v: 'two' });
    expect(await source.request({ op: 'next', cursor })).toBe(null);
    const { guest } = await move(source);
    expect(await guest.request({ op: 'all', sql })).toEqual([{ v: 'one' }, { v: 'two' }]);
    const here = await guest.request({ op: 'open', sql });
    expect(await guest.request({ op: 'next', cursor: here })).toEqual({ v: 'one' });
    await guest.request({ op: 'close', cursor: here });
    expect(await guest.request({ op: 'integrity' })).toEqual(['ok']);
  });

  it('with a file attached refuses, by the name of the file', async () => {
    const source = await start('sqlite');
    const file = `/tmp/memferry-attached-${process.pid}.db`;
    await source.request({ op: 'exec', sql: `ATTACH '${file}' AS outside` });
    await expect(source.pause()).rejects.toMatchObject({
      code: 'GUEST_BUSY',
      names: [`database file ${file} attached as outside`, `host file ${file}`],
    });
    await source.request({ op: 'exec', sql: 'DETACH outside' });
    await source.pause();
  });
});

describe('a WebAssembly program', () => {
  it('keeps its hidden globals and tables, and sees no exports of ours', async () => {
    const source = await start('program', program(b.countingModule()));
    expect(await source.request({ op: 'names' })).toEqual(['memory', 'next', 'call', 'swap']);
    expect(await source.request({ op: 'call', name: 'next' })).toBe(6);
    await source.request({ op: 'call', name: 'swap' });
    await source.request({ op: 'poke', at: 60_000, value: 7 });
    const { guest } = await move(source);
    expect(await guest.request({ op: 'call', name: 'next' })).toBe(7);
    expect(await guest.request({ op: 'call', name: 'call', args: [0] })).toBe(31);
    expect(await guest.request({ op: 'call', name: 'call', args: [1] })).toBe(30);
    expect(await guest.request({ op: 'peek', at: 60_000 })).toBe(7);
    expect(await guest.request({ op: 'count' })).toEqual({ count: 9, arrivals: 1 });
  });

  it('keeps a table that has grown, with host functions: by name, and those that both sides build', async () => {
    const withTable = b.wasmModule(
      b.types(b.func([], [b.I32]), b.func([b.I32], [b.I32])),
      b.functions(1),
      b.tables([b.FUNCREF, 0, 2]),
      b.exports_(['table', 1, 0], ['call', 0, 0]),
      b.code([0x20, 0, 0x11, 0, 0]),
    );
    const source = await start('program', program(withTable, { buildHostFunction: true }));
    await source.request({ op: 'grow-table', by: 5 });
    await source.request({ op: 'table', slot: 6, value: 'registered' });
    const { guest } = await move(source);
    expect(await guest.request({ op: 'call', name: 'call', args: [0] })).toBe(77);
    expect(await guest.request({ op: 'call', name: 'call', args: [6] })).toBe(99);
    await expect(guest.request({ op: 'call', name: 'call', args: [3] })).rejects.toThrow(
      /null function|signature/,
    );
  });

  it('with a host function that the destination cannot know is refused by name, and runs on', async () => {
    const withTable = b.wasmModule(b.tables([b.FUNCREF, 0, 2]), b.exports_(['table', 1, 0]));
    const source = await start('program', program(withTable));
    await source.request({ op: 'table', slot: 1, value: 'anonymous' });
    const refused = {
      code: 'GUEST_UNMOVABLE',
      names: [expect.stringMatching(/^table 0:0, slot 1: the host function .* not registered by name$/)],
    };
    await expect(source.check()).rejects.toMatchObject(refused);
    await expect(source.pause()).rejects.toMatchObject(refused);
    expect(await source.request({ op: 'count' })).toMatchObject({ arrivals: 0 });
  });

  it('is named unmovable before it migrates: vector globals, host objects in tables', async () => {
    const vector = b.wasmModule(
      b.memories([0, 1]),
      b.section(6, [1, b.V128, 1, 0xfd, 0x0c, ...new Array<number>(16).fill(0), 0x0b]),
    );
    const source = await start('program', program(vector));
    const names = [expect.stringMatching(/mutable global 0 of type v128/)];
    expect(() => source.description).toThrow(expect.objectContaining({ code: 'GUEST_UNMOVABLE', names }));
    await expect(source.check()).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE', names });
    await expect(source.pause()).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE', names });

    const externs = b.wasmModule(b.imports(['e', 'table', 1, [b.EXTERNREF, 0, 2]]));
    const other = await start('program', program(externs, { hostTable: 'externref' }));
    await other.check();
    await other.request({ op: 'table', slot: 1, value: 'object' });
    const slot = ['table 0:0, slot 1: an externref to a host object (object of class Object)'];
    await expect(other.check()).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE', names: slot });
    await expect(other.pause()).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE', names: slot });
    expect(await other.request({ op: 'count' })).toMatchObject({ count: 2 });
  });

  it('may have its memory made by its host code, and grow it', async () => {
    const imported = b.wasmModule(b.imports(['e', 'memory', 2, [0, 1]]), b.exports_(['memory', 2, 0]));
    const source = await start('program', program(imported, { hostMemoryPages: 3 }));
    await source.request({ op: 'grow-memory', pages: 40 });
    await source.request({ op: 'poke', at: 42 * 65_536, value: 9 });
    const { guest } = await move(source);
    expect(guest.regions[0]?.region.lengthBytes).toBe(43 * 65_536);
    expect(await guest.request({ op: 'peek', at: 42 * 65_536 })).toBe(9);
  });

  it('tells of memories that it makes later, and refuses a destination that does not make them', async () => {
    const source = await start('program', program(b.countingModule()));
    expect(source.regions).toHaveLength(1);
    expect(await source.request({ op: 'instantiate-again' })).toBe(true);
    expect(source.regions.map(({ name }) => name)).toEqual(['memory:0', 'memory:1']);
    await expect(workerGuests({ modules })(offerOf(source))).rejects.toMatchObject({
      code: 'GUEST_UNMOVABLE',
    });
  });

  it('with JavaScript state that cannot be cloned refuses to pause', async () => {
    const source = await start('program', program(b.countingModule()));
    await source.request({ op: 'hold' });
    await expect(source.pause()).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE' });
    expect(await source.request({ op: 'call', name: 'next' })).toBe(6);
  });
});

describe('other memory', () => {
  it('of a plain heap moves', async () => {
    const source = await start('heap', { data: { heapBytes: 1 << 20 } });
    await source.request({ op: 'append', text: 'written there, ' });
    expect(source.regions.map(({ name }) => name)).toEqual(['heap:0']);
    const { guest } = await move(source);
    expect(await guest.request({ op: 'append', text: 'read here' })).toBe('written there, read here');
  });

  it('that several workers share moves with all of them', async () => {
    const source = await start('busy', { workers: 2, sharedHeapBytes: 1 << 20 });
    for (const worker of [0, 1, 0]) await source.request({ op: 'shared-add' }, { worker });
    const { guest } = await move(source);
    expect(guest.workers).toBe(2);
    expect(await guest.request({ op: 'shared-add' }, { worker: 1 })).toBe(3);
    expect(await guest.request({ op: 'shared-add' }, { worker: 0 })).toBe(4);
  });
});

describe('a destination', () => {
  it('runs only what is on its list, with the same content', async () => {
    const source = await start('heap', { data: { heapBytes: 4096 } });
    const offer = offerOf(source);
    const refused = { code: 'MODULE_REFUSED' };
    await expect(workerGuests({ modules: {} })(offer)).rejects.toMatchObject(refused);
    await expect(workerGuests({ modules })({ ...offer, module: null })).rejects.toMatchObject(refused);
    await expect(workerGuests({ modules: { heap: modules.busy } })(offer)).rejects.toMatchObject(refused);
    const inherited = { ...offer, module: { name: 'constructor', sha256: '0'.repeat(64) } };
    await expect(workerGuests({ modules })(inherited)).rejects.toMatchObject(refused);
  });

  it('refuses descriptions and states that are none', async () => {
    const source = await start('heap', { data: { heapBytes: 4096 } });
    const offer = offerOf(source);
    const accept = workerGuests({ modules });
    for (const description of [null, 1, {}, { ...(offer.description as object), workers: [] }]) {
      await expect(accept({ ...offer, description })).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    }
    await expect(accept({ ...offer, regions: [] })).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    const state = await source.pause();
    for (const bad of [new Uint8Array(), state.slice(0, state.length / 2), Uint8Array.from([255, 15, 111])]) {
      const arriving = await accept(offer);
      await expect(arriving.prepare(bad)).rejects.toMatchObject({ code: /PREPARE_FAILED|GUEST_UNMOVABLE/ });
      await arriving.abandon();
    }
  });

  it('whose guest throws says so and lets everything go', async () => {
    const source = await start('broken', { data: { at: 'receive' } });
    await expect(workerGuests({ modules })(offerOf(source))).rejects.toThrow('no reception today');
    const other = await start('broken', { data: { at: 'adopt' } });
    const arriving = await workerGuests({ modules })(offerOf(other));
    await expect(arriving.prepare(await other.pause())).rejects.toMatchObject({ code: 'PREPARE_FAILED' });
    await arriving.abandon();
    other.unpause();
    expect(await other.request(null)).toBe('alive');
    const more = await start('broken', { data: { at: 'receive-builds-more' } });
    await expect(workerGuests({ modules })(offerOf(more))).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE' });
  });

  it.each(['receive', 'receive-builds-more'])(
    'that declines (%s) closes what its workers share',
    async (at) => {
      const source = await start('broken', {
        data: { at },
        sharedHeapBytes: 1 << 20,
        sharedMemory: { initialPages: 1, maximumPages: 2 },
      });
      const [allocate, make] = [vi.spyOn(Region, 'allocate'), vi.spyOn(SharedMemory, 'make')];
      try {
        await expect(workerGuests({ modules })(offerOf(source))).rejects.toThrow();
        const made = [
          ...allocate.mock.results.map(({ value }) => value as Region),
          ...make.mock.results.map(({ value }) => (value as SharedMemory).region),
        ];
        expect(made.map(({ closed }) => closed)).toEqual([true, true]);
      } finally {
        vi.restoreAllMocks();
      }
    },
  );

  it('can be cancelled while its guest hangs', async () => {
    const source = await start('broken', { data: { at: 'receive-hangs' } });
    const controller = new AbortController();
    const arriving = workerGuests({ modules })(offerOf(source), { signal: controller.signal });
    controller.abort();
    await expect(arriving).rejects.toThrow(/cancelled/);
    const other = await start('broken', { data: { at: 'adopt-hangs' } });
    const hanging = await workerGuests({ modules })(offerOf(other));
    const state = await other.pause();
    const second = new AbortController();
    const prepared = hanging.prepare(state, { signal: second.signal });
    second.abort();
    await expect(prepared).rejects.toMatchObject({ code: 'CANCELLED' });
    await hanging.abandon();
  });

  it('ends a guest that traps after pages were lost, and nobody else', async () => {
    const trap = b.wasmModule(
      b.types(b.func([], [])),
      b.functions(0),
      b.exports_(['trap', 0, 0]),
      b.code([0x00]),
    );
    const source = await start('program', program(trap));
    await expect(source.request({ op: 'call', name: 'trap' })).rejects.toMatchObject({
      guestErrorName: 'RuntimeError',
    });
    expect(source.status).toBe('running');
    const { guest, arriving } = await move(source);
    const bystander = await start('busy');
    const ended = new Promise((resolve) => guest.once('ended', resolve));
    arriving.lost([{ region: 0, first: 3, count: 2 }]);
    await expect(guest.request({ op: 'call', name: 'trap' })).rejects.toMatchObject({ code: 'GUEST_LOST' });
    expect(await ended).toMatchObject({ code: 'GUEST_LOST', facts: { pages: 2 } });
    expect(await bystander.request({ op: 'echo', value: 1 })).toBe(1);
  });
});
