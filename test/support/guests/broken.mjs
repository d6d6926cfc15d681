/** A guest that fails where `data.at` says. */
import { existsSync, readlinkSync } from 'node:fs';
import { defineGuest } from 'memferry/worker';

/** Worker 1 has a memory, and ends when it is built; worker 0 is built after that. `data.threads`: who they are. */
async function endOne({ worker, data }) {
  const threads = new Int32Array(data.threads);
  Atomics.store(threads, worker, Number(readlinkSync('/proc/thread-self').split('/').at(-1)));
  if (worker === 1) {
    setImmediate(() => process.exit(3));
    return { memory: new WebAssembly.Memory({ initial: 1 }) };
  }
  const ended = () => threads[1] !== 0 && !existsSync(`/proc/self/task/${threads[1]}`);
  while (!ended()) await new Promise((resolve) => setTimeout(resolve, 5));
  return {};
}

export default defineGuest({
  create(context) {
    if (context.data.at === 'create') throw new Error('no creation today');
    if (context.data.at === 'hang') return new Promise(() => {});
    if (context.data.at === 'end-one') return endOne(context);
    return {};
  },
  receive(context) {
    if (context.data.at === 'receive') throw new Error('no reception today');
    if (context.data.at === 'receive-hangs') return new Promise(() => setInterval(() => {}, 1000));
    if (context.data.at === 'receive-builds-more') new WebAssembly.Memory({ initial: 1 });
    return {};
  },
  save() {
    return {};
  },
  adopt(_app, _state, context) {
    if (context.data.at === 'adopt') throw new Error('no adoption today');
    if (context.data.at === 'adopt-hangs') return new Promise(() => setInterval(() => {}, 1000));
    return undefined;
  },
  handle: () => 'alive',
});
