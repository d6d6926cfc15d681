import { Worker } from 'node:worker_threads';
import { xxhash128, xxhash3 } from 'hash-wasm';
import { describe, expect, it } from 'vitest';
import { loadAddon } from '../../src/addon.js';
import { Region } from '../../src/region.js';

const { pageSize } = loadAddon();
const WASM_PAGE = 65536;

/** TypeScript's libraries do not know maxByteLength yet. */
const Resizable = ArrayBuffer as unknown as new (
  length: number,
  options: { maxByteLength: number },
) => ArrayBuffer & { resize(length: number): void };
const Growable = SharedArrayBuffer as unknown as new (
  length: number,
  options: { maxByteLength: number },
) => SharedArrayBuffer & { grow(length: number): void };
interface Memory {
  readonly buffer: ArrayBufferLike;
  grow(pages: number): number;
}
const WasmMemory = (
  globalThis as unknown as {
    WebAssembly: { Memory: new (d: { initial: number; maximum?: number; shared?: boolean }) => Memory };
  }
).WebAssembly.Memory;

function codeOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return (error as { code: string }).code;
  }
  return 'no error';
}

describe('Region.allocate', () => {
  for (const shared of [false, true]) {
    it(`gives zeros that can be written, shared: ${shared}`, () => {
      using region = Region.allocate({ lengthBytes: 4 * pageSize, shared });
      const [view] = region.views;
      expect(region.lengthBytes).toBe(4 * pageSize);
      expect(region.pages).toBe(4);
      expect(region.views).toHaveLength(1);
      expect(view?.byteLength).toBe(4 * pageSize);
      expect(view?.every((byte) => byte === 0)).toBe(true);
      view?.fill(7);
      expect(view?.[4 * pageSize - 1]).toBe(7);
      expect(view?.buffer instanceof SharedArrayBuffer).toBe(shared);
    });

    it(`has views of at most 4 GiB each, shared: ${shared}`, () => {
      const lengthBytes = 5 * 2 ** 30;
      using region = Region.allocate({ lengthBytes, shared });
      expect(region.views.map((view) => view.byteLength)).toEqual([2 ** 32, 2 ** 30]);
      expect(region.lengthBytes).toBe(lengthBytes);
      const last = region.views[1] as Uint8Array;
      last[last.length - 1] = 1;
      expect(last[last.length - 1]).toBe(1);
    });
  }

  it('refuses a length that is not whole pages, and names the next one', () => {
    expect(() => Region.allocate({ lengthBytes: pageSize + 1 })).toThrow(String(2 * pageSize));
    for (const lengthBytes of [0, -pageSize, 1.5, Number.NaN, pageSize + 1]) {
      expect(codeOf(() => Region.allocate({ lengthBytes }))).toBe('INVALID_ARGUMENT');
    }
  });

  it('says that there is no memory', () => {
    expect(codeOf(() => Region.allocate({ lengthBytes: 2 ** 50 }))).toBe('NO_MEMORY');
  });

  it('takes whole huge pages only, as many as are free, and not as shared', () => {
    const huge = (lengthBytes: number, shared = false) =>
      codeOf(() => Region.allocate({ lengthBytes, hugePages: true, shared }));
    expect(huge(2 ** 20)).toBe('INVALID_ARGUMENT');
    expect(huge(2 ** 21, true)).toBe('INVALID_ARGUMENT');
    expect(huge(2 ** 40)).toBe('NO_MEMORY');
  });
});

