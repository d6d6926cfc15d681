/**
 * What the WebAssembly of one worker consists of: instances, memories, tables and mutable globals, numbered in
 * the order in which the guest made them. The same guest code makes the same ones at the destination, so the
 * numbers are names that both sides share. Lives in the worker, filled by the intercepts.
 */
import { createHash } from 'node:crypto';

import { HostReferences } from './host-references.js';
import { tablesWritten } from './wasm-code.js';
import { hideOurs } from './wasm-exports.js';
import {
  functionExport,
  globalExport,
  memoryExport,
  type Rewritten,
  rewriteModule,
  tableExport,
} from './wasm-rewrite.js';
import {
  type Signature,
  signatureText,
  trampolineSignature,
  type ValueType,
  type WasmShape,
} from './wasm-shape.js';
import type { KnownTable } from './wasm-tables.js';
import type {
  WasmExports,
  WasmGlobalObject,
  WasmInstance,
  WasmMemoryObject,
  WasmModule,
  WasmTableObject,
} from './webassembly.js';

export const WASM_PAGE_BYTES = 65_536;

/** More changes to a table than are worth remembering one by one. */
const MOST_WRITTEN = 4096;

export interface ModuleRecord {
  /** SHA-256 of the binary as the guest had it, 64 hex digits. */
  sha256: string;
  shape: WasmShape | null;
  /** Numbers of the tables that its code writes; null where any may be. */
  tablesWritten: ReadonlySet<number> | null;
  unmovable: string[];
}

export interface GlobalRecord {
  /** `<instance>:<index in its module>`. */
  name: string;
  type: ValueType;
  global: WasmGlobalObject;
}

export interface TableRecord {
  name: string;
  type: ValueType;
  table: WasmTableObject;
  /** What stood there when it was read last. Null: to be read as a whole. */
  known: KnownTable | null;
  /** Slots that JavaScript has written since. */
  written: Set<number>;
  /** Code of WebAssembly writes it, which nobody sees: it is read as a whole every time. */
  unseen: boolean;
}

export interface MemoryRecord {
  memory: WasmMemoryObject;
  shared: boolean;
  /** How long it was when it was numbered. */
  madeBytes: number;
}

export type FunctionOwner =
  | { kind: 'instance'; instance: number; index: number }
  | {
      kind: 'host';
      ordinal: number;
      /** As `signatureText` has it. */
      signature: string;
      host: WeakRef<object> | null;
      name: string;
    };

export class WasmRegistry {
  readonly instances: {
    sha256: string;
    imports: unknown;
    memories: number[];
  }[] = [];
  readonly memories: MemoryRecord[] = [];
  readonly tables: TableRecord[] = [];
  readonly globals: GlobalRecord[] = [];
  /** What cannot move, in words, as far as it is known from modules and instances. */
  readonly unmovable: string[] = [];
  /** WebAssembly functions around one host function each, in the order of their making. */
  readonly trampolines: WeakRef<object>[] = [];
  readonly owners = new WeakMap<object, FunctionOwner>();
  readonly hostReferences = new HostReferences();
  /** Goes up with everything that is added. */
  version = 0;

  readonly #modules = new WeakMap<WasmModule, ModuleRecord>();
  readonly #memoryNumbers = new WeakMap<WasmMemoryObject, number>();
  readonly #functions: Map<number, object>[] = [];
  readonly #tables = new WeakMap<WasmTableObject, TableRecord>();
  readonly #seenGlobals = new WeakSet<WasmGlobalObject>();

  /**
   * `plan`: the length in bytes that each memory has at the source. A memory gets as long before the guest's
   * glue sees it, because growing later would detach the glue's views; 0 for one that the program itself makes longer
   * while it is built, which must begin as it did there. Empty in a guest's first life.
   * `given`: a memory that the guest's workers share, which the main thread made and moves.
   */
  constructor(
    readonly plan: readonly number[] = [],
    readonly given: WasmMemoryObject | null = null,
  ) {}

  /** What to compile in place of `bytes`. A binary that cannot be read is left as it is: the engine judges it. */
  rewrite(bytes: Uint8Array): { bytes: Uint8Array; record: ModuleRecord } {
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    const name = `WebAssembly module ${sha256.slice(0, 12)}`;
    let result: Rewritten;
    try {
      result = rewriteModule(bytes);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      return {
        bytes,
        record: { sha256, shape: null, tablesWritten: null, unmovable: [`${name}: ${reason}`] },
      };
    }
    const unmovable = result.unmovable.map((part) => `${name}: ${part}`);
    return {
      bytes: result.bytes,
      record: {
        sha256,
        shape: result.shape,
        tablesWritten: tablesWritten(bytes, result.shape),
        unmovable,
      },
    };
  }

  addModule(module: WasmModule, record: ModuleRecord): void {
    this.#modules.set(module, record);
  }

