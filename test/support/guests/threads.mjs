/**
 * Threads of one program, by hand: every worker of the guest has an instance of the same module over the same shared
 * memory, and a mutable global of its own. `count(n)` adds 1 to a word of the memory, atomically, n times.
 */
import { defineGuest } from 'memferry/worker';

export default defineGuest({
  create(context) {
    const module = new WebAssembly.Module(Buffer.from(context.data.wasm, 'base64'));
    const memory = context.sharedMemory;
    return { memory, exports: new WebAssembly.Instance(module, { e: { memory } }).exports };
  },
  handle(app, request) {
    const words = new Int32Array(app.memory.buffer);
    switch (request.op) {
      case 'count':
        return app.exports.count(request.times);
      case 'sum':
        return Atomics.load(words, 0);
      case 'grow':
        return app.memory.grow(request.pages);
      case 'poke':
        words[request.at] = request.value;
        return null;
      case 'peek':
        return words[request.at];
      default:
        throw new TypeError(`no ${request.op}`);
    }
  },
});