describe('Region.adopt', () => {
  it('refuses a buffer inside a block of malloc, and says what to do', () => {
    // A plain buffer starts wherever malloc put it; of several in a row not all can be on a page boundary.
    const buffers = [1, 2, 3].map(() => new ArrayBuffer(pageSize));
    const codes = buffers.map((buffer) => codeOf(() => Region.adopt(buffer)));
    expect(codes).toContain('REGION_UNALIGNED');
    const unaligned = buffers[codes.indexOf('REGION_UNALIGNED')] as ArrayBuffer;
    expect(() => Region.adopt(unaligned)).toThrow(/Region\.allocate.*maxByteLength/);
  });

  it('refuses what is no memory', () => {
    expect(codeOf(() => Region.adopt('memory' as never))).toBe('INVALID_ARGUMENT');
    expect(codeOf(() => Region.adopt(null as never))).toBe('INVALID_ARGUMENT');
    expect(codeOf(() => Region.adopt(new WasmMemory({ initial: 0 })))).toBe('INVALID_ARGUMENT');
  });

  it('refuses a buffer whose length is not whole pages', () => {
    const buffer = new Resizable(pageSize + 8, { maxByteLength: 2 * pageSize });
    expect(codeOf(() => Region.adopt(buffer))).toBe('INVALID_ARGUMENT');
  });

  it('takes a resizable ArrayBuffer, follows its growth, and keeps it from being transferred', () => {
    const buffer = new Resizable(2 * pageSize, { maxByteLength: 8 * pageSize });
    using region = Region.adopt(buffer);
    expect(region.capacityBytes).toBe(8 * pageSize);
    buffer.resize(5 * pageSize);
    expect(region.lengthBytes).toBe(2 * pageSize);
    expect(region.refresh()).toBe(5 * pageSize);
    expect(region.views[0]?.byteLength).toBe(5 * pageSize);
    try {
      structuredClone(buffer, { transfer: [buffer] });
    } catch {
      // Newer Nodes refuse; Node 20 copies instead. What counts is that the memory stays.
    }
    expect(buffer.byteLength).toBe(5 * pageSize);
  });

  it('takes a growable SharedArrayBuffer', () => {
    const buffer = new Growable(2 * pageSize, { maxByteLength: 4 * pageSize });
    using region = Region.adopt(buffer);
    buffer.grow(3 * pageSize);
    expect(region.refresh()).toBe(3 * pageSize);
  });

  it('takes a page-aligned view, and only that part', async () => {
    const buffer = new Resizable(4 * pageSize, { maxByteLength: 4 * pageSize });
    using region = Region.adopt(new Uint8Array(buffer, pageSize, 2 * pageSize));
    expect(region.pages).toBe(2);
    const before = await region.digest();
    new Uint8Array(buffer)[0] = 1;
    expect(await region.digest()).toBe(before);
    new Uint8Array(buffer)[pageSize] = 1;
    expect(await region.digest()).not.toBe(before);
  });

  for (const shared of [false, true]) {
    it(`takes a WebAssembly memory that grows, shared: ${shared}`, async () => {
      const memory = new WasmMemory({ initial: 1, maximum: 64, shared });
      using region = Region.adopt(memory);
      expect(region.lengthBytes).toBe(WASM_PAGE);
      expect(region.capacityBytes).toBeGreaterThanOrEqual(64 * WASM_PAGE);
      memory.grow(3);
      new Uint8Array(memory.buffer)[3 * WASM_PAGE] = 9;
      expect(region.lengthBytes).toBe(WASM_PAGE);
      expect(region.native.mappedPages()).toBe((4 * WASM_PAGE) / pageSize);
      expect(region.refresh()).toBe(4 * WASM_PAGE);
      expect(region.views[0]?.[3 * WASM_PAGE]).toBe(9);
      expect(await region.digest()).toMatch(/^[0-9a-f]{32}$/);
    });
  }

  it('keeps an adopted memory that nobody else refers to', async () => {
    let memory: Memory | null = new WasmMemory({ initial: 16 });
    new Uint8Array(memory.buffer).fill(3);
    const region = Region.adopt(memory);
    memory.grow(1); // detaches the buffer that was adopted
    memory = null;
    for (let i = 0; i < 5; i++) (globalThis as { gc?: () => void }).gc?.();
    const digest = await region.digest();
    expect(await region.digest()).toBe(digest);
    region.close();
  });
});

describe('Region.digest', () => {
  it('is XXH3_128 over the page hashes: equal content, equal digest', async () => {
    using a = Region.allocate({ lengthBytes: 100 * pageSize });
    using b = Region.allocate({ lengthBytes: 100 * pageSize, shared: true });
    const empty = await a.digest();
    expect(await b.digest()).toBe(empty);
    (a.views[0] as Uint8Array)[77 * pageSize + 5] = 1;
    expect(await a.digest()).not.toBe(empty);
    (b.views[0] as Uint8Array)[77 * pageSize + 5] = 1;
    expect(await b.digest()).toBe(await a.digest());
  });

  it('is what an independent XXH3 makes of it', async () => {
    using region = Region.allocate({ lengthBytes: 70 * pageSize });
    const view = region.views[0] as Uint8Array;
    for (let i = 0; i < view.length; i += 97) view[i] = i % 251;
    const pages: bigint[] = [];
    for (let page = 0; page < 70; page++) {
      const bytes = view.slice(page * pageSize, (page + 1) * pageSize);
      pages.push(BigInt(`0x${await xxhash3(bytes)}`));
    }
    const hashes = Buffer.alloc(pages.length * 8);
    for (const [page, hash] of pages.entries()) hashes.writeBigUInt64LE(hash, page * 8);
    expect(await region.digest()).toBe(await xxhash128(hashes));
  });
});

