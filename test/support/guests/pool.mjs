/**
 * A program with threads of its own over one shared memory, parked between their tasks as Emscripten parks them:
 * `pool-thread.mjs`. Word 0 of the memory counts tasks; what a thread does in its event loop it counts in `shared`.
 */
import { BroadcastChannel, Worker } from 'node:worker_threads';
import { defineGuest } from 'memferry/worker';

/** One memory, of 1 to 64 pages, exported as `memory`; `add(n)` adds to its first word and gives what was there. */
const module = new WebAssembly.Module(
  Uint8Array.of(
    ...[0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127],
    ...[2, 11, 1, 1, 101, 3, 109, 101, 109, 2, 3, 1, 64, 3, 2, 1, 0],
    ...[7, 7, 1, 3, 97, 100, 100, 0, 0],
    ...[10, 12, 1, 10, 0, 65, 0, 32, 0, 254, 30, 2, 0, 11],
  ),
);

function thread(app, options = {}) {
  const worker = new Worker(new URL('pool-thread.mjs', import.meta.url), { name: 'pool', ...options });
  worker.postMessage({ module, memory: app.memory });
  app.threads.push(worker);
  worker.unref();
  return new Promise((resolve) => worker.once('message', () => resolve(worker)));
}

function task(worker, message) {
  worker.postMessage(message);
  return new Promise((resolve) => worker.once('message', resolve));
}

async function build({ data, arriving }) {
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 64, shared: true });
  const { exports } = new WebAssembly.Instance(module, { e: { mem: memory } });
  const app = { memory, exports, threads: [], given: 0, done: 0 };
  if (arriving && data?.busyThere) (await thread(app)).postMessage({ op: 'spin' });
  for (let i = 0; i < (data?.threads ?? 2); i++) await thread(app);
  return app;
}

export const pool = {
  create: build,
  save: ({ given, done }) => ({ given, done }),
  statelessThreads: true,
  adopt(app, _state, { data }) {
    if (data?.adopt === 'start') thread(app);
    if (data?.adopt === 'tell') app.threads[0].postMessage({ op: 'spin' });
    if (data?.adopt !== 'quietly') return;
    try {
      thread(app);
    } catch {}
  },
  async handle(app, request) {
    const words = () => new Int32Array(app.memory.buffer);
    switch (request.op) {
      case 'add':
        return Promise.all(app.threads.map((worker) => task(worker, request)));
      case 'sum':
        return Atomics.load(words(), 0);
      case 'poke':
        words()[request.at] = request.value;
        return null;
      case 'peek':
        return words()[request.at];
      case 'bytes':
        return app.memory.buffer.byteLength;
      case 'more':
        await thread(app, request.options);
        return app.threads.length;
      case 'tell':
        // No answer is waited for.
        app.threads[0].postMessage(request.message);
        return null;
      case 'ask':
        return task(app.threads[0], request.message);
      case 'go-on':
        // Tasks that are no request's: such a timer may stay behind, what a thread does for it may not.
        setInterval(() => {
          app.given++;
          task(app.threads[0], { op: 'add', by: 1 }).then(() => app.done++);
        }, request.everyMs).unref();
        return null;
      case 'go-on-apart': {
        // As before, but given without a message to the thread.
        const channel = request.channel && new BroadcastChannel(request.channel);
        channel?.unref();
        await task(app.threads[0], { op: 'serve', channel: request.channel });
        app.threads[0].on('message', () => app.done++);
        // Listening has made it keep the guest alive.
        app.threads[0].ref();
        app.threads[0].unref();
        setInterval(() => {
          app.given++;
          if (channel) {
            channel.postMessage(null);
          } else {
            Atomics.add(words(), 2, 1);
            Atomics.notify(words(), 2);
          }
        }, request.everyMs).unref();
        return null;
      }
      case 'exports':
        return task(app.threads[0], { op: 'exports', of: module });
      default:
        throw new TypeError(`no ${request.op}`);
    }
  },
};

export default defineGuest(pool);
