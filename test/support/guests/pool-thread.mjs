/** A thread of pool.mjs: runs a task that a message names, then goes back to its event loop. */
import { Worker, parentPort, workerData } from 'node:worker_threads';

let instance;
let memory;
let kept;

function work() {
  parentPort.postMessage(instance.exports.add(1));
}

/** Work for each time that word 2 goes up: nobody sends a message. Takes as long as word 3 is 1. */
async function serve(words) {
  let done = Atomics.load(words, 2);
  for (;;) {
    await Atomics.waitAsync(words, 2, done).value;
    for (; done < Atomics.load(words, 2); done++) {
      while (Atomics.load(words, 3) === 1);
      work();
    }
  }
}

parentPort.on('message', (message) => {
  const words = memory && new Int32Array(memory.buffer);
  if (message.module) {
    memory = message.memory;
    instance = new WebAssembly.Instance(message.module, { e: { mem: memory } });
    parentPort.postMessage('ready');
  } else if (message.op === 'add') {
    parentPort.postMessage(instance.exports.add(message.by));
  } else if (message.op === 'grow') {
    parentPort.postMessage(memory.grow(message.pages));
  } else if (message.op === 'exports') {
    parentPort.postMessage([
      ...Object.keys(instance.exports),
      ...WebAssembly.Module.exports(message.of).map(({ name }) => name),
    ]);
  } else if (message.op === 'wait') {
    // As a thread of Emscripten's waits for a condition: until word 1 is not 0.
    Atomics.wait(words, 1, 0);
  } else if (message.op === 'spin') {
    while (Atomics.load(words, 1) === 0);
  } else if (message.op === 'beat') {
    // Whatever the guest does, this goes on, unless the thread stands still.
    kept = new BroadcastChannel(message.channel);
    kept.onmessage = () => Atomics.add(message.count, 0, 1);
    kept.unref();
    parentPort.postMessage(null);
  } else if (message.op === 'serve') {
    if (message.channel) {
      kept = new BroadcastChannel(message.channel);
      kept.onmessage = work;
      kept.unref();
    } else {
      void serve(words);
    }
    parentPort.postMessage(null);
  } else if (message.op === 'timer') {
    kept = setInterval(() => {}, 1000);
    parentPort.postMessage(null);
  } else if (message.op === 'no-timer') {
    clearInterval(kept);
    parentPort.postMessage(null);
  } else if (message.op === 'nested') {
    kept = new Worker('setInterval(() => {}, 1000)', { eval: true });
    parentPort.postMessage(null);
  } else if (message.op === 'data') {
    parentPort.postMessage(workerData);
  }
});
