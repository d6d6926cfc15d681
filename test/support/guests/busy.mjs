/** A guest without memory that opens what a test asks for, and closes it again. */
import { spawn } from 'node:child_process';
import { readFile, readlinkSync, watch } from 'node:fs';
import { connect, createServer } from 'node:net';
import { WASI } from 'node:wasi';
import { MessageChannel } from 'node:worker_threads';
import { defineGuest } from 'memferry/worker';

/** The kernel's number. */
const threadId = () => Number(readlinkSync('/proc/thread-self').split('/').at(-1));

export default defineGuest({
  create: () => ({ open: [], ticks: 0, finish: null }),
  save: (app) => ({ ticks: app.ticks }),
  adopt: (app, state) => {
    app.ticks = state.ticks;
  },
  busy: (app) => (app.file ? ['journal.txt'] : []),
  handle(app, request, context) {
    switch (request.op) {
      case 'timer': {
        const timer = setTimeout(() => {}, 60_000);
        app.open.push(() => clearTimeout(timer));
        return null;
      }
      case 'unref-interval': {
        const timer = setInterval(() => app.ticks++, 1).unref();
        app.open.push(() => clearInterval(timer));
        return null;
      }
      case 'server':
        return new Promise((resolve) => {
          const server = createServer();
          app.open.push(() => new Promise((closed) => server.close(closed)));
          server.listen(0, '127.0.0.1', () => resolve(null));
        });
      case 'unref-server':
        return new Promise((resolve) => {
          const server = createServer();
          app.open.push(() => new Promise((closed) => server.close(closed)));
          server.listen(0, '127.0.0.1', () => {
            server.unref();
            resolve(server.address().port);
          });
        });
      case 'unref-socket':
        return new Promise((resolve) => {
          const socket = connect(request.port, '127.0.0.1', () => {
            socket.unref();
            resolve(null);
          });
          app.open.push(() => socket.destroy());
        });
      case 'unref-child': {
        const child = spawn('sleep', ['60'], { stdio: 'ignore' });
        child.unref();
        app.open.push(() => new Promise((closed) => child.once('exit', closed).kill()));
        return child.pid;
      }
      case 'unref-watcher': {
        const watcher = watch(request.path, { persistent: false });
        app.open.push(() => watcher.close());
        return null;
      }
      case 'wasi': {
        const preopens = request.path ? { '/sandbox': request.path } : {};
        app.wasi = new WASI({ version: 'preview1', preopens });
        return null;
      }
      case 'port': {
        const { port1 } = new MessageChannel();
        port1.on('message', () => {});
        app.open.push(() => new Promise((closed) => port1.once('close', closed).close()));
        return null;
      }
      case 'file':
        // A FIFO: the read cannot end before the test writes.
        readFile(request.path, () => context.send('read'));
        return null;
      case 'own':
        app.file = request.open;
        return null;
      case 'slow':
        // Ends when the test says so, from outside the queue of requests.
        context.send('begun');
        return new Promise((resolve) => {
          const gate = new Int32Array(request.gate);
          Atomics.waitAsync(gate, 0, 0).value.then(() => resolve('slow'));
        });
      case 'spin':
        context.send('begun');
        while (Atomics.load(new Int32Array(request.gate), 0) === 0);
        return 'spun';
      case 'ticks':
        return app.ticks;
      case 'echo':
        return request.value;
      case 'unclonable':
        return () => 1;
      case 'throw':
        throw Object.assign(new RangeError('as asked'), { code: 'E_ASKED' });
      case 'exit':
        return process.exit(3);
      case 'exit-with-memory':
        // Told of with the answer, and gone before anybody may have read it. Which thread to wait for stands in `thread`.
        app.memory = new WebAssembly.Memory({ initial: 1 });
        Atomics.store(new Int32Array(request.thread), 0, threadId());
        setImmediate(() => process.exit(3));
        return null;
      case 'crash':
        setImmediate(() => {
          throw new Error('crashed as asked');
        });
        return null;
      case 'close':
        return Promise.all(app.open.splice(0).map((close) => close())).then(() => null);
      case 'who':
        return { worker: context.worker, workers: context.workers, shared: context.sharedHeap.length };
      case 'shared-add':
        return Atomics.add(new Int32Array(context.sharedHeap[0].buffer), 0, 1);
      default:
        throw new TypeError(`no ${request.op}`);
    }
  },
});
