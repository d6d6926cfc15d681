/** The global `WebAssembly` as far as it is used here; its types are part of no Node typings. */

export type WasmModule = object & { readonly __module?: never };
export type WasmExports = Record<string, unknown>;

export interface WasmInstance {
  readonly exports: WasmExports;
}

export interface WasmMemoryObject {
  readonly buffer: ArrayBufferLike;
  grow(pages: number): number;
}

export interface WasmTableObject {
  readonly length: number;
  grow(by: number, value?: unknown): number;
  get(index: number): unknown;
  set(index: number, value?: unknown): void;
}

export interface WasmGlobalObject {
  value: unknown;
}

type AnyArgs = unknown[];

export interface WasmNamespace {
  Module: {
    new (bytes: Uint8Array, ...rest: AnyArgs): WasmModule;
    exports(module: WasmModule): { name: string; kind: string }[];
  };
  Instance: new (module: WasmModule, imports?: unknown) => WasmInstance;
  Table: { prototype: WasmTableObject };
  Memory: new (descriptor: { initial: number; maximum?: number; shared?: boolean }) => WasmMemoryObject;
  compile(...args: AnyArgs): Promise<WasmModule>;
  instantiate(...args: AnyArgs): Promise<unknown>;
  RuntimeError: ErrorConstructor;
}

export const wasm = (globalThis as unknown as { WebAssembly: WasmNamespace }).WebAssembly;
