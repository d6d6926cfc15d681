/**
 * A guest for the tests, both sides of it: regions of every kind, a worker that writes them (guest-writer.mjs),
 * and an execution state that holds the journal by which every byte can be computed afterwards.
 * Lives in the main thread of host-program.mjs.
 */
import { deserialize, serialize } from 'node:v8';
import { Worker } from 'node:worker_threads';
import { MemferryError, Region } from '../../lib/index.js';

const WASM_PAGE = 65536;

export class TestGuest {
  /** `[first write, last write]` in ns of the machine's monotonic clock, for each time that it ran here. */
  intervals = [];
  lostRuns = [];
  runs = false;
  /** What the tests have it do wrong: by the name of the step. */
  behaviour;
  #worker;
  #waiting = new Map();
  #nextId = 1;
  #release = null;

  constructor(name, rate, behaviour, log) {
    this.name = name;
    this.rate = rate;
    this.module = null;
    this.behaviour = behaviour;
    this.log = log;
    this.regions = [];
    this.#worker = new Worker(new URL('guest-writer.mjs', import.meta.url), {
      workerData: { ...rate, seed: rate.seed ?? 0x1234567 },
    });
    this.#worker.on('message', ({ id, value, error }) => {
      const waiter = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error !== undefined) waiter?.reject(new Error(error));
      else waiter?.resolve(value);
    });
    this.ended = new Promise((resolve) => this.#worker.once('exit', resolve));
    this.ended.then(() => {
      for (const { reject } of this.#waiting.values()) reject(new Error('the writer has ended'));
      this.#waiting.clear();
    });
  }

  /** A new guest that begins here. `specs`: `{ kind, pages, maxPages? }[]`. */
  static async create(name, specs, rate, behaviour, log) {
    const guest = new TestGuest(name, rate, behaviour, log);
    await guest.#make(specs);
    await guest.ask('fill');
    return guest;
  }

  /** The destination's side of an offer; `kind`: of memory, other than the source's. */
  static async accept(offer, rate, behaviour, log, kind = null) {
    const guest = new TestGuest(offer.name, rate, behaviour, log);
    const specs = offer.regions.map(({ lengthBytes, pageSize }, index) => ({
      ...offer.description.regions[index],
      pages: lengthBytes / pageSize,
      ...(kind ? { kind } : {}),
    }));
    try {
      await guest.#make(specs);
    } catch (error) {
      await guest.end();
      throw error;
    }
    return guest;
  }

  async #make(specs) {
    const made = [];
    const own = [];
    for (const { kind, pages, maxPages = pages } of specs) {
      const spec = { kind, pages, maxPages, initialPages: pages, pageSize: TestGuest.pageSize() };
      let region = null;
      if (kind === 'allocate' || kind === 'huge') {
        region = Region.allocate({ lengthBytes: pages * spec.pageSize, hugePages: kind === 'huge' });
        spec.region = region.id;
      } else if (kind === 'shared') {
        region = Region.allocate({ lengthBytes: pages * spec.pageSize, shared: true });
        spec.buffer = region.views[0].buffer;
      } else if (kind === 'wasm-shared') {
        spec.memory = new WebAssembly.Memory({
          initial: (pages * spec.pageSize) / WASM_PAGE,
          maximum: (maxPages * spec.pageSize) / WASM_PAGE,
          shared: true,
        });
        region = Region.adopt(spec.memory);
      }
      own.push(region);
      made.push(spec);
    }
    const ids = await this.ask('make', { specs: made });
    this.regions = own.map((region, index) => ({
      name: `region ${index}`,
      region: region ?? Region.open(ids[index]),
    }));
    this.description = { regions: specs.map(({ kind, maxPages, pages }) => ({ kind, maxPages, pages })) };
  }

  static pageSize() {
    TestGuest.size ??= (() => {
      const probe = Region.allocate({ lengthBytes: 2 ** 20 });
      const { pageSize } = probe;
      probe.close();
      return pageSize;
    })();
    return TestGuest.size;
  }

  ask(op, args = {}) {
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, op, ...args });
    });
  }

  #tell(op) {
    this.#worker.postMessage({ id: null, op });
  }

  async #stand() {
    const interval = await this.ask('stand');
    this.runs = false;
    if (interval?.first) this.intervals.push([interval.first, interval.last]);
  }

  start() {
    this.runs = true;
    this.#tell('run');
  }

  /** Reads every byte, between two writes, and runs on if it ran. */
  async compare(except = []) {
    return this.ask('check', { limit: 5, except });
  }

  async status() {
    const interval = this.runs ? await this.ask('interval') : null;
    const open = interval?.first ? [[interval.first, interval.last]] : [];
    return { runs: this.runs, intervals: [...this.intervals, ...open] };
  }

  // ---- the source's side

  async check({ rounds }) {
    if (this.behaviour.check !== 'no-rounds' || !rounds) return;
    throw new MemferryError('GUEST_UNMOVABLE', 'what this guest writes while it runs is seen by nobody');
  }

  async pause({ signal }) {
    this.log('pause');
    if (this.behaviour.pause === 'throw') throw new Error('this guest does not like to be paused');
    if (this.behaviour.pause === 'hang') await new Promise(() => {});
    if (this.behaviour.pause === 'late') {
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
    }
    await this.#stand();
    const pausedAtNs = process.hrtime.bigint();
    if (this.behaviour.pause === 'nothing') return null;
    const state = serialize(await this.ask('save'));
    this.log('paused');
    return { state: new Uint8Array(state), pausedAtNs };
  }

  unpause() {
    this.log('unpause');
    this.start();
  }

  departed() {
    this.log('departed');
  }

  release() {
    this.log('release');
  }

  // ---- the destination's side

  /** What `accept` gives: at a destination the regions have no names of their own. */
  arriving() {
    return {
      regions: this.regions.map(({ region }) => region),
      grow: (index, lengthBytes) => this.grow(index, lengthBytes),
      prepare: (state) => this.prepare(state),
      resume: () => this.resume(),
      abandon: () => this.abandon(),
      lost: (runs) => this.lost(runs),
    };
  }

  async grow(index, lengthBytes) {
    const { region } = this.regions[index];
    if (this.description.regions[index].kind === 'wasm-shared' || region.views.length === 0) {
      await this.ask('grow', { index, pages: lengthBytes / region.pageSize });
    } else {
      throw new Error(`region ${index} cannot grow`);
    }
  }

  async prepare(state) {
    this.log('prepare');
    if (this.behaviour.prepare === 'throw') throw new Error('this guest cannot be prepared');
    if (this.behaviour.prepare === 'hang') await new Promise(() => {});
    await this.ask('load', { state: deserialize(state) });
    // As a WebAssembly start-up would: the first page is read while the guest is not ours yet.
    if (this.behaviour.prepare === 'touch') await this.ask('touch', { index: 0, page: 0 });
    this.log('prepared');
  }

  resume() {
    this.log('resume');
    this.start();
  }

  async abandon() {
    this.log('abandon');
    await this.end();
  }

  lost(runs) {
    this.lostRuns.push(...runs);
    this.log('lost');
  }

  /** The thread and the memory go. */
  async end() {
    this.#release ??= (async () => {
      this.runs = false;
      await this.#worker.terminate();
      for (const { region } of this.regions) region.close();
    })();
    await this.#release;
  }
}
