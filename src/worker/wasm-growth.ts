/**
 * Renews the typed arrays that glue keeps of a memory which grew under it. Glue that compares lengths before
 * each use (wasm-bindgen's, AssemblyScript's) needs nothing. Emscripten's renews them only in its own
 * `emscripten_resize_heap`, so that is called, with the length that the memory has already: it grows by nothing
 * and renews. It touches no byte of the memory. Other glue has the guest's `memoryGrown`.
 */
import type { WasmRegistry } from './wasm-registry.js';
import type { WasmMemoryObject } from './webassembly.js';

export function renewViews(registry: WasmRegistry, memory: WasmMemoryObject): void {
  const number = registry.memoryNumber(memory) as number;
  for (const { imports, memories } of registry.instances) {
    if (!memories.includes(number)) continue;
    for (const module of Object.values(Object(imports) as Record<string, unknown>)) {
      for (const [name, value] of Object.entries(Object(module) as Record<string, unknown>)) {
        if (typeof value !== 'function') continue;
        // Minified modules rename imports, not the JavaScript functions behind them.
        const resize = /^_?emscripten_resize_heap$/;
        if (resize.test(name) || resize.test(value.name)) value(memory.buffer.byteLength);
      }
    }
  }
}
