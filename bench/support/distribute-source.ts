/** A source of the trial `distribute`: guests that began as one of the base images, through the public API. */
import { openSync, readSync, closeSync, fstatSync } from 'node:fs';
import {
  type Guest,
  type MigrationReport,
  type Mode,
  migrate,
  Region,
  type Sampling,
  sampleGuest,
  type SamplingStats,
} from 'memferry';
import { answerCalls } from './peer.js';

const pageBytes = 4096;

export interface OwnedGuest {
  name: string;
  image: string;
  /** Pages in a thousand that are the guest's own. */
  own: number;
  seed: number;
}

export interface Made {
  pages: number;
  /** With content, and not as in the image. */
  ownPages: number;
}

export interface Leaving {
  name: string;
  port: number;
  mode: Mode;
  bandwidth: number;
  domain: string | null;
}

const guests = new Map<string, Guest>();
const samplings: Sampling[] = [];

/** As a guest does that goes on from an image: a page that it has written has most of its former content. */
function own(page: Buffer, seed: number, number: number): void {
  for (let at = 0; at < 8; at++) page.writeDoubleLE(Math.sin(seed * 1e6 + number * 8 + at), at * 512);
}

function load({ image, own: perMille, seed }: OwnedGuest): { region: Region; made: Made } {
  const file = openSync(image, 'r');
  try {
    const pages = Math.floor(fstatSync(file).size / pageBytes);
    const region = Region.allocate({ lengthBytes: pages * pageBytes });
    const made = { pages, ownPages: 0 };
    const [view] = region.views;
    const memory = Buffer.from(view?.buffer as ArrayBuffer, view?.byteOffset, view?.byteLength);
    const page = Buffer.alloc(pageBytes);
    // Runs of 16 pages, as a program's allocations lie together.
    let random = seed;
    let owns = false;
    for (let number = 0; number < pages; number++) {
      readSync(file, page, 0, pageBytes, number * pageBytes);
      if (number % 16 === 0) {
        random = (Math.imul(random, 1103515245) + 12345) >>> 0;
        owns = (random >>> 8) % 1000 < perMille;
      }
      if (page.every((byte) => byte === 0)) continue;
      if (owns) {
        own(page, seed, number);
        made.ownPages++;
      }
      page.copy(memory, number * pageBytes);
    }
    return { region, made };
  } finally {
    closeSync(file);
  }
}

answerCalls(
  {
    make: (owned: OwnedGuest): Made => {
      const { region, made } = load(owned);
      guests.set(owned.name, {
        name: owned.name,
        regions: [{ name: 'memory', region }],
        module: null,
        pause: async () => ({ state: new Uint8Array(1), pausedAtNs: process.hrtime.bigint() }),
        unpause: () => {},
      } as unknown as Guest);
      return made;
    },
    sample: async ({ via, domain }: { via: string[]; domain: string }): Promise<void> => {
      for (const guest of guests.values())
        samplings.push(await sampleGuest(guest, { via, dedup: { domain } }));
    },
    sampled: (): SamplingStats[] => samplings.map((each) => each.stats()),
    leave: async ({ name, port, mode, bandwidth, domain }: Leaving): Promise<MigrationReport> => {
      const guest = guests.get(name);
      if (guest === undefined) throw new Error('called too early');
      const to = { host: '127.0.0.1', port };
      // Without compression: what references save is to be seen alone.
      const options = { to, mode, bandwidth, compress: 'off' as const };
      return await migrate(guest, { ...options, ...(domain === null ? {} : { dedup: { domain } }) }).done;
    },
  },
  () => {},
);
