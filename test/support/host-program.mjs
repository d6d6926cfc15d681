/**
 * A host of guests for the tests: a real process with memferry in it, driven over IPC by host.ts. One request
 * at a time is `{ id, op, ... }`, answered by `{ id, value }` or `{ id, error }`; whatever happens meanwhile is
 * told as `{ event, ... }`. Nothing here decides anything: it does what it is told.
 */
import { closeSync, ftruncateSync, openSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { listen, MemferryError, migrate, readBase, saveBase } from '../../lib/index.js';
import { stage } from '../../lib/staging/server.js';
import { WorkerGuest, workerGuests } from '../../lib/worker/index.js';
import { TestGuest } from './test-guest.mjs';

const guests = new Map();
/** Guests whose name another has taken since; they run on here until the reset. */
const displaced = [];
const migrations = new Map();
const listeners = new Map();
const arrivals = new Map();
const stages = new Map();
const tell = (event, facts = {}) => process.connected && process.send({ event, ...facts });

function keep(name, guest) {
  if (guests.has(name)) displaced.push(guests.get(name));
  guests.set(name, guest);
}

function plainError(error) {
  if (error instanceof MemferryError) {
    return { code: error.code, message: error.message, facts: JSON.parse(JSON.stringify(error.facts)) };
  }
  return { code: error?.code ?? null, message: String(error?.message ?? error), facts: {} };
}

/** A promise's end as data. */
function settled(promise) {
  return promise.then(
    (value) => ({ ok: true, value: value ?? null }),
    (error) => ({ ok: false, error: plainError(error) }),
  );
}

function descriptors() {
  const kinds = {};
  for (const fd of readdirSync('/proc/self/fd')) {
    let target;
    try {
      target = readlinkSync(`/proc/self/fd/${fd}`);
    } catch {
      continue;
    }
    const kind = target.startsWith('/') ? target : target.replace(/:?\[\d+\]$/, '');
    kinds[kind] = (kinds[kind] ?? 0) + 1;
  }
  return kinds;
}

/** Anonymous memory that the process has in RAM. */
function residentBytes() {
  const [, kilobytes] = /^RssAnon:\s+(\d+) kB$/m.exec(readFileSync('/proc/self/status', 'utf8')) ?? [];
  return Number(kilobytes) * 1024;
}

/** Mappings that a userfaultfd is registered on (um: missing, uw: write-protect, ui: minor). */
function registeredMappings() {
  const flags = readFileSync('/proc/self/smaps', 'utf8').match(/^VmFlags:.*$/gm) ?? [];
  return flags.filter((line) => / (um|uw|ui)\b/.test(line)).length;
}

function threadNames() {
  const names = {};
  for (const task of readdirSync('/proc/self/task')) {
    try {
      const name = readFileSync(`/proc/self/task/${task}/comm`, 'utf8').trim();
      names[name] = (names[name] ?? 0) + 1;
    } catch {
      // It has ended meanwhile.
    }
  }
  return names;
}

const find = (map, key, what) => map.get(key) ?? fail(`no ${what} '${key}'`);
const fail = (message) => {
  throw new Error(message);
};

function watch(kind, key, emitter) {
  emitter.on('state', (state, previous) => tell('state', { of: kind, key, state, previous }));
  tell('state', { of: kind, key, state: emitter.state, previous: null });
}

function watchWorker(guest) {
  guest.on('pages-lost', (pages) => tell('pages-lost', { guest: guest.name, pages }));
  guest.on('ended', (error) => tell('ended', { guest: guest.name, error: plainError(error) }));
}

async function takeArrivals(key, listening) {
  for await (const arrival of listening) {
    const name = `${key}/${arrival.offer.name}`;
    arrivals.set(name, arrival);
    for (const promise of ['executionState', 'resumed', 'complete', 'restHere']) {
      settled(arrival[promise]).then(({ ok, error }) => {
        tell('arrival', { key: name, promise, ok, error });
      });
    }
    watch('arrival', name, arrival);
  }
}

/** The log is bytes [offset u32, value u8]; `replay`: what goes wrong, or 'exact'. */
function replayOf(replay, arriving, offer) {
  const apply = async (log, { signal }) => {
    tell('replay', { guest: offer.name, bytes: log.length });
    if (replay === 'throw') throw new Error('this log cannot be applied');
    if (replay === 'hang') {
      await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
      return;
    }
    const view = new DataView(log.buffer, log.byteOffset, log.length);
    const [memory] = arriving.regions[0].views;
    for (let at = 0; at < log.length; at += 5) {
      memory[view.getUint32(at, true)] = view.getUint8(at + 4) + (replay === 'diverge' ? 1 : 0);
    }
  };
  return { apply, expectedMs: 1 };
}

/** The log is requests as JSON, one a line. A replay that diverges leaves some out, and adds one of its own. */
function workerBaseOf({ directory, diverge, hang = false, restMs = 0, replayMs = null }) {
  const replay = async (guest, log, { progress }) => {
    if (hang) await new Promise(() => {});
    const lines = Buffer.from(log).toString('utf8').split('\n').filter(Boolean);
    tell('replay', { guest: guest.name, requests: lines.length });
    for (const [index, line] of lines.entries()) {
      if (!diverge || index % 7 !== 3) await guest.request(JSON.parse(line));
      if (restMs > 0) await new Promise((resolve) => setTimeout(resolve, restMs));
      progress((index + 1) / lines.length);
    }
    if (diverge) await guest.request({ op: 'exec', sql: 'CREATE TABLE diverged (x)' });
  };
  return { directory, replay, ...(replayMs === null ? {} : { replayMs }) };
}

const operations = {
  async create({ guest, regions, rate = {}, behaviour = {} }) {
    const rates = { batch: 8, restMs: 1, ...rate };
    const log = (step) => tell('guest', { guest, step });
    keep(guest, await TestGuest.create(guest, regions, rates, behaviour, log));
  },
  start: ({ guest }) => find(guests, guest, 'guest').start(),
  behave: ({ guest, behaviour }) => Object.assign(find(guests, guest, 'guest').behaviour, behaviour),
  check: ({ guest, except }) => find(guests, guest, 'guest').compare(except),
  untilWrites: ({ guest }) => find(guests, guest, 'guest').ask('untilWrites'),
  status: ({ guest }) => find(guests, guest, 'guest').status(),
  lost: ({ guest }) => find(guests, guest, 'guest').lostRuns,
  touch: ({ guest, index, page }) => find(guests, guest, 'guest').ask('touch', { index, page }),
  async grow({ guest, index, pages }) {
    return find(guests, guest, 'guest').ask('grow', { index, pages });
  },
  closeRegion: ({ guest, index }) => find(guests, guest, 'guest').regions[index].region.close(),
  claimed: ({ guest }) => find(guests, guest, 'guest').regions.map(({ region }) => region.native.claimed()),
  /** As a worker that crashes: its memory goes with it. */
  terminateWriter: ({ guest }) => find(guests, guest, 'guest').end(),
  async end({ guest }) {
    await find(guests, guest, 'guest').end();
    guests.delete(guest);
  },

  /** An image file of each region, as the guest's memory is now (it may be writing). */
  async saveRegions({ guest, paths }) {
    for (const [index, { region }] of find(guests, guest, 'guest').regions.entries()) {
      const file = openSync(paths[index], 'w', 0o600);
      ftruncateSync(file, region.lengthBytes);
      closeSync(file);
      await region.native.save(paths[index], 0, region.pages);
    }
  },

  /**
   * `bases`: paths of image files, one a region; with `inPlace` they are in the regions before the offer is accepted.
   * `kind`: the memory that guests get here, whatever they had. `staleCopies`: a directory; `fromGuest`: the memory of a guest that has left this host.
   */
  async listen({
    key = 'main',
    options = {},
    rate = {},
    behaviour = {},
    plain = false,
    modules = null,
    bases = null,
    inPlace = false,
    staleCopies = null,
    fromGuest = null,
    replay = null,
    workerBase = null,
    kind = null,
  }) {
    const rates = { batch: 8, restMs: 1, ...rate };
    const accept = async (offer) => {
      tell('offer', { key, guest: offer.name });
      if (behaviour.accept === 'hang') await new Promise(() => {});
      if (behaviour.accept === 'throw') throw new Error('this host does not like the guest');
      const log = (step) => tell('guest', { guest: offer.name, step, arrived: true });
      const former = fromGuest === null ? null : find(guests, fromGuest, 'guest');
      const guest = await TestGuest.accept(offer, rates, { ...behaviour }, log, kind);
      keep(offer.name, guest);
      const arriving = guest.arriving();
      if (bases) arriving.bases = bases.map((path) => path && { path });
      if (inPlace) {
        for (const [index, region] of arriving.regions.entries()) {
          await region.native.fill(bases[index], 0, 0, region.pages);
        }
        arriving.bases = bases.map(() => ({ inPlace: true }));
      }
      if (staleCopies) arriving.bases = (await readBase(staleCopies, offer))?.bases;
      if (former) arriving.bases = former.regions.map(({ region }) => ({ region }));
      if (replay) arriving.replay = replayOf(replay, arriving, offer);
      if (behaviour.base === 'hang') {
        const fill = (_, { signal }) =>
          new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
        arriving.bases = arriving.regions.map(() => ({ fill }));
      }
      return arriving;
    };
    const moduleUrls =
      modules && Object.fromEntries(Object.entries(modules).map(([n, u]) => [n, new URL(u)]));
    const acceptWorker =
      moduleUrls &&
      workerGuests({
        modules: moduleUrls,
        ...(workerBase ? { base: workerBaseOf(workerBase) } : {}),
        onGuest: (guest) => {
          keep(guest.name, guest);
          watchWorker(guest);
        },
      });
    const listening = await listen({
      ...options,
      ...(plain ? {} : { accept: acceptWorker ?? accept }),
    });
    listeners.set(key, listening);
    takeArrivals(key, listening).catch((error) => tell('failure', { message: String(error) }));
    return { port: listening.port };
  },
  async closeListener({ key = 'main' }) {
    await find(listeners, key, 'listener').close();
    listeners.delete(key);
  },
  limit: ({ key = 'main', limits }) => find(listeners, key, 'listener').limit(limits),

  /** A VMD server in this process. */
  async stage({ key = 'main', options }) {
    const staging = await stage(options);
    stages.set(key, staging);
    return { port: staging.port };
  },
  stageStatus: ({ key = 'main' }) => find(stages, key, 'VMD server').status(),
  async closeStage({ key = 'main' }) {
    await find(stages, key, 'VMD server').close();
    stages.delete(key);
  },

  arrival: ({ key, promise }) => settled(find(arrivals, key, 'arrival')[promise]),
  disposeArrival: ({ key }) => find(arrivals, key, 'arrival')[Symbol.asyncDispose](),

  migrate({ key = 'main', guest, options, abortable = false }) {
    const controller = abortable ? new AbortController() : null;
    const signal = controller ? { signal: controller.signal } : {};
    const migration = migrate(find(guests, guest, 'guest'), { ...options, ...signal });
    const entry = { migration, controller, rounds: 0 };
    migrations.set(key, entry);
    migration.on('waiting', (what) => tell('waiting', { key, what }));
    watch('migration', key, migration);
    (async () => {
      for await (const sample of migration.progress) {
        if (sample.round > entry.rounds) tell('round', { key, round: sample.round });
        entry.rounds = sample.round;
      }
      tell('progress-ended', { key });
    })();
    settled(migration.evicted).then(({ ok, error }) => tell('evicted', { key, ok, error }));
    settled(migration.done).then(({ ok, error }) => tell('done', { key, ok, error }));
  },
  done: ({ key = 'main' }) => settled(find(migrations, key, 'migration').migration.done),
  evicted: ({ key = 'main' }) => settled(find(migrations, key, 'migration').migration.evicted),
  switchover: ({ key = 'main' }) => find(migrations, key, 'migration').migration.switchover(),
  cancel: ({ key = 'main' }) => find(migrations, key, 'migration').migration.cancel('the test says so'),
  abort: ({ key = 'main' }) => find(migrations, key, 'migration').controller.abort(new Error('enough')),
  resolve: ({ key = 'main', proof }) => settled(find(migrations, key, 'migration').migration.resolve(proof)),
  async dispose({ key = 'main' }) {
    await find(migrations, key, 'migration').migration[Symbol.asyncDispose]();
  },
  migrationState: ({ key = 'main' }) => find(migrations, key, 'migration').migration.state,

  async startWorker({ guest, module, url, options = {} }) {
    const started = await WorkerGuest.start({
      name: guest,
      module: { name: module, url: new URL(url) },
      ...options,
    });
    keep(guest, started);
    watchWorker(started);
  },
  saveBase: ({ guest, options }) => saveBase(find(guests, guest, 'guest'), options),
  request: ({ guest, request, worker = 0 }) =>
    settled(find(guests, guest, 'guest').request(request, { worker })),
  workerStatus: ({ guest }) => find(guests, guest, 'guest').status,
  terminateWorker: ({ guest }) => find(guests, guest, 'guest').terminate(),

  /** Back to the beginning: nothing listens, moves or runs. */
  async reset() {
    await Promise.all([...migrations.values()].map(({ migration }) => migration[Symbol.asyncDispose]()));
    await Promise.all([...listeners.values()].map((listening) => listening.close()));
    await Promise.all(
      [...guests.values(), ...displaced.splice(0)].map((guest) => guest.end?.() ?? guest.terminate()),
    );
    await Promise.all([...stages.values()].map((staging) => staging.close()));
    for (const map of [migrations, listeners, guests, arrivals, stages]) map.clear();
  },

  inventory: () => ({
    descriptors: descriptors(),
    registered: registeredMappings(),
    threads: threadNames(),
  }),
  residentBytes,
  exit: ({ code }) => void setImmediate(() => process.exit(code)),
};

process.on('warning', (warning) =>
  tell('warning', { name: warning.name, code: warning.code, message: warning.message }),
);
process.on('unhandledRejection', (error) => {
  tell('failure', { message: `unhandled rejection: ${error?.stack ?? error}` });
});
process.on('message', async ({ id, op, ...args }) => {
  try {
    const value = await (operations[op] ?? fail(`no operation '${op}'`))(args);
    process.send({ id, value });
  } catch (error) {
    process.send({ id, error: { ...plainError(error), stack: error?.stack } });
  }
});
// A test that ended without us: nobody would ever end this process.
process.on('disconnect', () => process.exit(3));
tell('ready');
