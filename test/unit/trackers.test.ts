/** One suite over every tracker that this kernel has; one that it lacks is skipped with the reason in its name. */
import { randomInt } from 'node:crypto';
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { describe, expect, it } from 'vitest';
import { loadAddon } from '../../src/addon.js';
import { Region } from '../../src/region.js';
import {
  chooseTracker,
  DirtyTracker,
  type PageRun,
  type TrackerProbe,
  trackerNames,
  trackers,
} from '../../src/trackers.js';

const { pageSize } = loadAddon();
const probes = trackers();

interface Memory {
  readonly buffer: ArrayBufferLike;
  grow(pages: number): number;
}
const WasmMemory = (
  globalThis as unknown as { WebAssembly: { Memory: new (descriptor: { initial: number }) => Memory } }
).WebAssembly.Memory;

function pagesOf(runs: readonly PageRun[]): number[] {
  return runs.flatMap(({ first, count }) => Array.from({ length: count }, (_, i) => first + i));
}

describe.each(probes)('$name', (probe) => {
  const test = probe.available
    ? it
    : (name: string, _body: () => unknown) => it.skip(`${name} (${probe.name}: ${probe.reason})`, () => {});

  test('finds exactly the pages of a model, round by round', () => {
    const pages = 300;
    using region = Region.allocate({ lengthBytes: pages * pageSize });
    const view = region.views[0] as Uint8Array;
    for (let page = 0; page < pages; page += 3) view[page * pageSize] = 1; // others stay never touched
    using tracker = DirtyTracker.create(region, probe.name);
    tracker.arm();
    expect(tracker.collect()).toEqual([]);
    for (let round = 0; round < 40; round++) {
      const written = new Set<number>();
      for (let i = randomInt(60); i > 0; i--) {
        const page = randomInt(pages);
        const at = page * pageSize + randomInt(pageSize);
        view[at] = ((view[at] as number) + 1) % 256;
        written.add(page);
      }
      const found = pagesOf(tracker.collect());
      expect(found).toEqual([...written].sort((a, b) => a - b));
    }
  });

  test('sees writes by system calls', async () => {
    using region = Region.allocate({ lengthBytes: 8 * pageSize });
    using tracker = DirtyTracker.create(region, probe.name);
    tracker.arm();
    const { openSync, readSync, closeSync } = await import('node:fs');
    const file = openSync('/proc/self/exe', 'r');
    readSync(file, region.views[0] as Uint8Array, 3 * pageSize, 2 * pageSize, 0);
    closeSync(file);
    expect(pagesOf(tracker.collect())).toEqual([3, 4]);
  });

  test('watches while a worker of its own writes, to the last write', async () => {
    const pages = 64;
    using region = Region.allocate({ lengthBytes: pages * pageSize, shared: true });
    const words = new Int32Array((region.views[0] as Uint8Array).buffer as SharedArrayBuffer);
    const copy = new Int32Array(words.length);
    using tracker = DirtyTracker.create(region, probe.name);
    const worker = new Worker(
      `const { workerData: words, parentPort } = require('node:worker_threads');
       parentPort.once('message', () => process.exit(0));
       let at = 0;
       const step = () => {
         for (let i = 0; i < 5000; i++) { at = (at * 1103515245 + 12345) & 0x7fffffff; Atomics.add(words, at % words.length, 1); }
         setImmediate(step);
       };
       step();`,
      { eval: true, workerData: words },
    );
    const perPage = pageSize / 4;
    const send = (run: PageRun) => {
      for (let at = run.first * perPage; at < (run.first + run.count) * perPage; at++) {
        copy[at] = Atomics.load(words, at);
      }
    };
    tracker.arm();
    send({ first: 0, count: pages });
    for (let round = 0; round < 15; round++) {
      await new Promise((resolve) => setTimeout(resolve, 2));
      for (const run of tracker.collect()) send(run);
    }
    worker.postMessage('stop');
    await once(worker, 'exit');
    // What was copied after it was looked at is not what a comparing tracker holds for sent, so all of it goes again.
    for (const run of probe.name === 'hash-diff' ? [{ first: 0, count: pages }] : tracker.collect())
      send(run);
    expect(
      Buffer.compare(Buffer.from(copy.buffer), Buffer.from(words.buffer as unknown as ArrayBuffer)),
    ).toBe(0);
  });

  test('counts pages by which a WebAssembly memory has grown', () => {
    const memory = new WasmMemory({ initial: 1 });
    using region = Region.adopt(memory);
    using tracker = DirtyTracker.create(region, probe.name);
    tracker.arm();
    expect(tracker.collect()).toEqual([]);
    const before = region.pages;
    memory.grow(1);
    new Uint8Array(memory.buffer)[before * pageSize + 1] = 1;
    region.refresh();
    expect(pagesOf(tracker.collect())).toContain(before);
    new Uint8Array(memory.buffer)[(before + 3) * pageSize] = 1;
    expect(pagesOf(tracker.collect())).toEqual([before + 3]);
  });

  test('starts afresh when it is armed again, and sees nothing when it is not', () => {
    using region = Region.allocate({ lengthBytes: 4 * pageSize });
    const view = region.views[0] as Uint8Array;
    using tracker = DirtyTracker.create(region, probe.name);
    expect(() => tracker.collect()).toThrow();
    tracker.arm();
    view[0] = 1;
    tracker.arm();
    expect(tracker.collect()).toEqual([]);
    tracker.disarm();
    expect(() => tracker.collect()).toThrow();
    tracker.arm();
    view[pageSize] = 1;
    expect(tracker.collect()).toEqual([{ first: 1, count: 1 }]);
  });

  test('says that its region is gone, or that it is closed', () => {
    const region = Region.allocate({ lengthBytes: pageSize });
    const tracker = DirtyTracker.create(region, probe.name);
    tracker.arm();
    region.native.retire();
    expect(() => tracker.collect()).toThrow(expect.objectContaining({ code: 'REGION_GONE' }));
    tracker.disarm();
    tracker.close();
    tracker.close();
    expect(() => tracker.arm()).toThrow();
    region.close();
  });

  test('keeps an adopted memory after its region was closed', () => {
    const memory = new WasmMemory({ initial: 1 });
    const region = Region.adopt(memory);
    using tracker = DirtyTracker.create(region, probe.name);
    tracker.arm();
    region.close();
    new Uint8Array(memory.buffer)[0] = 1;
    expect(tracker.collect()).toEqual([{ first: 0, count: 1 }]);
  });
});

