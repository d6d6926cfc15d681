/**
 * Reads of a WebAssembly binary what a migration must know: memories, tables, mutable globals, exports, and
 * the functions that a reference can name. Code and data are stepped over; the engine validates them.
 * Sections and types: WebAssembly core specification, "Binary Format".
 */
import { WasmFormatError, WasmReader } from './wasm-reader.js';

export type ValueType = 'i32' | 'i64' | 'f32' | 'f64' | 'v128' | 'funcref' | 'externref' | 'other';

export interface WasmGlobal {
  type: ValueType;
  mutable: boolean;
  /** `module.name` of an import, else null. */
  imported: string | null;
}

export interface WasmTable {
  type: ValueType;
  imported: string | null;
}

export interface WasmMemory {
  initialPages: number;
  /** null: as far as the engine allows. */
  maximumPages: number | null;
  shared: boolean;
  memory64: boolean;
  imported: string | null;
}

export interface WasmSection {
  id: number;
  /** [start, end) with the section's header. */
  start: number;
  end: number;
  bodyStart: number;
}

export interface Signature {
  parameters: ValueType[];
  results: ValueType[];
}

/** As `i32,i64>f64`. */
export function signatureText({ parameters, results }: Signature): string {
  return `${parameters.join()}>${results.join()}`;
}

/** The types are not checked: the text may be a peer's. */
export function parseSignature(text: string): Signature {
  const [parameters = '', results = ''] = text.split('>');
  const types = (list: string) => (list === '' ? [] : (list.split(',') as ValueType[]));
  return { parameters: types(parameters), results: types(results) };
}

export interface WasmShape {
  sections: WasmSection[];
  globals: WasmGlobal[];
  tables: WasmTable[];
  memories: WasmMemory[];
  importedFunctions: { name: string; type: number }[];
  /** Functions of the module's own. */
  ownFunctions: number;
  exports: { name: string; kind: number; index: number }[];
  /** Functions that a `ref.func` may name: those in element segments, exports and globals. Ascending. */
  referencable: number[];
  /** By type index; null where the type is no plain function type. */
  signatures: (Signature | null)[];
  start: number | null;
}

/** More sections than any tool writes: custom ones may repeat. */
const MOST_SECTIONS = 10_000;

const NUMERIC: Record<number, ValueType> = {
  127: 'i32',
  126: 'i64',
  125: 'f32',
  124: 'f64',
  123: 'v128',
  112: 'funcref',
  111: 'externref',
};

function valueType(reader: WasmReader): ValueType {
  const code = reader.u8();
  const known = NUMERIC[code];
  if (known) return known;
  if (code === 0x63 || code === 0x64) {
    const heapType = reader.peek();
    reader.skipLeb(33);
    if (code === 0x63 && heapType === 0x70) return 'funcref';
    if (code === 0x63 && heapType === 0x6f) return 'externref';
    return 'other';
  }
  // The shorthands of the garbage collector's and the exceptions' reference types.
  if (code >= 0x65 && code <= 0x78) return 'other';
  return reader.fail(`unknown value type 0x${code.toString(16)}`);
}

function limits(reader: WasmReader): {
  flags: number;
  initial: number;
  maximum: number | null;
} {
  const flags = reader.u8();
  if (flags > 0x0f) reader.fail(`unknown limits 0x${flags.toString(16)}`);
  const initial = reader.u64();
  const maximum = flags & 1 ? reader.u64() : null;
  if (flags & 8) reader.u32();
  return { flags, initial, maximum };
}

function memoryType(reader: WasmReader, imported: string | null): WasmMemory {
  const { flags, initial, maximum } = limits(reader);
  return {
    initialPages: initial,
    maximumPages: maximum,
    shared: (flags & 2) !== 0,
    memory64: (flags & 4) !== 0,
    imported,
  };
}

function tableType(reader: WasmReader, imported: string | null): WasmTable {
  const type = valueType(reader);
  limits(reader);
  return { type, imported };
}

/** Steps over a constant expression; functions that it names go into `references`. */
function constantExpression(reader: WasmReader, references: Set<number>): void {
  for (;;) {
    const opcode = reader.u8();
    switch (opcode) {
      case 0x0b:
        return;
      case 0x41:
        reader.skipLeb(32);
        break;
      case 0x42:
        reader.skipLeb(64);
        break;
      case 0x43:
        reader.skip(4);
        break;
      case 0x44:
        reader.skip(8);
        break;
      case 0x23:
        reader.u32();
        break;
      case 0xd0:
        reader.skipLeb(33);
        break;
      case 0xd2:
        references.add(reader.u32());
        break;
      case 0x6a:
      case 0x6b:
      case 0x6c:
      case 0x7c:
      case 0x7d:
      case 0x7e:
        break;
      case 0xfb:
        gcConstant(reader);
        break;
      case 0xfd:
        if (reader.u32() !== 0x0c) reader.fail('unknown vector instruction in a constant expression');
        reader.skip(16);
        break;
      default:
        reader.fail(`unknown instruction 0x${opcode.toString(16)} in a constant expression`);
    }
  }
}

function gcConstant(reader: WasmReader): void {
  const opcode = reader.u32();
  switch (opcode) {
    case 0: // struct.new
    case 1: // struct.new_default
    case 6: // array.new
    case 7: // array.new_default
      reader.u32();
      return;
    case 8: // array.new_fixed
      reader.u32();
      reader.u32();
      return;
    case 26: // any.convert_extern
    case 27: // extern.convert_any
    case 28: // ref.i31
      return;
    default:
      reader.fail(`unknown instruction 0xfb ${opcode} in a constant expression`);
  }
}

