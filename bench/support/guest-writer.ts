/**
 * The guest of `downtime` and `scale`: a worker that overwrites whole pages of its region in random order at a
 * steady rate, and stops between two pages when told. Both sides of it: the worker's body, and its control.
 */
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import { type Guest, Region } from 'memferry';
import { fillRandom } from './memory.js';

/** Cells of the control words: what is wanted, how often the worker has stopped, and whether it has begun. */
const wanted = 0;
const stops = 1;
const begun = 2;
const run = 0;
const stop = 1;

interface WriterData {
  regionId: string;
  bytesPerSecond: number;
  control: Int32Array;
  stoppedAtNs: BigInt64Array;
}

/** Whose worker runs: of their memory nobody else may know before the worker has opened it. */
const running = new Set<WritingGuest>();

export class WritingGuest implements Guest {
  readonly name = 'writer';
  readonly module = null;
  readonly regions;
  readonly #control = new Int32Array(new SharedArrayBuffer(12));
  readonly #stoppedAtNs = new BigInt64Array(new SharedArrayBuffer(8));
  readonly #worker: Worker;

  constructor(region: Region, bytesPerSecond: number) {
    this.regions = [{ name: 'heap', region }];
    const data: WriterData = {
      regionId: region.id,
      bytesPerSecond,
      control: this.#control,
      stoppedAtNs: this.#stoppedAtNs,
    };
    this.#worker = new Worker(new URL(import.meta.url), { workerData: data });
    this.#worker.once('error', (error) => {
      throw error;
    });
    running.add(this);
    this.#worker.once('exit', () => running.delete(this));
  }

  /** Resolves when the worker writes. */
  async writing(): Promise<void> {
    while (Atomics.load(this.#control, begun) === 0) await new Promise((resolve) => setTimeout(resolve, 1));
  }

  async pause(): Promise<{ state: Uint8Array; pausedAtNs: bigint }> {
    const before = Atomics.load(this.#control, stops);
    Atomics.store(this.#control, wanted, stop);
    Atomics.notify(this.#control, wanted);
    while (Atomics.load(this.#control, stops) === before) {
      await new Promise((resolve) => setImmediate(resolve));
    }
    return { state: new Uint8Array(0), pausedAtNs: Atomics.load(this.#stoppedAtNs, 0) };
  }

  unpause(): void {
    Atomics.store(this.#control, wanted, run);
    Atomics.notify(this.#control, wanted);
  }

  async end(): Promise<void> {
    await this.#worker.terminate();
  }
}

function write({ regionId, bytesPerSecond, control, stoppedAtNs }: WriterData): void {
  const region = Region.open(regionId);
  const { pageSize, pages } = region;
  const { views } = region;
  const viewPages = (views[0] as Uint8Array).length / pageSize;
  const pagesPerMs = bytesPerSecond / pageSize / 1000;
  let state = 0x2545f491;
  // What no link packs: from anywhere in it, so that no two pages are alike but by chance.
  const noise = new Uint8Array(2 ** 20);
  fillRandom(noise.buffer, 7);
  let startMs = performance.now();
  let written = 0;
  for (;;) {
    const due = (performance.now() - startMs) * pagesPerMs;
    while (written < due && Atomics.load(control, wanted) === run) {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      const page = (state >>> 0) % pages;
      const view = views[Math.floor(page / viewPages)] as Uint8Array;
      const at = (page % viewPages) * pageSize;
      const from = (state >>> 8) % (noise.length - pageSize);
      view.set(noise.subarray(from, from + pageSize), at);
      written++;
    }
    if (written > 0) Atomics.store(control, begun, 1);
    if (Atomics.load(control, wanted) === stop) {
      Atomics.store(stoppedAtNs, 0, process.hrtime.bigint());
      Atomics.add(control, stops, 1);
      Atomics.wait(control, wanted, stop);
      startMs = performance.now();
      written = 0;
    } else {
      Atomics.wait(control, wanted, run, 1);
    }
  }
}

if (!isMainThread) write(workerData as WriterData);
