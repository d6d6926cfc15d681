/**
 * The processes of lifetime.test.ts, one scenario each: `node lifetime-child.mjs ADDON SCENARIO`. A scenario ends
 * the process itself or prints `ok`; a crash, a hang or a wrong answer shows in its exit.
 */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { createRequire } from 'node:module';
import { setImmediate as turn } from 'node:timers/promises';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';

const [addonPath, scenario] = isMainThread
  ? process.argv.slice(2)
  : [workerData.addonPath, workerData.scenario];
const addon = createRequire(import.meta.url)(addonPath);
// What src/addon.ts does for every environment that loads the addon.
process.once('exit', () => {
  addon.closeEngines();
  if (isMainThread) addon.retireAllRegions();
});

const KiB = 1024;
const MiB = 1024 * KiB;

function worker(name, more = {}) {
  return new Worker(new URL(import.meta.url), {
    workerData: { addonPath, scenario: name, ...more },
    execArgv: [], // V8's flags, --expose-gc among them, are the whole process's
  });
}

async function message(from) {
  const [value] = await once(from, 'message');
  return value;
}

function adoptMemory(pages = 64) {
  const memory = new WebAssembly.Memory({ initial: pages });
  const view = new Uint8Array(memory.buffer);
  view.fill(1);
  return { memory, region: addon.adopt([view], view.length, memory) };
}

/** Both ends of a post-copy in this process; `source` null: nobody will ever send a page. */
function transfer({ bytes, withSource, onEvent = () => {} }) {
  const migration = randomBytes(16);
  const channels = 2;
  const tokens = randomBytes(32 * (channels + 1) * 4);
  const destination = addon.allocate(bytes);
  const common = { migration, channels, tokens, recoverTimeoutMs: 60_000 };
  const listener = addon.createListener('127.0.0.1', 0, () => {});
  const receiver = addon.createReceiver({
    ...common,
    keepPageHashes: false,
    regions: [destination],
    discardFirst: true,
    pagingFromStart: true,
    mayPage: true,
    lossGraceMs: 50,
    onEvent: (event) => onEvent('receiver', event),
  });
  listener.add(receiver);
  if (!withSource) return { listener, receiver, destination };
  const source = addon.allocate(bytes);
  for (const buffer of source.buffers()) new Uint8Array(buffer).fill(5);
  const tracker = addon.makeTracker('hash-diff', source, 'anywhere', false);
  const sender = addon.createSender({
    ...common,
    regions: [source],
    trackers: [tracker],
    host: '127.0.0.1',
    port: listener.port,
    bandwidth: 0,
    connectTimeoutMs: 5000,
    onEvent: (event) => onEvent('sender', event),
  });
  return { listener, receiver, destination, source, tracker, sender };
}

/** Starts a transfer and resolves when its push is under way. */
async function transferUnderWay(bytes) {
  const { promise, resolve, reject } = Promise.withResolvers?.() ?? deferred();
  const both = transfer({
    bytes,
    withSource: true,
    onEvent: (side, event) => {
      if (event.kind === 'failed') reject(new Error(`${side}: ${event.code} ${event.message}`));
      if (side !== 'sender') return;
      if (event.kind === 'connected') {
        both.tracker.arm();
        both.sender.queuePopulated().then(() => both.sender.switchOver(), reject);
      } else if (event.kind === 'switched') {
        both.sender.setBandwidth(4 * MiB); // slow enough to be in the middle of it
        both.sender.startPush();
        resolve(both);
      }
    },
  });
  both.sender.connect();
  const alive = setInterval(() => {}, 1000); // events keep no process alive
  return promise.finally(() => clearInterval(alive));
}

function deferred() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}

/** A module whose function `read(address)` loads a byte of an imported memory. */
const READER = new Uint8Array([
  0, 97, 115, 109, 1, 0, 0, 0, 1, 6, 1, 96, 1, 127, 1, 127, 2, 10, 1, 3, 101, 110, 118, 1, 109, 2, 0, 1, 3, 2,
  1, 0, 7, 8, 1, 4, 114, 101, 97, 100, 0, 0, 10, 9, 1, 7, 0, 32, 0, 45, 0, 0, 11,
]);

