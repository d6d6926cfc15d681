/** Builds small WebAssembly binaries by hand, section by section, for tests of the reader and the rewrite. */

export const I32 = 0x7f;
export const I64 = 0x7e;
export const F64 = 0x7c;
export const V128 = 0x7b;
export const FUNCREF = 0x70;
export const EXTERNREF = 0x6f;

type Bytes = readonly number[];

export function leb(value: number): number[] {
  return value < 128 ? [value] : [(value & 127) | 128, ...leb(Math.floor(value / 128))];
}

export function text(value: string): number[] {
  const bytes = [...Buffer.from(value)];
  return [...leb(bytes.length), ...bytes];
}

export function vector(items: readonly Bytes[]): number[] {
  return [...leb(items.length), ...items.flat()];
}

export function section(id: number, body: Bytes): number[] {
  return [id, ...leb(body.length), ...body];
}

export function wasmModule(...sections: Bytes[]): Uint8Array {
  return Uint8Array.from([0, 0x61, 0x73, 0x6d, 1, 0, 0, 0, ...sections.flat()]);
}

export const types = (...items: Bytes[]) => section(1, vector(items));
export const func = (parameters: Bytes, results: Bytes) => [
  0x60,
  ...leb(parameters.length),
  ...parameters,
  ...leb(results.length),
  ...results,
];
export const imports = (...items: [module: string, name: string, kind: number, description: Bytes][]) =>
  section(
    2,
    vector(items.map(([module, name, kind, rest]) => [...text(module), ...text(name), kind, ...rest])),
  );
export const functions = (...typeIndexes: number[]) => section(3, vector(typeIndexes.map(leb)));
export const tables = (...items: Bytes[]) => section(4, vector(items));
export const memories = (...items: Bytes[]) => section(5, vector(items));
export const globals = (...items: [type: number, mutable: boolean, init: Bytes][]) =>
  section(6, vector(items.map(([type, mutable, init]) => [type, mutable ? 1 : 0, ...init, 0x0b])));
export const exports_ = (...items: [name: string, kind: number, index: number][]) =>
  section(7, vector(items.map(([name, kind, index]) => [...text(name), kind, ...leb(index)])));
/** An active segment of table 0. */
export const elements = (offset: number, indexes: number[]) =>
  section(9, vector([[0, 0x41, ...leb(offset), 0x0b, ...vector(indexes.map(leb))]]));
export const code = (...bodies: Bytes[]) =>
  section(10, vector(bodies.map((body) => [...leb(body.length + 2), 0, ...body, 0x0b])));
export const custom = (name: string, body: Bytes) => section(0, [...text(name), ...body]);

/**
 * A program with everything that moves beside its memory: memory of `pages`, a hidden mutable global that
 * `next()` counts up, a hidden table through which `call(slot)` calls, and `swap()`, which exchanges slots 0
 * and 1 of it.
 */
export function countingModule(pages = 1): Uint8Array {
  return wasmModule(
    types(func([], [I32]), func([I32], [I32]), func([], [])),
    functions(0, 1, 2, 0, 0),
    tables([FUNCREF, 0, 4]),
    memories([0, pages]),
    globals([I32, true, [0x41, 5]], [I64, true, [0x42, 7]], [I32, false, [0x41, 1]]),
    exports_(['memory', 2, 0], ['next', 0, 0], ['call', 0, 1], ['swap', 0, 2]),
    elements(0, [3, 4]),
    code(
      [0x23, 0, 0x41, 1, 0x6a, 0x24, 0, 0x23, 0], // global 0 += 1, and gives it
      [0x20, 0, 0x11, 0, 0], // call_indirect
      // table[0] <-> table[1], through slot 2
      [
        0x41, 2, 0x41, 0, 0x25, 0, 0x26, 0, 0x41, 0, 0x41, 1, 0x25, 0, 0x26, 0, 0x41, 1, 0x41, 2, 0x25, 0,
        0x26, 0,
      ],
      [0x41, 30],
      [0x41, 31],
    ),
  );
}
