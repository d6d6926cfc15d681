/**
 * The rewrite under which a WebAssembly module becomes movable: every memory, every table, every mutable
 * global and every function that a reference can name gets an export of ours, beside the module's own. All
 * other bytes stay as they are, so no index, offset or custom section changes its meaning.
 */
import { encodeName, encodeU32, WasmFormatError } from './wasm-reader.js';
import { readShape, type Signature, type ValueType, type WasmShape } from './wasm-shape.js';

export const EXPORT_PREFIX = 'memferry:';
export const functionExport = (index: number): string => `${EXPORT_PREFIX}function:${index}`;
export const tableExport = (index: number): string => `${EXPORT_PREFIX}table:${index}`;
export const memoryExport = (index: number): string => `${EXPORT_PREFIX}memory:${index}`;
export const globalExport = (index: number): string => `${EXPORT_PREFIX}global:${index}`;

/** What engines accept in one module (V8: 100 000 until 2024). */
const MOST_EXPORTS = 100_000;

export interface Rewritten {
  bytes: Uint8Array;
  shape: WasmShape;
  /** What of this module can never move, in words; empty when all of it can. */
  unmovable: string[];
}

/** A global of these types cannot be read, or what it refers to lives in the engine's own heap. */
function unmovableParts(shape: WasmShape): string[] {
  const found: string[] = [];
  shape.globals.forEach((global, index) => {
    if (!global.mutable || global.type === 'externref') return;
    const name = global.imported ?? `${index}`;
    if (global.type === 'v128') found.push(`mutable global ${name} of type v128`);
    if (global.type === 'other') found.push(`mutable global ${name} of a garbage-collected reference type`);
  });
  shape.tables.forEach((table, index) => {
    if (table.type === 'other')
      found.push(`table ${table.imported ?? index} of garbage-collected references`);
  });
  shape.memories.forEach((memory, index) => {
    if (memory.memory64) found.push(`64-bit memory ${memory.imported ?? index}`);
  });
  return found;
}

/** Throws WasmFormatError where readShape does. */
export function rewriteModule(bytes: Uint8Array): Rewritten {
  const shape = readShape(bytes);
  const unmovable = unmovableParts(shape);
  if (shape.exports.some((entry) => entry.name.startsWith(EXPORT_PREFIX))) {
    throw new WasmFormatError(`the module has exports named ${EXPORT_PREFIX}* of its own`, 0);
  }

  const entries: number[][] = [];
  const add = (name: string, kind: number, index: number): void => {
    entries.push([...encodeName(name), kind, ...encodeU32(index)]);
  };
  for (const index of shape.referencable) add(functionExport(index), 0, index);
  shape.tables.forEach((table, index) => {
    if (table.type !== 'other') add(tableExport(index), 1, index);
  });
  for (const index of shape.memories.keys()) add(memoryExport(index), 2, index);
  shape.globals.forEach((global, index) => {
    if (global.mutable && global.type !== 'other' && global.type !== 'v128')
      add(globalExport(index), 3, index);
  });
  if (shape.exports.length + entries.length > MOST_EXPORTS) {
    const many = `${shape.exports.length} exports and ${shape.referencable.length} functions in tables`;
    throw new WasmFormatError(`the module has ${many}, more than an engine exports`, 0);
  }

  const own = shape.sections.find((section) => section.id === 7);
  const ownBody = own
    ? bytes.subarray(own.bodyStart + countLength(bytes, own.bodyStart), own.end)
    : new Uint8Array();
  const count = encodeU32(shape.exports.length + entries.length);
  const added = Uint8Array.from(entries.flat());
  const body = Buffer.concat([Uint8Array.from(count), ownBody, added]);
  const section = Buffer.concat([Uint8Array.from([7, ...encodeU32(body.length)]), body]);

  // Start, element, data count, code and data come after the exports; custom sections may stand anywhere.
  const after = new Set([8, 9, 10, 11, 12]);
  const pieces: Uint8Array[] = [bytes.subarray(0, 8)];
  let written = false;
  for (const each of shape.sections) {
    if (!written && (each.id === 7 || after.has(each.id))) {
      pieces.push(section);
      written = true;
    }
    if (each.id !== 7) pieces.push(bytes.subarray(each.start, each.end));
  }
  if (!written) pieces.push(section);
  return { bytes: Buffer.concat(pieces), shape, unmovable };
}

function countLength(bytes: Uint8Array, at: number): number {
  let length = 1;
  while ((bytes[at + length - 1] as number) >= 0x80) length++;
  return length;
}

const TYPE_CODE: Partial<Record<ValueType, number>> = {
  i32: 0x7f,
  i64: 0x7e,
  f32: 0x7d,
  f64: 0x7c,
  v128: 0x7b,
  funcref: 0x70,
  externref: 0x6f,
};

/** A module with one import `e.f`, exported again as `f`: how a host function gets into a table. */
export function trampolineModule(signature: Signature): Uint8Array {
  const code = (type: ValueType): number => {
    const found = TYPE_CODE[type];
    if (found === undefined) throw new TypeError(`a host function cannot take or give a ${type}`);
    return found;
  };
  const { parameters, results } = signature;
  const type = [
    1,
    0x60,
    ...encodeU32(parameters.length),
    ...parameters.map(code),
    ...encodeU32(results.length),
    ...results.map(code),
  ];
  return Uint8Array.from([
    ...[0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00],
    ...[1, ...encodeU32(type.length), ...type],
    ...[2, 7, 1, ...encodeName('e'), ...encodeName('f'), 0, 0],
    ...[7, 5, 1, ...encodeName('f'), 0, 0],
  ]);
}
