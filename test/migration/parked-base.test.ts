/**
 * A parked guest as the base of one that arrives: what is equal does not come from the source, every byte is right all
 * the same, and the parked guest stays what it is: parked, whole, and somebody's to claim.
 */
import { afterEach, describe, expect, test } from 'vitest';
import type { Guest } from '../../src/guest.js';
import {
  type Arrival,
  type Listening,
  listen,
  migrate,
  type ParkTicket,
  park,
  Region,
  type Staging,
  stage,
  unpark,
} from '../../src/index.js';
import { inherit } from '../../src/lineage.js';

const SECRET = 'a secret that only this test knows';
const MIB = 2 ** 20;
const LENGTH = 8 * MIB;
const PAGES = LENGTH / 4096;

const open: { [Symbol.asyncDispose](): PromiseLike<void> }[] = [];
const regions: Region[] = [];
afterEach(async () => {
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]();
  for (const region of regions.splice(0)) region.close();
});

async function servers(count: number, memoryBytes = 64 * MIB): Promise<Staging[]> {
  const all = await Promise.all(
    Array.from({ length: count }, (_, at) => stage({ secret: SECRET, memoryBytes, name: `I${at + 1}` })),
  );
  open.push(...all);
  return all;
}
const via = (all: readonly Staging[]) => all.map(({ port }) => `127.0.0.1:${port}`);

class PlainGuest implements Guest {
  readonly name: string;
  readonly module = null;
  readonly regions: Guest['regions'];
  readonly memory: Uint8Array;

  constructor(lengthBytes = LENGTH, name = 'plain') {
    this.name = name;
    const region = Region.allocate({ lengthBytes });
    regions.push(region);
    this.regions = [{ name: 'memory', region }];
    const [view] = region.views as [Uint8Array];
    const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
    for (let word = 0; word < words.length; word++) words[word] = Math.imul(word, 2654435761);
    view.fill(0, 40 * 4096, 60 * 4096);
    this.memory = view;
  }
  /** Something of every n-th page. */
  change(every: number): this {
    for (let at = 17; at < this.memory.length; at += every * 4096) this.memory[at] = 0x5a;
    return this;
  }
  async pause(): Promise<Uint8Array> {
    return Uint8Array.of(1, 2, 3);
  }
  unpause(): void {}
  release(): void {}
}

/** A parked guest, as `PlainGuest` makes it. So slowly that each server has a part, however late its thread begins. */
async function parked(
  all: readonly Staging[],
  guest = new PlainGuest(),
  replicas: 1 | 2 = 1,
): Promise<ParkTicket> {
  const { ticket } = await park(guest, { secret: SECRET, via: via(all), replicas, bandwidth: 32 * MIB });
  return ticket;
}

async function listening(options: object): Promise<Listening> {
  const made = await listen({ secret: SECRET, ...options });
  open.push(made);
  return made;
}

async function moves(guest: PlainGuest, to: Listening, options: object = {}) {
  const expected = Uint8Array.from(guest.memory);
  const migration = migrate(guest, {
    secret: SECRET,
    to: { host: '127.0.0.1', port: to.port },
    base: 'always',
    baseTimeoutMs: 20_000,
    ...options,
  });
  open.push(migration);
  const { value: arrival } = (await to[Symbol.asyncIterator]().next()) as { value: Arrival };
  regions.push(...arrival.regions);
  const report = await migration.done;
  const arrived = await arrival.complete;
  expect(report).toMatchObject({ state: 'completed', verified: true });
  expect(Buffer.compare(arrival.regions[0]?.views[0] as Uint8Array, expected)).toBe(0);
  return { report, arrived };
}

/** As its own owner left it, and to be had once. */
async function expectParkedStill(all: readonly Staging[], ticket: ParkTicket): Promise<void> {
  expect(all[0]?.status().held).toMatchObject([{ phase: 'parked', kind: 'park', epoch: 0 }]);
  const unparked = await unpark(ticket, { secret: SECRET });
  open.push(unparked);
  regions.push(...unparked.regions);
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, new PlainGuest().memory)).toBe(0);
  for (const server of all) expect(server.status().held).toEqual([]);
}

