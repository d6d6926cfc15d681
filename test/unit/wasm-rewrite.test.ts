import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';

import { WasmFormatError } from '../../src/worker/wasm-reader.js';
import { rewriteModule, trampolineModule } from '../../src/worker/wasm-rewrite.js';
import { readShape, trampolineSignature } from '../../src/worker/wasm-shape.js';
import { wasm } from '../../src/worker/webassembly.js';
import * as b from '../support/guests/wasm-builder.js';

const sqlitePath = join(
  dirname(createRequire(import.meta.url).resolve('node-sqlite3-wasm')),
  'node-sqlite3-wasm.wasm',
);
const sqlite = new Uint8Array(readFileSync(sqlitePath));

/** Deterministic, so that a failure can be repeated. */
function randomNumbers(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

function instantiate(bytes: Uint8Array, imports: unknown = {}) {
  return new wasm.Instance(new wasm.Module(bytes), imports).exports;
}

describe('the rewrite', () => {
  it('exports hidden globals, tables, memories and functions, which stay what they were', () => {
    const { bytes, unmovable } = rewriteModule(b.countingModule());
    expect(unmovable).toEqual([]);
    const exports = instantiate(bytes) as Record<string, unknown>;
    expect(Object.keys(exports).sort()).toEqual(
      [
        ...['call', 'memory', 'next', 'swap'],
        ...[0, 1].map((i) => `memferry:global:${i}`),
        ...[0, 1, 2, 3, 4].map((i) => `memferry:function:${i}`),
        ...['memferry:memory:0', 'memferry:table:0'],
      ].sort(),
    );
    expect((exports.next as () => number)()).toBe(6);
    expect((exports['memferry:global:0'] as { value: unknown }).value).toBe(6);
    expect((exports['memferry:global:1'] as { value: unknown }).value).toBe(7n);
    (exports['memferry:global:0'] as { value: unknown }).value = 41;
    expect((exports.next as () => number)()).toBe(42);
    expect(exports['memferry:memory:0']).toBe(exports.memory);
    const table = exports['memferry:table:0'] as { get(slot: number): unknown };
    expect(table.get(1)).toBe(exports['memferry:function:4']);
  });

  it('adds an export section where there is none, before what must come after it', () => {
    const start = b.section(8, [0]);
    const bytes = b.wasmModule(
      b.types(b.func([], [])),
      b.functions(0),
      b.globals([b.I32, true, [0x41, 1]]),
      start,
      b.code([0x41, 9, 0x24, 0]),
    );
    const exports = instantiate(rewriteModule(bytes).bytes);
    expect((exports['memferry:global:0'] as { value: unknown }).value).toBe(9);
    const none = b.wasmModule(b.memories([1, 1, 2]));
    expect(Object.keys(instantiate(rewriteModule(none).bytes))).toEqual(['memferry:memory:0']);
  });

  it('keeps custom sections, wherever they stand, and all other bytes', () => {
    const first = b.custom('first', [1, 2, 3]);
    const bytes = b.wasmModule(first, b.memories([0, 1]), b.custom('middle', [4]), b.custom('last', [5, 6]));
    const rewritten = rewriteModule(bytes).bytes;
    const Module = wasm.Module as unknown as { customSections(module: object, name: string): ArrayBuffer[] };
    for (const [name, body] of Object.entries({ first: [1, 2, 3], middle: [4], last: [5, 6] })) {
      expect([
        ...new Uint8Array(Module.customSections(new wasm.Module(rewritten), name)[0] as ArrayBuffer),
      ]).toEqual(body);
    }
    const before = readShape(sqlite);
    const movable = rewriteModule(sqlite).bytes;
    const after = readShape(movable);
    const body = (shape: typeof before, source: Uint8Array, id: number) => {
      const found = shape.sections.find((section) => section.id === id);
      return found ? Buffer.from(source.subarray(found.start, found.end)) : null;
    };
    for (const id of [1, 2, 3, 4, 5, 6, 9, 10, 11]) {
      const [own, ours] = [body(before, sqlite, id), body(after, movable, id)];
      expect(ours === own || ours?.equals(own as Buffer)).toBe(true);
    }
  });

  it('reads imports: a global and a table of the host are exported again as the same objects', () => {
    const bytes = b.wasmModule(
      b.imports(['e', 'g', 3, [b.I32, 1]], ['e', 't', 1, [b.FUNCREF, 0, 2]], ['e', 'm', 2, [0, 1]]),
    );
    const { shape } = rewriteModule(bytes);
    expect(shape.globals).toEqual([{ type: 'i32', mutable: true, imported: 'e.g' }]);
    expect(shape.memories[0]?.imported).toBe('e.m');
    const space = (
      globalThis as unknown as { WebAssembly: Record<string, new (...args: unknown[]) => object> }
    ).WebAssembly;
    const t = new (space.Table as new (d: unknown) => object)({ element: 'anyfunc', initial: 2 });
    const m = new wasm.Memory({ initial: 1 });
    const g = new (space.Global as new (d: unknown, v: number) => { value: number })(
      { value: 'i32', mutable: true },
      3,
    );
    const exports = instantiate(rewriteModule(bytes).bytes, { e: { g, t, m } });
    expect(exports['memferry:table:0']).toBe(t);
    expect(exports['memferry:memory:0']).toBe(m);
    (exports['memferry:global:0'] as { value: number }).value = 4;
    expect(g.value).toBe(4);
  });

  it('names what cannot move', () => {
    const second = b.wasmModule(b.imports(['e', 'v', 3, [b.V128, 1]]), b.memories([4, 1]));
    expect(rewriteModule(second).unmovable).toEqual(['mutable global e.v of type v128', '64-bit memory 0']);
    const eqref = b.wasmModule(b.section(6, [1, 0x6d, 1, 0xd0, 0x6d, 0x0b]));
    expect(rewriteModule(eqref).unmovable).toEqual([
      'mutable global 0 of a garbage-collected reference type',
    ]);
  });

  it('recognises a host function in WebAssembly clothes, and makes one', () => {
    const bytes = trampolineModule({ parameters: ['i32', 'f64'], results: ['i32'] });
    expect(trampolineSignature(readShape(bytes))).toEqual({ parameters: ['i32', 'f64'], results: ['i32'] });
    const f = instantiate(bytes, { e: { f: (a: number, c: number) => a + c } }).f as (
      a: number,
      c: number,
    ) => number;
    expect(f(1, 2.5)).toBe(3);
    expect(trampolineSignature(readShape(b.countingModule()))).toBeNull();
  });

  it('takes SQLite, which still works', () => {
    const { bytes, shape, unmovable } = rewriteModule(sqlite);
    expect(unmovable).toEqual([]);
    expect(shape.memories).toHaveLength(1);
    expect(shape.globals.filter((global) => global.mutable)).toHaveLength(1);
    expect(shape.referencable.length).toBeGreaterThan(400);
    expect(() => new wasm.Module(bytes)).not.toThrow();
  });
});

describe('binaries that are no modules', () => {
  it('are refused with the place, wherever they are cut', () => {
    const bytes = b.countingModule();
    const whole = readShape(bytes);
    const ends = new Set([8, ...whole.sections.map((section) => section.end)]);
    for (let length = 0; length < bytes.length; length++) {
      const cut = bytes.slice(0, length);
      // At a section's end the rest is a shorter module, in which functions may be missing.
      if (ends.has(length)) continue;
      expect(() => rewriteModule(cut), `cut at ${length}`).toThrow(WasmFormatError);
    }
    expect(() => readShape(Uint8Array.from([0, 1, 2]))).toThrow(/at byte/);
  });

  it('never end in anything but a result or a WasmFormatError, and quickly', () => {
    const random = randomNumbers(42);
    const base = b.countingModule();
    // SQLite's head: types, imports, functions, table, memory, globals, exports, elements.
    const head = readShape(sqlite).sections.find((section) => section.id === 10)?.start ?? 0;
    const bases = [base, sqlite.slice(0, head)];
    for (let i = 0; i < 4000; i++) {
      const bytes = Uint8Array.from(bases[i % 40 === 0 ? 1 : 0] as Uint8Array);
      const changes = 1 + Math.floor(random() * 4);
      for (let j = 0; j < changes; j++)
        bytes[Math.floor(random() * bytes.length)] = Math.floor(random() * 256);
      try {
        rewriteModule(bytes);
      } catch (error) {
        expect(error).toBeInstanceOf(WasmFormatError);
      }
    }
  });

  it('with absurd lengths allocate nothing', () => {
    const many = [0xff, 0xff, 0xff, 0xff, 0x0f];
    for (const id of [1, 2, 3, 4, 5, 6, 7, 9]) {
      expect(() => readShape(b.wasmModule(b.section(id, many)))).toThrow(/elements announced/);
    }
    expect(() => readShape(b.wasmModule([1, ...many]))).toThrow(WasmFormatError);
    expect(() => readShape(b.wasmModule([1, 0xff, 0xff, 0xff, 0xff, 0xff, 1]))).toThrow(/too long/);
    expect(() => readShape(b.wasmModule(b.memories([0, 1]), b.memories([0, 1])))).toThrow(/twice/);
  });
});
