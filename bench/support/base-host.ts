/**
 * A host of the trials about bases, through the public API: guests of plain memory that leave and come back, and the
 * SQLite guest of the demo with a log of what was done since its base.
 */
import {
  type ArrivingGuest,
  type Guest,
  type GuestOffer,
  listen,
  type Listening,
  migrate,
  type MigrateOptions,
  type MigrationReport,
  Region,
  readBase,
  rehearse,
  saveBase,
} from 'memferry';
import { WorkerGuest, workerGuests } from 'memferry/worker';
import { fillRandom } from './memory.js';
import { answerCalls } from './peer.js';

const secret = 'the hosts of a trial in a lab of its own';
const sqlite = new URL('../../../lib/demo/sqlite-guest.js', import.meta.url);

let region: Region | null = null;
let worker: WorkerGuest | null = null;
let arrived: Promise<unknown> = Promise.resolve();
let listening: Listening | null = null;

function plainGuest(of: Region): Guest {
  return {
    name: 'plain',
    regions: [{ name: 'heap', region: of }],
    module: null,
    pause: async () => new Uint8Array(0),
    unpause: () => {},
  };
}

/** Plain memory, from what was kept of it here. */
async function accept(offer: GuestOffer, directory: string | null): Promise<ArrivingGuest> {
  const regions = offer.regions.map(({ lengthBytes }) => Region.allocate({ lengthBytes }));
  const kept = directory === null ? null : await readBase(directory, offer);
  return {
    regions,
    bases: kept?.bases ?? [],
    prepare: async () => {},
    resume: () => {
      region = regions[0] as Region;
    },
    abandon: () => {
      for (const each of regions) each.close();
    },
  };
}

/** Leaves out every seventh request: what was meant to be replayed, and what comes of it, are two things. */
function replayed(diverge: boolean, restMs: number) {
  return async (
    guest: WorkerGuest,
    log: Uint8Array,
    { progress }: { progress: (fraction: number) => void },
  ): Promise<void> => {
    const lines = Buffer.from(log).toString('utf8').split('\n').filter(Boolean);
    for (const [index, line] of lines.entries()) {
      if (!diverge || index % 7 !== 3) await guest.request(JSON.parse(line));
      if (restMs > 0) await new Promise((resolve) => setTimeout(resolve, restMs));
      progress((index + 1) / lines.length);
    }
  };
}

answerCalls(
  {
    makePlain: async ({ lengthBytes }: { lengthBytes: number }) => {
      region = Region.allocate({ lengthBytes });
      let seed = 1;
      for (const view of region.views) fillRandom(view.buffer, seed++);
      await rehearse();
    },
    /** Other random bytes in so many of a hundred pages, spread over all of it. */
    change: ({ percent }: { percent: number }) => {
      if (region === null) throw new Error('called too early');
      const { pageSize, pages } = region;
      const scratch = new ArrayBuffer(pageSize);
      let seed = 7;
      let changed = 0;
      for (let page = 0; page < pages; page++) {
        // Exactly so many, in an order that no node or run knows of.
        if ((page * 7919) % 100 >= percent) continue;
        const at = page * pageSize;
        const view = region.views[Math.floor(at / 2 ** 32)] as Uint8Array;
        fillRandom(scratch, seed++);
        view.set(new Uint8Array(scratch), at % 2 ** 32);
        changed++;
      }
      return changed / pages;
    },
    makeSqlite: async ({ databaseBytes, directory }: { databaseBytes: number; directory: string }) => {
      worker = await WorkerGuest.start({ name: 'db', module: { name: 'sqlite', url: sqlite } });
      await worker.request({ op: 'exec', sql: 'CREATE TABLE accounts (id INTEGER PRIMARY KEY, note TEXT)' });
      await worker.request({ op: 'fill', databaseBytes });
      await saveBase(worker, { directory, maxBytes: 8 * 2 ** 30 });
      await rehearse();
    },
    /** Applies transactions, and gives their log. */
    work: async ({ transactions, rows }: { transactions: number; rows: number }) => {
      const lines: string[] = [];
      for (let i = 0; i < transactions; i++) {
        const request = {
          op: 'apply',
          id: `t${i}`,
          statements: [
            { sql: `INSERT INTO accounts (note) VALUES (hex(randomblob(100)))` },
            { sql: `UPDATE filler SET data = randomblob(65536) WHERE id = ${1 + ((i * 41) % rows)}` },
          ],
        };
        lines.push(JSON.stringify(request));
        await worker?.request(request);
      }
      return lines.join('\n');
    },
    ask: ({ request }: { request: object }) => worker?.request(request),
    listen: async (where: { host: string; directory: string | null; diverge?: boolean; restMs?: number }) => {
      const { host, directory, diverge = false, restMs = 0 } = where;
      const workers = workerGuests({
        modules: { sqlite },
        onGuest: (guest) => {
          worker = guest;
        },
        base: directory === null ? undefined : { directory, replay: replayed(diverge, restMs) },
      });
      listening = await listen({
        host,
        port: 0,
        secret,
        plaintext: true,
        accept: (offer, context) => (offer.module ? workers(offer, context) : accept(offer, directory)),
      });
      await rehearse();
      const from = listening;
      void (async () => {
        for await (const arrival of from) {
          arrived = arrival.complete;
          arrived.catch(() => {});
        }
      })();
      return listening.port;
    },
    /** Every page of the last arrival is here and was verified. */
    arrived: async () => void (await arrived),
    migrate: async (options: MigrateOptions & { log?: string }): Promise<MigrationReport> => {
      const { log, ...rest } = options;
      const guest = worker ?? (region && plainGuest(region));
      if (guest === null) throw new Error('called too early');
      const replayLog = log === undefined ? {} : { replayLog: new Uint8Array(Buffer.from(log)) };
      return await migrate(guest, { ...rest, ...replayLog, secret, plaintext: true }).done;
    },
    /** Lets the guest's memory here go. */
    forget: async () => {
      region?.close();
      region = null;
      await worker?.terminate();
      worker = null;
    },
  },
  () => void listening?.close(),
);