describe('handles', () => {
  it('open by id, in this thread and in a worker, over the same memory', async () => {
    using region = Region.allocate({ lengthBytes: 2 * pageSize });
    using again = Region.open(region.id);
    (again.views[0] as Uint8Array)[0] = 42;
    expect(region.views[0]?.[0]).toBe(42);
    const answer = await inWorker(
      `const region = addon.openRegion(workerData);
       const view = new Uint8Array(region.buffers()[0]);
       view[1] = view[0] + 1;
       parentPort.postMessage([region.pages(), view.byteLength]);`,
      region.id,
    );
    expect(answer).toEqual([2, 2 * pageSize]);
    expect(region.views[0]?.[1]).toBe(43);
  });

  it('outlive the handle that they were opened from, where the memory is our own', () => {
    const region = Region.allocate({ lengthBytes: pageSize });
    const again = Region.open(region.id);
    region.close();
    (again.views[0] as Uint8Array)[0] = 1;
    expect(again.views[0]?.[0]).toBe(1);
    const { id } = again;
    again.close();
    // Views keep the memory mapped, but there is no region to open any more once nothing holds it natively.
    expect(['REGION_GONE', 'no error']).toContain(codeOf(() => Region.open(id).close()));
  });

  it('do not exist for ids that nobody has', () => {
    expect(codeOf(() => Region.open('0'.repeat(32)))).toBe('REGION_GONE');
  });

  it('of an adopted memory are gone once its owner closes it', () => {
    const region = Region.adopt(new WasmMemory({ initial: 1 }));
    const again = Region.open(region.id);
    expect(again.lengthBytes).toBe(WASM_PAGE);
    region.close();
    again.close();
    expect(codeOf(() => Region.open(region.id))).toBe('REGION_GONE');
  });

  it('close twice, and then say that they are closed', async () => {
    const region = Region.allocate({ lengthBytes: pageSize });
    region.close();
    region.close();
    expect(region.closed).toBe(true);
    expect(codeOf(() => region.lengthBytes)).toBe('REGION_CLOSED');
    expect(codeOf(() => region.views)).toBe('REGION_CLOSED');
    await expect(region.digest()).rejects.toMatchObject({ code: 'REGION_CLOSED' });
  });

  it('cannot close while the region moves, and only the claimant releases', () => {
    const region = Region.allocate({ lengthBytes: pageSize });
    const other = Region.open(region.id);
    expect(other.native.claim()).toBe(true);
    expect(region.native.claim()).toBe(false);
    region.native.release();
    expect(region.native.claimed()).toBe(true);
    expect(codeOf(() => region.close())).toBe('REGION_BUSY');
    other.native.release();
    region.close();
    other.close();
  });

  it('finish a digest that was under way when they closed', async () => {
    const region = Region.adopt(new WasmMemory({ initial: 512 }));
    const digest = region.digest();
    region.close();
    // The work under way keeps the memory; whichever came first, it settles.
    const outcome = await digest.catch((error: { code: string }) => error.code);
    expect(outcome).toMatch(/^([0-9a-f]{32}|REGION_GONE)$/);
  });
});

describe('the boundary', () => {
  it('does not take one handle for another', () => {
    using region = Region.allocate({ lengthBytes: pageSize });
    const addon = loadAddon();
    const tracker = addon.makeTracker('hash-diff', region.native, 'anywhere', false);
    expect(() => addon.makeTracker('hash-diff', tracker as never, 'anywhere', false)).toThrow(TypeError);
    expect(() => addon.makeTracker('hash-diff', {} as never, 'anywhere', false)).toThrow(TypeError);
    expect(() => region.native.pages.call(tracker as never)).toThrow(TypeError);
    expect(() => new (region.native.constructor as new () => unknown)()).toThrow(TypeError);
    expect(() => addon.createSender({} as never)).toThrow(TypeError);
    expect(() => addon.createReceiver({} as never)).toThrow(TypeError);
    expect(() => region.native.grow(2)).toThrow(RangeError);
    expect(() => addon.adopt([], 0, null)).toThrow(TypeError);
    tracker.close();
  });
});

/** Runs `body` in a worker with the addon; gives its first message. */
async function inWorker(body: string, workerData: unknown): Promise<unknown> {
  const path = new URL('../../build/Release/memferry.node', import.meta.url).pathname;
  const addon = process.env['MEMFERRY_ADDON'] ?? path;
  const worker = new Worker(
    `const { parentPort, workerData } = require('node:worker_threads');
     const addon = require(${JSON.stringify(addon)});
     ${body}`,
    { eval: true, workerData },
  );
  try {
    return await new Promise((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
    });
  } finally {
    await worker.terminate();
  }
}
