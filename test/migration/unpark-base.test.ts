/**
 * A parked guest comes to a host that has something like it: what is the same does not come from the VMD, every byte is
 * right all the same, and what is wrong with the base costs the base alone.
 */
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import type { ArrivingGuest, Guest, GuestOffer } from '../../src/guest.js';
import {
  type ParkTicket,
  park,
  Region,
  readBase,
  type Staging,
  saveBase,
  stage,
  type UnparkOptions,
  unpark,
} from '../../src/index.js';

const SECRET = 'a secret that only this test knows';
const MIB = 2 ** 20;
const LENGTH = 8 * MIB;
const PAGES = LENGTH / 4096;
const ZEROS = 20;
const CONTENT = PAGES - ZEROS;

const open: { [Symbol.asyncDispose](): PromiseLike<void> }[] = [];
const regions: Region[] = [];
let directory = '';
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'memferry-base-'));
});
afterEach(async () => {
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]();
  for (const region of regions.splice(0)) region.close();
  rmSync(directory, { recursive: true, force: true });
});

async function servers(count: number): Promise<Staging[]> {
  const all = await Promise.all(
    Array.from({ length: count }, (_, at) =>
      stage({ secret: SECRET, memoryBytes: 64 * MIB, name: `I${at + 1}` }),
    ),
  );
  open.push(...all);
  return all;
}
const via = (all: readonly Staging[]) => all.map(({ port }) => `127.0.0.1:${port}`);

class PlainGuest implements Guest {
  readonly name: string = 'plain';
  readonly module = null;
  readonly regions: Guest['regions'];
  readonly memory: Uint8Array;

  /** `word`: what the n-th word of its memory is. */
  constructor(word: (n: number) => number = (n) => Math.imul(n, 2654435761)) {
    const region = Region.allocate({ lengthBytes: LENGTH });
    regions.push(region);
    this.regions = [{ name: 'memory', region }];
    const [view] = region.views as [Uint8Array];
    const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
    for (let at = 0; at < words.length; at++) words[at] = word(at + 1);
    view.fill(0, 40 * 4096, (40 + ZEROS) * 4096);
    this.memory = view;
  }
  /** Something of every n-th page, and so of this many. */
  change(every: number): number {
    let changed = 0;
    for (let at = 17; at < this.memory.length; at += every * 4096, changed++) {
      this.memory[at] = (this.memory[at] as number) ^ 0x5a;
    }
    return changed;
  }
  async pause(): Promise<Uint8Array> {
    return Uint8Array.of(1, 2, 3);
  }
  unpause(): void {}
  release(): void {}
}

const kept = () => ({ directory, maxBytes: 64 * MIB });

async function parked(guest: Guest, all: readonly Staging[], options = {}): Promise<ParkTicket> {
  return (await park(guest, { secret: SECRET, via: via(all), ...options })).ticket;
}

async function comes(ticket: ParkTicket, expected: Uint8Array, options: UnparkOptions = {}) {
  const unparked = await unpark(ticket, { secret: SECRET, ...options });
  open.push(unparked);
  regions.push(...unparked.regions);
  const report = await unparked.complete;
  expect(report).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, expected)).toBe(0);
  expect(report.bytesFromBase).toBe(report.pagesFromBase * 4096);
  return report;
}