function types(reader: WasmReader, shape: WasmShape): void {
  const count = reader.count();
  for (let i = 0; i < count; i++) {
    // Recursive and structure types number themselves differently: from there on signatures are unknown,
    // which only costs the recognition of host functions in tables.
    if (reader.u8() !== 0x60) return;
    const parameters = Array.from({ length: reader.count() }, () => valueType(reader));
    const results = Array.from({ length: reader.count() }, () => valueType(reader));
    shape.signatures.push({ parameters, results });
  }
}

function imports(reader: WasmReader, shape: WasmShape): void {
  const count = reader.count();
  for (let i = 0; i < count; i++) {
    const name = `${reader.name()}.${reader.name()}`;
    const kind = reader.u8();
    if (kind === 0) shape.importedFunctions.push({ name, type: reader.u32() });
    else if (kind === 1) shape.tables.push(tableType(reader, name));
    else if (kind === 2) shape.memories.push(memoryType(reader, name));
    else if (kind === 3) {
      const type = valueType(reader);
      shape.globals.push({
        type,
        mutable: (reader.u8() & 1) === 1,
        imported: name,
      });
    } else if (kind === 4) {
      reader.u8();
      reader.u32();
    } else reader.fail(`unknown kind of import ${kind}`);
  }
}

function elements(reader: WasmReader, references: Set<number>): void {
  const count = reader.count();
  for (let i = 0; i < count; i++) {
    const flags = reader.u32();
    if (flags > 7) reader.fail(`unknown element segment ${flags}`);
    const active = (flags & 1) === 0;
    if (active && flags & 2) reader.u32();
    if (active) constantExpression(reader, references);
    if (flags & 4) {
      if (flags & 3) valueType(reader);
      const expressions = reader.count();
      for (let j = 0; j < expressions; j++) constantExpression(reader, references);
    } else {
      if (flags & 3 && reader.u8() !== 0) reader.fail('unknown kind of element');
      const functions = reader.count();
      for (let j = 0; j < functions; j++) references.add(reader.u32());
    }
  }
}

function globals(reader: WasmReader, shape: WasmShape, references: Set<number>): void {
  const count = reader.count();
  for (let i = 0; i < count; i++) {
    const type = valueType(reader);
    shape.globals.push({
      type,
      mutable: (reader.u8() & 1) === 1,
      imported: null,
    });
    constantExpression(reader, references);
  }
}

function tables(reader: WasmReader, shape: WasmShape, references: Set<number>): void {
  const count = reader.count();
  for (let i = 0; i < count; i++) {
    const initialised = reader.peek() === 0x40;
    if (initialised) reader.skip(2);
    shape.tables.push(tableType(reader, null));
    if (initialised) constantExpression(reader, references);
  }
}

function section(reader: WasmReader, id: number, shape: WasmShape, references: Set<number>): void {
  if (id === 1) types(reader, shape);
  else if (id === 2) imports(reader, shape);
  else if (id === 3) shape.ownFunctions = reader.count();
  else if (id === 4) tables(reader, shape, references);
  else if (id === 5) {
    const count = reader.count();
    for (let i = 0; i < count; i++) shape.memories.push(memoryType(reader, null));
  } else if (id === 6) globals(reader, shape, references);
  else if (id === 7) {
    const count = reader.count();
    for (let i = 0; i < count; i++) {
      const entry = {
        name: reader.name(),
        kind: reader.u8(),
        index: reader.u32(),
      };
      if (entry.kind === 0) references.add(entry.index);
      shape.exports.push(entry);
    }
  } else if (id === 8) shape.start = reader.u32();
  else if (id === 9) elements(reader, references);
}

/** Throws WasmFormatError on a binary that is truncated, malformed, or newer than this reader. */
export function readShape(bytes: Uint8Array): WasmShape {
  const reader = new WasmReader(bytes, 0, bytes.length);
  const preamble = [0x00, 0x61, 0x73, 0x6d, 0x01, 0x00, 0x00, 0x00];
  for (const expected of preamble) {
    if (reader.u8() !== expected) throw new WasmFormatError('no WebAssembly module of version 1', 0);
  }
  const shape: WasmShape = {
    sections: [],
    globals: [],
    tables: [],
    memories: [],
    importedFunctions: [],
    ownFunctions: 0,
    exports: [],
    referencable: [],
    signatures: [],
    start: null,
  };
  const references = new Set<number>();
  const seen = new Set<number>();
  while (!reader.done) {
    const start = reader.at;
    const id = reader.u8();
    const length = reader.u32();
    const bodyStart = reader.at;
    reader.skip(length);
    if (id !== 0) {
      if (seen.has(id)) throw new WasmFormatError(`section ${id} appears twice`, start);
      seen.add(id);
      section(new WasmReader(bytes, bodyStart, reader.at), id, shape, references);
    }
    shape.sections.push({ id, start, end: reader.at, bodyStart });
    if (shape.sections.length > MOST_SECTIONS) reader.fail('too many sections');
  }
  const functions = shape.importedFunctions.length + shape.ownFunctions;
  for (const index of references) {
    if (index >= functions) throw new WasmFormatError(`function ${index} of ${functions}`, bytes.length);
  }
  shape.referencable = [...references].sort((a, b) => a - b);
  return shape;
}

/** A module that does nothing but turn one host function into a WebAssembly function (a table's way to hold one). */
export function trampolineSignature(shape: WasmShape): Signature | null {
  const only = shape.importedFunctions[0];
  const bare =
    shape.importedFunctions.length === 1 &&
    shape.ownFunctions === 0 &&
    shape.globals.length + shape.tables.length + shape.memories.length === 0 &&
    shape.start === null &&
    shape.exports.length > 0 &&
    shape.exports.every((entry) => entry.kind === 0 && entry.index === 0);
  return only && bare ? (shape.signatures[only.type] ?? null) : null;
}
