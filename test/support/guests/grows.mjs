/** A guest whose memory grows in the middle of requests, by pages of its own pattern. Plain JavaScript around a bare memory. */
import { defineGuest } from '../../../lib/worker/index.js';

/** (module (memory (export "memory") 1)) */
const bytes = Uint8Array.from([
  ...[0, 97, 115, 109, 1, 0, 0, 0],
  ...[5, 3, 1, 0, 1],
  ...[7, 10, 1, 6, 109, 101, 109, 111, 114, 121, 2, 0],
]);
const WASM_PAGE = 65536;

export default defineGuest({
  async create() {
    const { instance } = await WebAssembly.instantiate(bytes);
    return { memory: instance.exports.memory };
  },
  /** `busyMs`: it grows by a page after so long, in one go. Gives how many pages there are, and which are not right. */
  handle({ memory }, { busyMs = null }) {
    if (busyMs !== null) {
      for (const until = performance.now() + busyMs; performance.now() < until; );
      const page = memory.grow(1);
      new Uint8Array(memory.buffer).fill(1 + (page % 255), page * WASM_PAGE);
    }
    const all = new Uint8Array(memory.buffer);
    const pages = all.length / WASM_PAGE;
    const wrong = [];
    for (let page = 1; page < pages; page++) {
      if (all.subarray(page * WASM_PAGE, (page + 1) * WASM_PAGE).some((byte) => byte !== 1 + (page % 255)))
        wrong.push(page);
    }
    return { pages, wrong };
  },
});