describe.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid', 'scatter'] as const)('%s', (mode) => {
  test('what the parked guest has does not come', async () => {
    const all = await servers(2);
    const ticket = await parked(all, new PlainGuest(), 2);
    const to = await listening({ base: { parked: ticket, anySource: true } });
    const scatter = mode === 'scatter' ? { via: via(all) } : {};
    const { report } = await moves(new PlainGuest().change(5), to, { mode, ...scatter });
    expect(report.base).toMatchObject({ used: true, problem: null });
    expect(report.base?.pagesSame).toBeGreaterThan(0.75 * PAGES);
    expect(report.base?.pagesSame).toBeLessThan(0.82 * PAGES);
    expect(report.bytesOnWire).toBeLessThan(0.3 * LENGTH);
    await expectParkedStill(all, ticket);
  });
});

test('the same guest by its lineage; another one starts from nothing', async () => {
  const all = await servers(1);
  const ticket = await parked(all);
  const to = await listening({ base: { parked: ticket } });
  const kin = new PlainGuest();
  inherit([kin.regions[0]?.region as Region], Buffer.from(ticket.guest?.lineage as string, 'hex'));
  expect((await moves(kin, to)).report.base).toMatchObject({ used: true });
  expect((await moves(new PlainGuest(), to)).report.base).toBeNull();
  const any = await listening({ base: { parked: ticket, anySource: true } });
  expect((await moves(new PlainGuest(LENGTH, 'other'), any)).report.base).toBeNull();
  // A ticket that does not say whose guest it is is nobody's base.
  const { guest: _, ...bare } = ticket;
  const nobody = await listening({ base: { parked: bare, anySource: true } });
  expect((await moves(new PlainGuest(), nobody)).report.base).toBeNull();
  await expectParkedStill(all, ticket);
});

test('an unparked guest keeps its lineage', async () => {
  const all = await servers(1);
  const first = await parked(all);
  const unparked = await unpark(first, { secret: SECRET });
  open.push(unparked);
  regions.push(...unparked.regions);
  await unparked.complete;
  const again = new PlainGuest();
  Object.assign(again, { regions: [{ name: 'memory', region: unparked.regions[0] }] });
  const second = await parked(all, again);
  expect(second.guest).toEqual(first.guest);
  expect(second.image).not.toBe(first.image);
});

test('regions that are longer and shorter than the parked ones', async () => {
  const all = await servers(1);
  const ticket = await parked(all);
  const to = await listening({ base: { parked: ticket, anySource: true } });
  const { report } = await moves(new PlainGuest(LENGTH + 2 * MIB), to);
  expect(report.base?.pagesSame).toBeGreaterThan(0.9 * PAGES);
  // An image larger than the guest is not read: it could be of any size.
  const less = await moves(new PlainGuest(LENGTH / 2), to);
  expect(less.report.base).toMatchObject({ used: false, pagesSame: 0 });
  expect(less.report.base?.problem).toContain('may be read');
  await expectParkedStill(all, ticket);
});

test('without room for its memory a second time there is no base', async () => {
  const all = await servers(1);
  const ticket = await parked(all);
  const to = await listening({ base: { parked: ticket, anySource: true }, maxBytes: 1.5 * LENGTH });
  expect((await moves(new PlainGuest(), to)).report.base).toBeNull();
  const enough = await listening({ base: { parked: ticket, anySource: true }, maxBytes: 2 * LENGTH });
  expect((await moves(new PlainGuest(), enough)).report.base).toMatchObject({ used: true });
});

