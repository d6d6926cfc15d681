import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';

import { tablesWritten } from '../../src/worker/wasm-code.js';
import { readShape } from '../../src/worker/wasm-shape.js';
import { wasm } from '../../src/worker/webassembly.js';
import * as b from '../support/guests/wasm-builder.js';

const written = (bytes: Uint8Array) => tablesWritten(bytes, readShape(bytes));

/** Two tables, and one function of this body. */
function withBody(...body: number[]): Uint8Array {
  return b.wasmModule(
    b.types(b.func([], [])),
    b.functions(0),
    b.tables([b.FUNCREF, 0, 4], [b.FUNCREF, 0, 4]),
    b.memories([0, 1]),
    b.section(9, [1, 1, 0, 1, 0]), // a passive segment of function 0
    b.code(body),
  );
}

describe('which tables code writes', () => {
  const zero = [0x41, 0];
  it.each<[string, number[], number[]]>([
    ['nothing', [], []],
    ['table.get', [...zero, 0x25, 1, 0x1a], []],
    ['table.set', [...zero, 0xd0, 0x70, 0x26, 1], [1]],
    ['table.grow', [0xd0, 0x70, ...zero, 0xfc, 15, 1, 0x1a], [1]],
    ['table.fill', [...zero, 0xd0, 0x70, ...zero, 0xfc, 17, 0], [0]],
    ['table.copy', [...zero, ...zero, ...zero, 0xfc, 14, 1, 0], [1]],
    ['table.init', [...zero, ...zero, ...zero, 0xfc, 12, 0, 1], [1]],
    ['table.size and memory.fill', [0xfc, 16, 1, 0x1a, ...zero, ...zero, ...zero, 0xfc, 11, 0], []],
    // Numbers in immediates that look like opcodes.
    [
      'constants of 0x26',
      [0x41, 0x26, 0x1a, 0x42, 0x26, 0x1a, 0x44, 0x26, 0, 0x26, 0, 0x26, 1, 0x26, 1, 0x1a],
      [],
    ],
    ['a branch table', [0x02, 0x40, ...zero, 0x0e, 1, 0, 0, 0x0b], []],
    ['a vector constant', [0xfd, 12, ...new Array<number>(16).fill(0x26), 0x1a], []],
    ['a typed select', [...zero, ...zero, ...zero, 0x1c, 1, b.I32, 0x1a], []],
  ])('%s', (_name, body, tables) => {
    const bytes = withBody(...body);
    // The engine agrees that these are modules.
    expect(() => new wasm.Module(bytes)).not.toThrow();
    expect([...(written(bytes) ?? [])]).toEqual(tables);
  });

  it('knows where it does not know', () => {
    for (const body of [[0xfb, 0, 0], [0xff], [0x27], [0xfc, 99], [0xfe, 0x0f]]) {
      expect(written(withBody(...body)), body.join()).toBeNull();
    }
  });

  it('reads whole programs, in which nobody writes tables', () => {
    const resolve = createRequire(import.meta.url).resolve;
    for (const [name, file] of [
      ['node-sqlite3-wasm', 'node-sqlite3-wasm.wasm'],
      ['wasmoon', 'glue.wasm'],
    ] as const) {
      const bytes = new Uint8Array(readFileSync(join(dirname(resolve(name)), file)));
      expect(written(bytes), name).toEqual(new Set());
    }
  });

  it('never ends in anything but an answer, whatever the bytes', () => {
    const good = withBody(0x41, 0, 0xd0, 0x70, 0x26, 1, 0xfc, 16, 1, 0x1a);
    const shape = readShape(good);
    const code = shape.sections.find(({ id }) => id === 10);
    for (let at = code?.bodyStart ?? 0; at < good.length; at++) {
      for (const value of [0, 0x26, 0x7f, 0x80, 0xfc, 0xff]) {
        const bytes = Uint8Array.from(good);
        bytes[at] = value;
        const found = tablesWritten(bytes, shape);
        expect(found === null || found instanceof Set).toBe(true);
      }
    }
  });
});