describe.each([
  [1, 1, 'off'],
  [2, 1, 'lz4'],
  [3, 2, 'zstd'],
] as const)('%i servers, %i replicas, compress %s', (count, replicas, compress) => {
  test('a copy that was kept when it was parked: nothing comes', async () => {
    const all = await servers(count);
    const guest = new PlainGuest((n) => n % 977);
    const expected = Uint8Array.from(guest.memory);
    const ticket = await parked(guest, all, { replicas, compress, keepStaleCopy: kept() });
    guest.memory.fill(0xee);
    const report = await comes(ticket, expected, { base: { directory } });
    expect(report).toMatchObject({ baseProblem: null, pagesFromBase: CONTENT, pagesGathered: 0 });
    const came = report.intermediaries.reduce((sum, { pages }) => sum + pages, 0);
    expect(came).toBe(0);
    for (const server of all) expect(server.status().held).toEqual([]);
  });

  test('it has changed since: what differs comes, and no more', async () => {
    const all = await servers(count);
    const guest = new PlainGuest((n) => n % 977);
    await saveBase(guest, kept());
    const changed = guest.change(3);
    const zeros = Array.from({ length: ZEROS }, (_, at) => 40 + at).filter((page) => page % 3 === 0).length;
    const expected = Uint8Array.from(guest.memory);
    const ticket = await parked(guest, all, { replicas, compress });
    const report = await comes(ticket, expected, { base: { directory } });
    expect(report).toMatchObject({ baseProblem: null, pagesGathered: changed });
    // Pages that were zeros then have content now.
    expect(report.pagesFromBase).toBe(CONTENT + zeros - changed);
    expect(report.pagesZero).toBe(ZEROS - zeros);
  });
});

test('who waits for a page gets it, base or not', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  await saveBase(guest, kept());
  guest.change(2);
  const expected = Uint8Array.from(guest.memory);
  const ticket = await parked(guest, all);
  const unparked = await unpark(ticket, { secret: SECRET, base: { directory }, gatherLimit: 4e6 });
  open.push(unparked);
  regions.push(...unparked.regions);
  const view = unparked.regions[0]?.views[0] as Uint8Array;
  for (let n = 0; n < 2 * PAGES; n++) {
    const at = (Math.imul(n, 2654435761) >>> 0) % LENGTH;
    if (view[at] !== expected[at]) expect.fail(`byte ${at}`);
  }
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(view, expected)).toBe(0);
});

describe('image files', () => {
  const image = () => join(directory, 'memory.image');

  test('of a region by its name, from an offset on', async () => {
    const all = await servers(1);
    const guest = new PlainGuest();
    writeFileSync(image(), Buffer.concat([Buffer.alloc(4242), guest.memory]));
    const changed = guest.change(7);
    const expected = Uint8Array.from(guest.memory);
    const ticket = await parked(guest, all);
    const base = { images: { memory: { path: image(), offsetBytes: 4242 } } };
    const report = await comes(ticket, expected, { base });
    expect(report.pagesGathered).toBe(changed);
    expect(report.pagesFromBase + report.pagesGathered + report.pagesZero).toBe(PAGES);
  });

  test('of another guest: everything comes', async () => {
    const all = await servers(2);
    const guest = new PlainGuest();
    writeFileSync(image(), new PlainGuest((n) => Math.imul(n, 40503)).memory);
    const expected = Uint8Array.from(guest.memory);
    const report = await comes(await parked(guest, all), expected, { base: { images: { memory: image() } } });
    expect(report).toMatchObject({ pagesFromBase: 0, pagesGathered: CONTENT, baseProblem: null });
  });

  test('that is too short, or too long', async () => {
    for (const lengthBytes of [3 * MIB + 100, LENGTH + MIB]) {
      const all = await servers(1);
      const guest = new PlainGuest();
      writeFileSync(image(), guest.memory);
      truncateSync(image(), lengthBytes);
      const expected = Uint8Array.from(guest.memory);
      const report = await comes(await parked(guest, all), expected, {
        base: { images: { memory: image() } },
      });
      const whole = Math.min(PAGES, Math.floor(lengthBytes / 4096)) - ZEROS;
      expect(report).toMatchObject({ pagesFromBase: whole, baseProblem: null });
    }
  });

  test('that is rewritten in the middle of it', async () => {
    const all = await servers(2);
    const guest = new PlainGuest();
    const other = new PlainGuest((n) => Math.imul(n, 40503));
    writeFileSync(image(), guest.memory);
    const expected = Uint8Array.from(guest.memory);
    const ticket = await parked(guest, all);
    let over = false;
    const rewriting = (async () => {
      for (let turn = 0; !over; turn++) {
        writeFileSync(image(), turn % 2 === 0 ? other.memory : guest.memory);
        if (turn % 3 === 0) truncateSync(image(), turn % LENGTH);
        await new Promise((resolve) => setImmediate(resolve));
      }
    })();
    await comes(ticket, expected, { base: { images: { memory: image() } } });
    over = true;
    await rewriting;
  });

  test('that is not there: the base is lost, not the guest', async () => {
    const all = await servers(1);
    const guest = new PlainGuest();
    const expected = Uint8Array.from(guest.memory);
    const report = await comes(await parked(guest, all), expected, {
      base: { images: { memory: image() } },
    });
    expect(report).toMatchObject({ pagesFromBase: 0, pagesGathered: CONTENT });
    expect(report.baseProblem).toContain(image());
  });
});