describe('what cannot be read costs the base, not the migration', () => {
  const broken = async (ticket: ParkTicket, problem: RegExp): Promise<void> => {
    const to = await listening({ base: { parked: ticket, anySource: true }, recoverTimeoutMs: 500 });
    const { report } = await moves(new PlainGuest(), to);
    expect(report.base).toMatchObject({ used: false, pagesSame: 0 });
    expect(report.base?.problem).toMatch(problem);
  };

  test('a wrong secret', async () => {
    const all = await servers(1);
    const ticket = await parked(all);
    await broken({ ...ticket, secret: 'ab'.repeat(32) }, /secret|proof|auth/i);
    await expectParkedStill(all, ticket);
  });

  test('an image that is gone', async () => {
    const all = await servers(1);
    const ticket = await parked(all);
    await broken({ ...ticket, image: 'cd'.repeat(16) }, /image|gone|lost/i);
    await expectParkedStill(all, ticket);
  });

  test('a home server that is gone', async () => {
    const all = await servers(1);
    const ticket = await parked(all);
    await all[0]?.close();
    await broken(ticket, /./);
  });

  test('a server that is gone with a part of it', async () => {
    const all = await servers(2);
    const ticket = await parked(all);
    expect(all[1]?.status().held[0]?.pagesHeld).toBeGreaterThan(0);
    await all[1]?.close();
    await broken(ticket, /not whole/);
    expect(all[0]?.status().held).toMatchObject([{ phase: 'parked' }]);
  });

  test('one that goes in the middle of it', async () => {
    const all = await servers(2);
    const ticket = await parked(all);
    const options = { recoverTimeoutMs: 500, gatherLimit: 2 * MIB };
    const to = await listening({ base: { parked: ticket, anySource: true }, ...options });
    const part = () => all[1]?.status().held[0] ?? { pagesHeld: 0, bytesOut: 0 };
    const { pagesHeld, bytesOut } = part();
    expect(pagesHeld).toBeGreaterThan(0);
    const moving = moves(new PlainGuest(), to);
    const aQuarter = (pagesHeld * 4096) / 4;
    await expect.poll(() => part().bytesOut, { timeout: 10_000 }).toBeGreaterThan(bytesOut + aQuarter);
    await all[1]?.close();
    expect((await moving).report.base).toMatchObject({ used: false, pagesSame: 0 });
  });

  test('a source that does not wait for it', async () => {
    const all = await servers(1);
    const ticket = await parked(all);
    const to = await listening({ base: { parked: ticket, anySource: true }, gatherLimit: MIB });
    const { report } = await moves(new PlainGuest(), to, { baseTimeoutMs: 300 });
    expect(report.base).toMatchObject({ used: false, reason: 'not-ready' });
    await expectParkedStill(all, ticket);
  });
});

test('what the guest brings itself comes first', async () => {
  const all = await servers(1);
  const ticket = await parked(all);
  const own = new PlainGuest();
  const to = await listening({
    base: { parked: { ...ticket, secret: 'ab'.repeat(32) }, anySource: true },
    accept: () => {
      const region = Region.allocate({ lengthBytes: LENGTH });
      return {
        regions: [region],
        bases: [{ region: own.regions[0]?.region }],
        prepare: async () => {},
        resume: () => {},
        abandon: () => region.close(),
      };
    },
  });
  expect((await moves(new PlainGuest(), to)).report.base).toMatchObject({ used: true, problem: null });
});

test('of two arrivals at once one reads it, and the other does without', async () => {
  const all = await servers(2);
  const ticket = await parked(all);
  const [one, two] = await Promise.all([
    listening({ base: { parked: ticket, anySource: true } }),
    listening({ base: { parked: ticket, anySource: true } }),
  ]);
  const both = await Promise.all([
    moves(new PlainGuest().change(3), one),
    moves(new PlainGuest().change(7), two),
  ]);
  const bases = both.map(({ report }) => report.base);
  expect(bases.some((base) => base?.used && base.problem === null)).toBe(true);
  // Unless the first had read it by then.
  for (const base of bases) if (!base?.used) expect(base?.problem).toMatch(/read for another arrival/);
  await expectParkedStill(all, ticket);
});

test.each([
  {},
  { parked: {} },
  { parked: { image: 'xx', secret: 'ab'.repeat(32), home: '127.0.0.1:1' } },
  { parked: { image: 'ab'.repeat(16), secret: 'ab'.repeat(32), home: 'nowhere' } },
])('what is no ticket is refused at once: %j', async (base) => {
  await expect(listen({ secret: SECRET, base } as object)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
  });
});
