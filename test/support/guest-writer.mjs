/**
 * A test guest's one thread: writes pages of its regions in a pseudo-random order for as long as it runs, and
 * counts the writes of every page in a journal beside the regions. Runs as a worker of guest.mjs.
 *
 * It works in slices and reads messages in between, so that it can be paused between two writes; inside a slice
 * it may wait for a missing page.
 */
import { parentPort, workerData } from 'node:worker_threads';
import { Region } from '../../lib/index.js';
import { comparePage, writable, writeFirst, writeVersion } from './oracle.mjs';

const { batch, restMs } = workerData;
const regions = [];
let random = workerData.seed;
let running = null; // the interval under way: { first, last } in ns, first null before the first write
let order = 0;
let written = 0;
/** Requests that the next write answers. */
const awaitingWrite = [];

function next() {
  random ^= random << 13;
  random ^= random >>> 17;
  random ^= random << 5;
  random >>>= 0;
  return random;
}

/** Fresh views each time: a WebAssembly memory's buffer changes when it grows. */
function wordsOf(entry) {
  if (entry.memory && entry.words?.buffer !== entry.memory.buffer) {
    entry.words = new Uint32Array(entry.memory.buffer);
  }
  return entry.words;
}

function make(spec) {
  const { kind, pages, maxPages, initialPages, region: id, memory, buffer, pageSize } = spec;
  const entry = { kind, memory: memory ?? null, words: null, initialPages, pageSize, region: null };
  if (kind === 'wasm') {
    const unit = 65536 / pageSize;
    entry.memory = new WebAssembly.Memory({ initial: pages / unit, maximum: maxPages / unit });
    entry.region = Region.adopt(entry.memory);
  } else if (kind === 'allocate' || kind === 'huge') {
    entry.region = Region.open(id);
    const [view] = entry.region.views;
    entry.words = new Uint32Array(view.buffer, view.byteOffset, view.byteLength / 4);
  } else if (kind === 'shared') {
    entry.words = new Uint32Array(buffer);
  }
  entry.versions = new Uint32Array(maxPages);
  regions.push(entry);
  return entry.region?.id ?? null;
}

const pagesOf = (entry) => (wordsOf(entry).length * 4) / entry.pageSize;

function fill() {
  regions.forEach((entry, index) => {
    const words = wordsOf(entry);
    for (let page = 0; page < entry.initialPages; page++) {
      writeFirst(words, entry.pageSize / 4, index, page, entry.initialPages);
    }
  });
}

function write() {
  const index = next() % regions.length;
  const entry = regions[index];
  const words = wordsOf(entry);
  const page = next() % pagesOf(entry);
  if (!writable(page, entry.initialPages)) return;
  writeVersion(words, entry.pageSize / 4, index, page, entry.versions[page] + 1);
  entry.versions[page]++;
  written++;
}

function slice(mine) {
  if (!running || mine !== order) return;
  const before = written;
  running.first ??= process.hrtime.bigint();
  for (let i = 0; i < batch; i++) write();
  running.last = process.hrtime.bigint();
  if (written > before) {
    for (const id of awaitingWrite.splice(0)) parentPort.postMessage({ id, value: written });
  }
  if (restMs > 0) setTimeout(slice, restMs, mine);
  else setImmediate(slice, mine);
}

/** Reads every page but those of the runs `except`, which are lost and would end the process. */
function check(limit, except) {
  const wrong = [];
  let pages = 0;
  regions.forEach((entry, index) => {
    const words = wordsOf(entry);
    const count = pagesOf(entry);
    const lost = except.filter(({ region }) => region === index);
    for (let page = 0; page < count && wrong.length < limit; page++) {
      if (lost.some(({ first, count }) => page >= first && page < first + count)) continue;
      pages++;
      const bad = comparePage(
        words,
        entry.pageSize / 4,
        index,
        page,
        entry.versions[page],
        entry.initialPages,
      );
      if (bad) wrong.push(bad);
    }
  });
  return { wrong, pages, written };
}

const operations = {
  make: ({ specs }) => specs.map(make),
  fill: () => fill(),
  run: () => {
    running ??= { first: null, last: null };
    slice(++order);
  },
  /** Between two slices by nature: nothing is written after this. */
  stand: () => {
    const interval = running;
    running = null;
    order++;
    return interval;
  },
  interval: () => running,
  save: () => ({
    random,
    written,
    regions: regions.map((entry) => ({
      initialPages: entry.initialPages,
      versions: entry.versions.slice(0, pagesOf(entry)),
    })),
  }),
  load: ({ state }) => {
    ({ random, written } = state);
    state.regions.forEach(({ initialPages, versions }, index) => {
      regions[index].initialPages = initialPages;
      regions[index].versions.set(versions);
    });
  },
  grow: ({ index, pages }) => {
    const entry = regions[index];
    const unit = 65536 / entry.pageSize;
    const more = pages - pagesOf(entry);
    if (more > 0) entry.memory.grow(more / unit);
    return pagesOf(entry);
  },
  check: ({ limit, except }) => check(limit, except ?? []),
  /** Reads one word; with a lost page that is the end of the process, which is what is tested. */
  touch: ({ index, page }) => wordsOf(regions[index])[(page * regions[index].pageSize) / 4],
  exit: () => {
    for (const { region } of regions) region?.close();
    parentPort.close();
  },
};

parentPort.on('message', ({ id, op, ...args }) => {
  if (op === 'untilWrites') {
    awaitingWrite.push(id);
    return;
  }
  let answer;
  try {
    answer = { id, value: operations[op](args) };
  } catch (error) {
    answer = { id, error: String(error?.stack ?? error) };
  }
  if (id !== null) parentPort.postMessage(answer);
});