const scenarios = {
  // ---- a worker that owns memory ends, while the main thread uses it -------------------------------------
  async 'worker-ends'() {
    for (const way of ['return', 'exit', 'terminate', 'throw']) {
      const owner = worker('owner', { way });
      const ended = new Promise((resolve) => owner.on('exit', resolve)); // once() rejects at an 'error'
      owner.on('error', (error) => assert.equal(error.message, 'on purpose'));
      const id = await message(owner);
      const region = addon.openRegion(id);
      assert.notEqual(region, null);
      const tracker = addon.makeTracker('hash-diff', region, 'anywhere', false);
      tracker.arm();
      const digest = region.digest().catch((error) => error.code);
      if (way === 'terminate') void owner.terminate();
      else owner.postMessage('end');
      await ended;
      assert.match(await digest, /^([0-9a-f]{32}|REGION_GONE)$/);
      assert.equal(region.retired(), true, way);
      assert.equal(addon.openRegion(id), null);
      assert.throws(() => tracker.collect(), { code: 'REGION_GONE' });
      await assert.rejects(region.digest(), { code: 'REGION_GONE' });
      tracker.close();
      region.close();
    }
    console.log('ok');
  },
  async owner() {
    const { memory, region } = adoptMemory(512);
    parentPort.postMessage(region.id);
    await once(parentPort, 'message');
    assert.ok(memory.buffer.byteLength > 0);
    if (workerData.way === 'exit') process.exit(0);
    if (workerData.way === 'throw') throw new Error('on purpose');
    parentPort.close();
  },

  // ---- terminate at any moment, with native threads in the memory from both sides ------------------------
  async 'terminate-in-the-middle'() {
    for (let round = 0; round < 8; round++) {
      const busy = worker('busy');
      const ended = once(busy, 'exit');
      const region = addon.openRegion(await message(busy));
      let over = false;
      const hashing = (async () => {
        while (!over) await region.digest().catch((error) => assert.equal(error.code, 'REGION_GONE'));
      })();
      const tracker = addon.makeTracker(round % 2 ? 'hash-diff' : bestTracker(), region, 'anywhere', false);
      try {
        tracker.arm();
        for (let i = 0; i < round * 5; i++) {
          tracker.collect();
          await turn();
        }
      } catch (error) {
        assert.equal(error.code, 'REGION_GONE');
      }
      void busy.terminate();
      await ended;
      over = true;
      await hashing;
      assert.equal(region.retired(), true);
      tracker.close();
      region.close();
    }
    console.log('ok');
  },
  async busy() {
    const { memory, region } = adoptMemory(256);
    const own = addon.allocate(8 * MiB);
    const tracker = addon.makeTracker('hash-diff', own, 'anywhere', false);
    tracker.arm();
    parentPort.postMessage(region.id);
    for (;;) {
      void region.digest().catch(() => {});
      void own.digest().catch(() => {});
      tracker.collect();
      new Uint8Array(memory.buffer).fill(2);
      await turn();
    }
  },

  // ---- garbage collection ---------------------------------------------------------------------------------
  async 'gc-frees'() {
    // A frame of its own: nothing of it is on the stack afterwards.
    const forget = () => {
      const { region } = adoptMemory(16);
      const own = addon.allocate(1 * MiB);
      const tracker = addon.makeTracker(bestTracker(), own, 'anywhere', false);
      tracker.arm();
      void region.digest();
      return [region.id, own.id];
    };
    const ids = Array.from({ length: 50 }, forget).flat();
    // A digest that has not been taken yet holds its region.
    for (const end = Date.now() + 20_000; Date.now() < end && ids.some(stillThere); ) {
      globalThis.gc();
      await turn();
    }
    assert.deepEqual(ids.filter(stillThere), []);
    console.log('ok');
  },
  async 'gc-keeps-what-another-thread-uses'() {
    const owner = worker('forgetful');
    const id = await message(owner);
    const region = addon.openRegion(id);
    assert.ok(region.claim());
    owner.postMessage('collect');
    await message(owner);
    assert.equal(region.retired(), false);
    assert.match(await region.digest(), /^[0-9a-f]{32}$/);
    region.close();
    owner.postMessage('collect');
    await message(owner);
    assert.equal(addon.openRegion(id), null);
    await owner.terminate();
    console.log('ok');
  },
  async forgetful() {
    let adopted = adoptMemory();
    parentPort.postMessage(adopted.region.id);
    parentPort.on('message', async () => {
      adopted = undefined; // not before: until the other thread has its handle, nothing else keeps the memory
      for (let i = 0; i < 20; i++) {
        globalThis.gc();
        await turn();
      }
      adoptMemory(1); // what was kept for others is looked at when something is adopted
      parentPort.postMessage('collected');
    });
  },
  async 'gc-keeps-open-engines'() {
    let weak;
    const done = (async () => {
      const both = await transferUnderWay(16 * MiB);
      weak = new WeakRef(both.receiver);
      both.sender.setBandwidth(0);
      return both.destination;
    })();
    const destination = await done;
    for (let i = 0; i < 20; i++) {
      globalThis.gc();
      await turn();
    }
    assert.notEqual(weak.deref(), undefined);
    const view = new Uint8Array(destination.buffers[0]);
    for (let at = 0; at < view.length; at += 4096) assert.equal(view[at], 5);
    addon.closeEngines();
    console.log('ok');
  },

  // ---- process.exit in the middle of everything -----------------------------------------------------------
  async 'exit-while-hashing'() {
    const { region } = adoptMemory(1024);
    for (let i = 0; i < 8; i++) void region.digest();
    const helpers = [worker('busy'), worker('busy')];
    await Promise.all(helpers.map(message));
    process.exit(7);
  },
  async 'exit-while-tracking'() {
    const own = addon.allocate(64 * MiB);
    new Uint8Array(own.buffers()[0]).fill(1);
    const tracker = addon.makeTracker('hash-diff', own, 'anywhere', false);
    tracker.arm();
    const asynchronous = addon.makeTracker(bestTracker(), own, 'anywhere', false);
    asynchronous.arm();
    asynchronous.collect();
    await message(worker('busy'));
    process.exit(7);
  },
  async 'exit-while-moving'() {
    const both = await transferUnderWay(64 * MiB);
    void both.sender.queueDirty().catch(() => {});
    process.exit(7);
  },
  async 'exit-while-worker-moves'() {
    await message(worker('mover'));
    process.exit(7);
  },
  async 'terminate-while-moving'() {
    for (let round = 0; round < 3; round++) {
      const mover = worker('mover');
      await message(mover);
      await mover.terminate();
    }
    console.log('ok');
  },
  async mover() {
    await transferUnderWay(64 * MiB);
    parentPort.postMessage('moving');
  },
  async 'exit-without-closing'() {
    // The loop runs empty: events and engines keep no process alive, and its end cleans up.
    transfer({ bytes: 4 * MiB, withSource: true });
  },
  // The page belongs to a receiver of the main thread, or to one of the very worker that waits.
  async 'exit-while-worker-waits'() {
    await exitWhileWaiting('here');
  },
  async 'exit-while-worker-waits-for-itself'() {
    await exitWhileWaiting('there');
  },
  async waits() {
    const { memory, region, receiver } = missingMemory(workerData.receiver === 'there');
    assert.equal(receiver === null, workerData.receiver === 'here');
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(READER), { env: { m: memory } });
    const flag = new Int32Array(workerData.flag);
    parentPort.postMessage(region.id);
    Atomics.wait(flag, 0, 0);
    Atomics.store(flag, 0, 2);
    Atomics.notify(flag, 0);
    exports.read(4096);
    Atomics.store(flag, 0, 3);
  },
  async 'poison-reaches-wasm'() {
    addon.forwardSigbusToWebAssembly();
    addon.forwardSigbusToWebAssembly();
    const { memory, receiver } = missingMemory();
    const { exports } = new WebAssembly.Instance(new WebAssembly.Module(READER), { env: { m: memory } });
    receiver.close(); // poisons what is missing
    for (const address of [0, 4096, 65535]) {
      assert.throws(() => exports.read(address), WebAssembly.RuntimeError);
    }
    // V8 sets the protection of a memory that grows, all of it: what is lost stays so.
    memory.grow(1);
    for (const address of [0, 4096, 65535]) {
      assert.throws(() => exports.read(address), WebAssembly.RuntimeError);
    }
    assert.equal(exports.read(65536), 0);
    // The process and its other memories are well.
    const other = new WebAssembly.Memory({ initial: 1 });
    const well = new WebAssembly.Instance(new WebAssembly.Module(READER), { env: { m: other } });
    assert.equal(well.exports.read(4096), 0);
    assert.throws(() => well.exports.read(70_000), WebAssembly.RuntimeError);
    console.log('ok');
  },
  async 'poison-kills-javascript'() {
    addon.forwardSigbusToWebAssembly();
    const { memory, receiver } = missingMemory();
    receiver.close();
    const byte = new Uint8Array(memory.buffer)[4096];
    console.log(`read ${byte}`);
  },
  async 'digest-of-poisoned-pages'() {
    const { listener, receiver, destination } = transfer({ bytes: 1 * MiB, withSource: false });
    receiver.close();
    listener.close();
    await assert.rejects(destination.digest(), { code: 'UNREADABLE' });
    console.log('ok');
  },

  // ---- events and descriptors -----------------------------------------------------------------------------
  async 'no-event-after-close'() {
    const after = [];
    let closed = false;
    const both = transfer({
      bytes: 4 * MiB,
      withSource: true,
      onEvent: (side, event) => {
        if (closed) after.push(`${side} ${event.kind}`);
      },
    });
    both.sender.connect();
    const until = Date.now() + 200; // events pile up while this thread is busy
    while (Date.now() < until);
    both.sender.close(false);
    both.receiver.close();
    both.listener.close();
    closed = true;
    for (let i = 0; i < 50; i++) await turn();
    assert.deepEqual(after, []);
    both.sender.close(false);
    both.receiver.close();
    both.listener.close();
    assert.ok(both.sender.stats().bytesOnWire >= 0);
    assert.throws(() => both.sender.startRound(1), { code: 'CLOSED' });
    assert.throws(() => both.listener.add(both.receiver), { code: 'CLOSED' });
    console.log('ok');
  },
  async 'control-descriptors-do-not-leak'() {
    const { connect } = await import('node:net');
    const { readdirSync } = await import('node:fs');
    const listener = addon.createListener('127.0.0.1', 0, () => assert.fail('closed'));
    const sockets = [];
    for (let i = 0; i < 10; i++) {
      const socket = connect(listener.port, '127.0.0.1');
      socket.on('error', () => {});
      await once(socket, 'connect');
      sockets.push(socket);
    }
    const before = readdirSync('/proc/self/fd').length;
    for (const socket of sockets) socket.write('MFERRYC1');
    const until = Date.now() + 300; // the listener's thread accepts and posts while this one does not look
    while (Date.now() < until);
    listener.close();
    await Promise.all(sockets.map((socket) => (socket.destroyed ? null : once(socket, 'close'))));
    await turn();
    const after = readdirSync('/proc/self/fd').length;
    assert.ok(after < before, `${before} descriptors before, ${after} after`);
    console.log('ok');
  },
  async 'callback-that-throws'() {
    process.on('uncaughtException', (error) => {
      assert.equal(error.message, 'from a callback');
      console.log('ok');
      process.exit(0);
    });
    const both = transfer({
      bytes: 1 * MiB,
      withSource: true,
      onEvent: () => {
        throw new Error('from a callback');
      },
    });
    both.sender.connect();
    setInterval(() => {}, 1000);
  },
};

