/**
 * A guest that grows its memory while it is built, from wherever that ends, and keeps in JavaScript where it did: as the
 * allocators of Rust, wasi-libc and Go do.
 */
import { defineGuest } from '../../../lib/worker/index.js';

/** (module (memory (export "memory") 1) (func (export "grow") (result i32) i32.const 16 memory.grow)) */
const bytes = Uint8Array.from([
  ...[0, 97, 115, 109, 1, 0, 0, 0],
  ...[1, 5, 1, 96, 0, 1, 127],
  ...[3, 2, 1, 0],
  ...[5, 3, 1, 0, 1],
  ...[7, 17, 2, 6, 109, 101, 109, 111, 114, 121, 2, 0, 4, 103, 114, 111, 119, 0, 0],
  ...[10, 8, 1, 6, 0, 65, 16, 64, 0, 11],
]);
const WASM_PAGE = 65536;

export default defineGuest({
  async create() {
    const { instance } = await WebAssembly.instantiate(bytes);
    const { memory, grow } = instance.exports;
    return { memory, at: grow() * WASM_PAGE };
  },
  layout: ({ at }) => [`its own part begins at ${at}`],
  /** `grow`: pages that it grows by later, too. */
  handle({ memory, at }, { add, slot, grow = 0 }) {
    if (grow > 0) memory.grow(grow);
    const counters = new Uint32Array(memory.buffer, at, 1024);
    counters[slot] += add;
    return { at, bytes: memory.buffer.byteLength, sum: counters.reduce((a, b) => a + b, 0) };
  },
});