test('whose base it is decides its lineage, unless anybody may have it', async () => {
  const all = await servers(1);
  const former = new PlainGuest();
  await saveBase(former, kept());
  const guest = new PlainGuest();
  const expected = Uint8Array.from(guest.memory);
  const not = await comes(await parked(guest, all), expected, { base: { directory } });
  expect(not).toMatchObject({ pagesFromBase: 0 });
  expect(not.baseProblem).toContain('no base');
  const again = new PlainGuest();
  const any = await comes(await parked(again, all), expected, { base: { directory, anySource: true } });
  expect(any).toMatchObject({ pagesFromBase: CONTENT, baseProblem: null });
});

test('what `accept` gives comes first, as it gives it to `listen`', async () => {
  const all = await servers(1);
  const guest = new PlainGuest();
  await saveBase(guest, kept());
  const expected = Uint8Array.from(guest.memory);
  const accept = async (offer: GuestOffer): Promise<ArrivingGuest> => {
    const region = Region.allocate({ lengthBytes: LENGTH });
    const files = await readBase(directory, offer);
    return {
      regions: [region],
      bases: files?.bases ?? [],
      prepare: async () => {},
      resume: () => {},
      abandon: () => region.close(),
    };
  };
  const base = { images: { memory: '/nowhere' } };
  const report = await comes(await parked(guest, all), expected, { accept, base });
  expect(report).toMatchObject({ pagesFromBase: CONTENT, pagesGathered: 0, baseProblem: null });
});

test('a server that goes: its replicas have what it had', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  await saveBase(guest, kept());
  guest.change(2);
  const expected = Uint8Array.from(guest.memory);
  const ticket = await parked(guest, all, { replicas: 2 });
  const unparked = await unpark(ticket, {
    ...{ secret: SECRET, base: { directory }, gatherLimit: 2 * MIB, recoverTimeoutMs: 1000 },
  });
  open.push(unparked);
  regions.push(...unparked.regions);
  await new Promise((resolve) => setTimeout(resolve, 300));
  await all[1]?.close();
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, expected)).toBe(0);
});

describe('what makes no sense is refused before anything is claimed', () => {
  test.each([
    {},
    { directory: '' },
    { directory: '/tmp', images: { memory: '/tmp/x' } },
    { images: {} },
    { images: { memory: '' } },
    { images: { memory: { path: '/tmp/x', offsetBytes: -1 } } },
    { images: { memory: { path: '/tmp/x', offsetBytes: 1.5 } } },
    { images: { elsewhere: '/tmp/x' } },
    { parked: { image: 'ab'.repeat(16), secret: 'ab'.repeat(32), home: '127.0.0.1:1' } },
    'somewhere',
  ])('%j', async (base) => {
    const all = await servers(1);
    const guest = new PlainGuest();
    const expected = Uint8Array.from(guest.memory);
    const ticket = await parked(guest, all);
    await expect(unpark(ticket, { secret: SECRET, base } as UnparkOptions)).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
    expect(all[0]?.status().held).toMatchObject([{ phase: 'parked', epoch: 0 }]);
    await comes(ticket, expected);
  });
});