describe('the choice', () => {
  const found = (name: TrackerProbe['name'], available: boolean): TrackerProbe => ({
    name,
    available,
    reason: available ? '' : 'no such thing here',
    remedy: available ? '' : 'get one',
  });

  it('knows every tracker', () => {
    expect(probes.map(({ name }) => name)).toEqual([...trackerNames]);
  });

  it('passes over one that may not watch the memory, and says why when it was asked for', () => {
    const both = [found('uffd-wp-async', true), found('hash-diff', true)];
    const refusal = (name: string) => (name === 'uffd-wp-async' ? 'the memory is shared' : null);
    expect(chooseTracker(undefined, both, refusal)).toBe('hash-diff');
    expect(() => chooseTracker('uffd-wp-async', both, refusal)).toThrow(/the memory is shared/);
  });

  it('tries out no more than it needs', () => {
    const tried: string[] = [];
    function* one(): Iterable<TrackerProbe> {
      for (const name of ['uffd-wp-async', 'hash-diff'] as const) {
        tried.push(name);
        yield found(name, true);
      }
    }
    expect(chooseTracker(undefined, one())).toBe('uffd-wp-async');
    expect(tried).toEqual(['uffd-wp-async']);
  });

  it('takes no word but the two', () => {
    using region = Region.allocate({ lengthBytes: pageSize });
    expect(() => DirtyTracker.create(region, undefined, { writers: 'everywhere' as never })).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    );
    for (const writers of ['anywhere', 'tracked-mapping'] as const) {
      using tracker = DirtyTracker.create(region, undefined, { writers });
      tracker.arm();
      expect(tracker.collect()).toEqual([]);
    }
  });

  it('takes the first that works, or the one asked for', () => {
    const both = [found('uffd-wp-async', true), found('hash-diff', true)];
    expect(chooseTracker(undefined, both)).toBe('uffd-wp-async');
    expect(chooseTracker('hash-diff', both)).toBe('hash-diff');
    expect(chooseTracker(undefined, [found('uffd-wp-async', false), found('hash-diff', true)])).toBe(
      'hash-diff',
    );
  });

  it('says why there is none, and how to get one', () => {
    const none = [found('uffd-wp-async', false)];
    const unavailable = expect.objectContaining({
      code: 'TRACKER_UNAVAILABLE',
      message: expect.stringMatching(/no such thing here \(get one\)/),
    });
    expect(() => chooseTracker(undefined, none)).toThrow(unavailable);
    expect(() => chooseTracker('uffd-wp-async', none)).toThrow(unavailable);
    expect(() => chooseTracker('magic')).toThrow(/no tracker named 'magic'/);
  });
});
