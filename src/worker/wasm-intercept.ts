/**
 * Stands between the guest and the global `WebAssembly` of its worker, installed before the guest's module is
 * loaded: modules are rewritten as they are compiled, instances and memories enter the registry. Everything
 * else, `instanceof` included, behaves as before.
 */
import { fileURLToPath } from 'node:url';
import { ownExports } from './wasm-exports.js';
import type { ModuleRecord, WasmRegistry } from './wasm-registry.js';
import {
  type WasmInstance,
  type WasmMemoryObject,
  type WasmModule,
  type WasmNamespace,
  type WasmTableObject,
  wasm,
} from './webassembly.js';

type Bytes = ArrayBuffer | ArrayBufferView;
type AnyArgs = unknown[];

export function interceptWebAssembly(registry: WasmRegistry): void {
  const native = copyOf(wasm);
  const untracked = new WeakSet<object>();

  const remember = (module: WasmModule, record: ModuleRecord) => {
    registry.addModule(module, record);
    return module;
  };
  const instantiated = (module: WasmModule, instance: WasmInstance, imports: unknown) => {
    if (!untracked.has(module)) registry.addInstance(module, instance, imports);
    return instance;
  };

  const Module: WasmNamespace['Module'] = new Proxy(native.Module, {
    construct(target, args: AnyArgs, newTarget): object {
      const make = (bytes: unknown): object =>
        Reflect.construct(target, [bytes, ...args.slice(1)], newTarget === Module ? target : newTarget);
      const bytes = bytesOf(args[0]);
      // What is no buffer source is refused by the engine, in the engine's words.
      if (bytes === null || calledByNode()) return note(untracked, make(args[0]));
      const rewritten = registry.rewrite(bytes);
      return remember(make(rewritten.bytes) as WasmModule, rewritten.record);
    },
    get(target, property, receiver): unknown {
      if (property === 'exports') return ownExports(target.exports.bind(target));
      return Reflect.get(target, property, receiver);
    },
  });

  const Instance: WasmNamespace['Instance'] = new Proxy(native.Instance, {
    construct(target, args: AnyArgs, newTarget): object {
      let instance: object;
      try {
        instance = Reflect.construct(target, args, newTarget === Instance ? target : newTarget);
      } catch (error) {
        // Its element segments may have been written before a later one, a data segment or the start function failed.
        registry.tablesUnknown();
        throw error;
      }
      return instantiated(args[0] as WasmModule, instance as WasmInstance, args[1]);
    },
  });

  const Memory: WasmNamespace['Memory'] = new Proxy(native.Memory, {
    construct(target, args: AnyArgs, newTarget): object {
      const memory = Reflect.construct(target, args, newTarget === Memory ? target : newTarget);
      if (!calledByNode()) {
        const { shared } = Object(args[0]) as { shared?: boolean };
        registry.addMemory(memory as WasmMemoryObject, shared === true);
      }
      return memory;
    },
  });

  const compile = async (source: unknown, ...rest: AnyArgs): Promise<WasmModule> => {
    const internal = calledByNode();
    const bytes = bytesOf(source);
    const plain = native.compile as (...args: AnyArgs) => Promise<WasmModule>;
    if (bytes === null || internal) return note(untracked, await plain(source, ...rest));
    // As the specification has it, the bytes count as they are now.
    const rewritten = registry.rewrite(Uint8Array.from(bytes));
    return remember(await plain(rewritten.bytes, ...rest), rewritten.record);
  };

  const instantiate = async (source: unknown, imports?: unknown, ...rest: AnyArgs): Promise<unknown> => {
    const plain = native.instantiate as unknown as (...args: AnyArgs) => Promise<WasmInstance>;
    /** As in Instance. */
    const made = async (module: WasmModule): Promise<WasmInstance> => {
      try {
        return await plain(module, imports);
      } catch (error) {
        registry.tablesUnknown();
        throw error;
      }
    };
    if (source instanceof native.Module) return instantiated(source, await made(source), imports);
    const internal = calledByNode();
    const bytes = bytesOf(source);
    if (bytes === null || internal) {
      const result = (await plain(source, imports, ...rest)) as unknown as {
        module: WasmModule;
      };
      note(untracked, result.module);
      return result;
    }
    const module = await compile(source, ...rest);
    return {
      module,
      instance: instantiated(module, await made(module), imports),
    };
  };

  /** Streams are read whole: a rewrite needs the whole binary. The checks are those of the Web API. */
  const binaryOf = async (source: unknown): Promise<ArrayBuffer> => {
    const response = (await source) as Response;
    if (!(response instanceof Response)) throw new TypeError('a Response, or a promise of one, is needed');
    if (!response.ok) throw new TypeError(`HTTP status code is not ok: ${response.status}`);
    const type = response.headers.get('content-type')?.trim().toLowerCase();
    if (type !== 'application/wasm') throw new TypeError(`Incorrect response MIME type: ${type ?? 'none'}`);
    return response.arrayBuffer();
  };

  watchTables(registry, native.Table.prototype);
  const replaced: Record<string, unknown> = {
    Module,
    Instance,
    Memory,
    compile,
    instantiate,
    compileStreaming: async (source: unknown, ...rest: AnyArgs) => compile(await binaryOf(source), ...rest),
    instantiateStreaming: async (source: unknown, imports?: unknown, ...rest: AnyArgs) =>
      instantiate(await binaryOf(source), imports, ...rest),
  };
  for (const [name, value] of Object.entries(replaced)) {
    Object.defineProperty(wasm, name, {
      value,
      writable: true,
      configurable: true,
    });
  }
}

/** What JavaScript writes into tables, the registry hears of before it is written. */
function watchTables(registry: WasmRegistry, prototype: WasmTableObject): void {
  const { set, grow } = prototype;
  const replaced = {
    set(this: WasmTableObject, ...args: [number, unknown?]): void {
      registry.tableWritten(this, Number.isInteger(args[0]) ? args[0] : null);
      Reflect.apply(set, this, args);
    },
    grow(this: WasmTableObject, ...args: [number, unknown?]): number {
      registry.tableWritten(this, null);
      return Reflect.apply(grow, this, args);
    },
  };
  for (const [name, value] of Object.entries(replaced)) {
    Object.defineProperty(prototype, name, { value, writable: true, enumerable: true, configurable: true });
  }
}

function copyOf(from: WasmNamespace): WasmNamespace {
  const names = Object.getOwnPropertyNames(from) as (keyof WasmNamespace)[];
  return Object.fromEntries(names.map((name) => [name, from[name]])) as unknown as WasmNamespace;
}

function note<T>(set: WeakSet<object>, value: T): T {
  set.add(value as object);
  return value;
}

function bytesOf(source: unknown): Uint8Array | null {
  if (ArrayBuffer.isView(source)) {
    const view: Bytes = source;
    return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
  }
  if (source instanceof ArrayBuffer || source instanceof SharedArrayBuffer) return new Uint8Array(source);
  return null;
}

const HERE = fileURLToPath(import.meta.url);

/**
 * Node's own WebAssembly (the CommonJS lexer, the HTTP parser of `fetch`) is the same at every host and no
 * part of the guest. It is told by the file of the caller.
 */
function calledByNode(): boolean {
  const limit = Error.stackTraceLimit;
  Error.stackTraceLimit = 12;
  const lines = (new Error().stack ?? '').split('\n').slice(1);
  Error.stackTraceLimit = limit;
  const caller = lines.find((line) => !line.includes(HERE) && !line.includes('<anonymous>'));
  return caller?.includes('node:internal/deps/') ?? false;
}