function stillThere(id) {
  const region = addon.openRegion(id);
  region?.close();
  return region !== null;
}

/** A WebAssembly memory that is registered for paging (unless told otherwise), and whose pages nobody has. */
/** By this kernel's own means, where it has any. */
function bestTracker() {
  return addon.probeTrackers().find(({ available }) => available).name;
}

function missingMemory(paged = true) {
  const memory = new WebAssembly.Memory({ initial: 1 });
  const view = new Uint8Array(memory.buffer);
  const region = addon.adopt([view], view.length, memory);
  return { memory, region, receiver: paged ? pagerWithoutSource(region) : null };
}

function pagerWithoutSource(region) {
  return addon.createReceiver({
    regions: [region],
    migration: randomBytes(16),
    channels: 1,
    tokens: randomBytes(64),
    discardFirst: true,
    pagingFromStart: true,
    mayPage: true,
    keepPageHashes: false,
    recoverTimeoutMs: 60_000,
    lossGraceMs: 50,
    onEvent: () => {},
  });
}

async function exitWhileWaiting(receiver) {
  addon.forwardSigbusToWebAssembly();
  const flag = new Int32Array(new SharedArrayBuffer(4));
  const waiting = worker('waits', { receiver, flag: flag.buffer });
  waiting.on('error', () => {});
  const id = await message(waiting);
  if (receiver === 'here') pagerWithoutSource(addon.openRegion(id));
  Atomics.store(flag, 0, 1);
  Atomics.notify(flag, 0);
  Atomics.wait(flag, 0, 1, 5000);
  // Its next instruction touches the page; a thread that waits in a fault is asleep in the kernel (D or S).
  const { readdirSync, readFileSync } = await import('node:fs');
  const inFault = () =>
    readdirSync('/proc/self/task').some((task) => {
      const wchan = readFileSync(`/proc/self/task/${task}/wchan`, 'utf8');
      return wchan.includes('userfault');
    });
  const until = Date.now() + 5000;
  while (!inFault() && Date.now() < until) await turn();
  assert.ok(inFault(), 'the worker does not wait for its page');
  assert.equal(Atomics.load(flag, 0), 2);
  process.exit(7);
}

await scenarios[scenario]();