  moduleOf(module: WasmModule): ModuleRecord | undefined {
    return this.#modules.get(module);
  }

  memoryNumber(memory: WasmMemoryObject): number | undefined {
    return this.#memoryNumbers.get(memory);
  }

  /** Numbers a memory and makes it as long as it is at the source. */
  addMemory(memory: WasmMemoryObject, shared: boolean): void {
    if (this.#memoryNumbers.has(memory) || memory === this.given) return;
    const number = this.memories.length;
    const missing = (this.plan[number] ?? 0) - memory.buffer.byteLength;
    if (missing > 0) memory.grow(Math.ceil(missing / WASM_PAGE_BYTES));
    this.#memoryNumbers.set(memory, number);
    this.memories.push({ memory, shared, madeBytes: memory.buffer.byteLength });
    this.version++;
  }

  addInstance(module: WasmModule, instance: WasmInstance, imports: unknown): void {
    const record = this.#modules.get(module);
    this.version++;
    if (!record?.shape) {
      const reasons = record?.unmovable ?? ['an instance of a WebAssembly.Module from another thread'];
      this.unmovable.push(...reasons);
      return;
    }
    const { shape } = record;
    const all = instance.exports;
    hideOurs(instance);

    const signature = trampolineSignature(shape);
    if (signature) {
      this.#addTrampoline(shape, all, signature, imports);
      return;
    }
    this.unmovable.push(...record.unmovable);
    const number = this.instances.length;
    const memories: number[] = [];
    this.instances.push({ sha256: record.sha256, imports, memories });
    const functions = new Map<number, object>();
    this.#functions.push(functions);
    for (const index of shape.referencable) {
      const reference = all[functionExport(index)];
      if (typeof reference === 'function') functions.set(index, reference);
      // An import that is another instance's function is that function itself, and known already.
      if (typeof reference === 'function' && !this.owners.has(reference)) {
        this.owners.set(reference, {
          kind: 'instance',
          instance: number,
          index,
        });
      }
    }
    shape.memories.forEach((description, index) => {
      const memory = all[memoryExport(index)] as WasmMemoryObject;
      if (memory === this.given) return;
      if (description.imported !== null && this.memoryNumber(memory) === undefined) {
        this.unmovable.push(`memory ${description.imported}, which was not made in this worker`);
      }
      this.addMemory(memory, description.shared);
      memories.push(this.memoryNumber(memory) as number);
    });
    shape.tables.forEach((description, index) => {
      const table = all[tableExport(index)] as WasmTableObject | undefined;
      if (table === undefined) return;
      const unseen = record.tablesWritten?.has(index) ?? true;
      const known = this.#tables.get(table);
      if (known) {
        // The new instance's element segments may have written it.
        known.known = null;
        known.unseen ||= unseen;
        return;
      }
      const added: TableRecord = {
        name: `${number}:${index}`,
        type: description.type,
        table,
        known: null,
        written: new Set(),
        unseen,
      };
      this.#tables.set(table, added);
      this.tables.push(added);
    });
    shape.globals.forEach((description, index) => {
      const global = all[globalExport(index)] as WasmGlobalObject | undefined;
      if (global === undefined || this.#seenGlobals.has(global)) return;
      this.#seenGlobals.add(global);
      this.globals.push({
        name: `${number}:${index}`,
        type: description.type,
        global,
      });
    });
  }

  /** JavaScript is writing `slot`; null: more than one, or the length. */
  tableWritten(table: WasmTableObject, slot: number | null): void {
    const record = this.#tables.get(table);
    if (!record) return;
    if (slot === null || record.written.size >= MOST_WRITTEN) record.known = null;
    else record.written.add(slot);
  }

  /** Somebody wrote, and nobody knows which: no table is what it was known to be. */
  tablesUnknown(): void {
    for (const record of this.tables) record.known = null;
  }

  /** An instance's functions that references can name, by their index in the module. */
  functionsOf(instance: number): ReadonlyMap<number, object> | undefined {
    return this.#functions[instance];
  }

  #addTrampoline(shape: WasmShape, all: WasmExports, signature: Signature, imports: unknown): void {
    const reference = all[functionExport(0)];
    if (typeof reference !== 'function' || this.owners.has(reference)) return;
    const name = shape.importedFunctions[0]?.name ?? '';
    const dot = name.indexOf('.');
    const from = Object(Object(imports)[name.slice(0, dot)])[name.slice(dot + 1)] as unknown;
    const host = typeof from === 'function' ? from : null;
    this.owners.set(reference, {
      kind: 'host',
      ordinal: this.trampolines.length,
      signature: signatureText(signature),
      host: host ? new WeakRef(host) : null,
      name: host?.name ? `"${host.name}"` : 'without a name',
    });
    this.trampolines.push(new WeakRef(reference));
  }
}
