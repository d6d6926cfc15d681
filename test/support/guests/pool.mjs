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

/** From here on the first thread works without being sent a message: see `giveApart`. */
async function serve(app, channel) {
  const [worker] = app.threads;
  await task(worker, { op: 'serve', channel });
  worker.on('message', () => app.done++);
  // Listening has made it keep the guest alive.
  worker.ref();
  worker.unref();
}

function giveApart(app) {
  app.given++;
  const words = new Int32Array(app.memory.buffer);
  Atomics.add(words, 2, 1);
  Atomics.notify(words, 2);
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
  save({ threads, given, done, tellAtSave }) {
    if (tellAtSave) threads[0].postMessage({ op: 'add', by: 1 });
    return { given, done };
  },
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
      case 'tell-at-save':
        app.tellAtSave = request.tell;
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
        await serve(app, request.channel);
        if (request.channel) {
          const channel = new BroadcastChannel(request.channel);
          channel.unref();
          const give = () => {
            app.given++;
            channel.postMessage(null);
          };
          setInterval(give, request.everyMs).unref();
        } else {
          setInterval(() => giveApart(app), request.everyMs).unref();
        }
        return null;
      }
      case 'work-late': {
        // Given just before the threads are to stand still, and not done before this one's event loop has gone on.
        await serve(app);
        const { postMessage } = BroadcastChannel.prototype;
        BroadcastChannel.prototype.postMessage = function (message) {
          if (message.hold && app.given === 0) {
            Atomics.store(words(), 3, 1);
            giveApart(app);
            setTimeout(() => Atomics.store(words(), 3, 0), 0).unref();
          }
          postMessage.call(this, message);
        };
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
