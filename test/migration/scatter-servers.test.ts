/**
 * Which servers a guest leaves through: found by their announcements over multicast on loopback, named, or both; those
 * that are gone or full when they are asked; one that is known by two addresses; and the guests of a gang, which share
 * them. The servers are real, and every byte is compared.
 */
import { randomBytes } from 'node:crypto';
import { afterEach, describe, expect, test } from 'vitest';
import type { ArrivingGuest, Guest } from '../../src/guest.js';
import {
  type Arrival,
  type Listening,
  listen,
  type MigrateOptions,
  migrate,
  migrateGang,
  park,
  Region,
  type StageOptions,
  type Staging,
  stage,
  unpark,
} from '../../src/index.js';
import { Announcer } from '../../src/staging/announce.js';
import { StageClient } from '../../src/staging/client.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';
import { randomFrom } from '../support/random.js';

const SECRET = 'a secret that only this test knows';
const MIB = 2 ** 20;
/** Nobody else's on this machine. */
const GROUP = `239.255.77.78:${20_000 + (process.pid % 20_000)}`;

const open: { [Symbol.asyncDispose](): PromiseLike<void> }[] = [];
const regions: Region[] = [];
afterEach(async () => {
  await closeProxies();
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]();
  for (const region of regions.splice(0)) region.close();
});

function regionOf(lengthBytes: number): Region {
  const region = Region.allocate({ lengthBytes });
  regions.push(region);
  return region;
}

/** Of pages that no compression makes smaller, and that are all different. */
function guestOf(name: string, lengthMib: number): Guest & { bytes: Buffer; unpaused: number } {
  const region = regionOf(lengthMib * MIB);
  const view = region.views[0] as Uint8Array;
  const random = randomFrom(name.charCodeAt(0));
  const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
  for (let at = 0; at < words.length; at++) words[at] = random() * 2 ** 32;
  const guest = {
    name,
    module: null,
    regions: [{ name: 'memory', region }],
    bytes: Buffer.from(view),
    unpaused: 0,
    pause: async () => Uint8Array.of(1),
    unpause: () => void guest.unpaused++,
  };
  return guest;
}

async function staged(name: string, memoryMib: number, more: Partial<StageOptions> = {}): Promise<Staging> {
  const server = await stage({ secret: SECRET, name, memoryBytes: memoryMib * MIB, ...more });
  open.push(server);
  return server;
}
const announced = (name: string, memoryMib: number, more: Partial<StageOptions> = {}) =>
  staged(name, memoryMib, { announce: GROUP, ...more });

/** A server that is announced and not there (any more). */
function ghost(name: string, freeMib: number): void {
  const group = { host: GROUP.split(':')[0] as string, port: Number(GROUP.split(':')[1]) };
  const announcer = new Announcer({
    ...{ group, secret: Buffer.from(SECRET), boot: 'cd'.repeat(8) },
    ...{ host: '127.0.0.1', port: 1 },
  });
  const ticker = setInterval(() => {
    const bytes = { memoryBytes: freeMib * MIB, freeBytes: freeMib * MIB };
    announcer.announce({ name, identity: 'ef'.repeat(8), rack: null, ...bytes, bandwidth: 0, images: 0 });
  }, 200);
  open.push({
    [Symbol.asyncDispose]: async () => {
      clearInterval(ticker);
      announcer.close();
    },
  });
}

/** Takes the only image that a server of `maxImages: 1` may have. */
async function occupy({ host, port, name }: Staging): Promise<void> {
  const client = await StageClient.dial({ host, port, secret: Buffer.from(SECRET) });
  open.push(client);
  const image = randomBytes(16).toString('hex');
  await client.create(
    {
      ...{
        image,
        name: 'other',
        kind: 'migration',
        ordinal: 0,
        replicas: 1,
        pageSize: 4096,
        leaseMs: 60_000,
      },
      servers: [{ name, host, port }],
      regions: [{ name: 'memory', pages: 1, capacityPages: 1 }],
    },
    randomBytes(32),
  );
}

interface Destination {
  listener: Listening;
  /** The guest has arrived whole, and has these bytes. */
  expectWhole(guest: { name: string; bytes: Buffer }): Promise<void>;
}

/** Takes little at once by itself. */
async function destination(): Promise<Destination> {
  const came = new Map<string, Region>();
  const listener = await listen({
    ...{ secret: SECRET, port: 0, bandwidth: 2 * MIB },
    accept: ({ name, regions: offered }): ArrivingGuest => {
      const made = offered.map(({ lengthBytes }) => regionOf(lengthBytes));
      came.set(name, made[0] as Region);
      return { regions: made, prepare: async () => {}, resume: () => {}, abandon: () => {} };
    },
  });
  open.push(listener);
  const arrivals = new Map<string, Arrival>();
  void (async () => {
    for await (const arrival of listener) {
      arrivals.set(arrival.offer.name, arrival);
      arrival.complete.catch(() => {});
    }
  })().catch(() => {});
  return {
    listener,
    expectWhole: async ({ name, bytes }) => {
      expect(await arrivals.get(name)?.complete).toMatchObject({ verified: true });
      expect(bytes.equals(came.get(name)?.views[0] as Uint8Array)).toBe(true);
    },
  };
}

const optionsTo = ({ listener: { host, port } }: Destination, more: Partial<MigrateOptions> = {}) => ({
  ...({
    to: { host, port },
    secret: SECRET,
    mode: 'scatter',
    compress: 'off',
    connectTimeoutMs: 2000,
  } as const),
  ...more,
});
const addressOf = ({ host, port }: { host: string; port: number }) => `${host}:${port}`;
/** A destination dissolves its image after it has its last page. */
const expectEmpty = (...servers: Staging[]) =>
  expect.poll(() => servers.map((server) => server.status().images)).toEqual(servers.map(() => 0));

describe('servers that are heard', () => {
  test('hold a guest between them, with nobody named', async () => {
    const servers = [await announced('i', 16), await announced('j', 17)];
    const to = await destination();
    const guest = guestOf('g', 20);
    const migration = migrate(guest, optionsTo(to, { discover: GROUP }));
    open.push(migration);
    const report = await migration.done;
    expect(report.intermediaries.map(({ name, failed }) => [name, failed])).toEqual([
      ['j', null],
      ['i', null],
    ]);
    expect(report.intermediaries.reduce((sum, { pages }) => sum + pages, 0)).toBeGreaterThan(0);
    await to.expectWhole(guest);
    await expectEmpty(...servers);
  });

  test('park a guest', async () => {
    const server = await announced('i', 32);
    const guest = guestOf('g', 8);
    const { ticket, intermediaries } = await park(guest, { secret: SECRET, discover: GROUP });
    expect(ticket.home).toBe(addressOf(server));
    expect(intermediaries).toMatchObject([{ name: 'i', pages: (8 * MIB) / 4096 }]);
  });

  test('help those that are named, and one of these by another address is no second server', async () => {
    const named = await announced('i', 17);
    const heard = await announced('j', 16);
    const proxy = await TcpProxy.start(named.port);
    const to = await destination();
    const guest = guestOf('g', 20);
    const via = [`127.0.0.1:${proxy.port}`];
    const migration = migrate(guest, optionsTo(to, { via, discover: GROUP }));
    open.push(migration);
    const report = await migration.done;
    expect(report.intermediaries.map(({ name, failed }) => [name, failed])).toEqual([
      ['i', null],
      ['j', null],
    ]);
    await to.expectWhole(guest);
    await expectEmpty(named, heard);
  });

  test('and are gone, or full, are left out, and the others placed anew', async () => {
    ghost('gone', 1024);
    // The guest does not fit without the other two; of these one has the image of the attempt with 'full' by then.
    const full = await announced('full', 20, { maxImages: 1 });
    await occupy(full);
    const servers = [await announced('i', 17), await announced('j', 16)];
    const to = await destination();
    const guest = guestOf('g', 20);
    const migration = migrate(guest, optionsTo(to, { discover: GROUP }));
    open.push(migration);
    const { intermediaries } = await migration.done;
    expect(intermediaries.map(({ name }) => name)).toEqual(['i', 'j', 'gone', 'full']);
    expect(intermediaries.map(({ failed }) => failed !== null)).toEqual([false, false, true, true]);
    expect(intermediaries[3]?.failed).toContain('no more than 1 images');
    await to.expectWhole(guest);
    await expectEmpty(...servers);
    expect(full.status().images).toBe(1);
  });

  test('and are gone, all of them: the guest stays, or goes by itself where its owner says so', async () => {
    ghost('gone', 1024);
    const to = await destination();
    const guest = guestOf('g', 4);
    const migration = migrate(guest, optionsTo(to, { discover: GROUP }));
    open.push(migration);
    await expect(migration.done).rejects.toMatchObject({
      code: 'VMD_CAPACITY',
      message: expect.stringContaining('not counted: gone ('),
    });
    const direct = migrate(guest, optionsTo(to, { discover: GROUP, onCapacity: 'direct' }));
    open.push(direct);
    expect((await direct.done).intermediaries).toEqual([]);
    await to.expectWhole(guest);
  });
});

describe('a server that is named', () => {
  test('and has no room when the image is made: VMD_CAPACITY with its name, or directly', async () => {
    const servers = [await staged('full', 32, { maxImages: 1 }), await staged('i', 32)];
    await occupy(servers[0] as Staging);
    const via = servers.map(addressOf);
    const to = await destination();
    const guest = guestOf('g', 4);
    const migration = migrate(guest, optionsTo(to, { via }));
    open.push(migration);
    await expect(migration.done).rejects.toMatchObject({ code: 'VMD_CAPACITY', facts: { server: 'full' } });
    // What the other one had made is gone again.
    expect(servers.map((server) => server.status().images)).toEqual([1, 0]);
    const direct = migrate(guest, optionsTo(to, { via, onCapacity: 'direct' }));
    open.push(direct);
    expect((await direct.done).intermediaries).toEqual([]);
    await to.expectWhole(guest);
    expect(servers.map((server) => server.status().images)).toEqual([1, 0]);
  });

  test('by two addresses is named twice', async () => {
    const server = await staged('i', 32);
    const proxy = await TcpProxy.start(server.port);
    const via = [addressOf(server), `127.0.0.1:${proxy.port}`];
    const to = await destination();
    const migration = migrate(guestOf('g', 4), optionsTo(to, { via }));
    open.push(migration);
    await expect(migration.done).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('twice'),
    });
    expect(server.status().images).toBe(0);
  });
});

describe('servers that are slow', () => {
  // Each guest's share of them is 11 KiB a second: nothing is acknowledged, passed on or answered for seconds.
  test('take a dozen guests at once and give them back, and keep to their bandwidth', async () => {
    const warned: string[] = [];
    const onWarning = ({ name }: Error) => warned.push(name);
    process.on('warning', onWarning);
    const bandwidth = 128 * 1024;
    const servers = [await staged('slow', 64, { bandwidth }), await staged('slower', 64, { bandwidth })];
    const began = performance.now();
    const guests = Array.from({ length: 12 }, (_, at) => guestOf(String.fromCharCode(97 + at), 1 / 16));
    // Both go over the one link.
    const options = { via: servers.map(addressOf), secret: SECRET, replicas: 2, compress: 'off' } as const;
    const parked = await Promise.all(guests.map((guest) => park(guest, options)));
    const came = await Promise.all(
      parked.map(async ({ ticket }) => {
        const made: Region[] = [];
        await using arrived = await unpark(ticket, {
          secret: SECRET,
          accept: ({ regions: offered }): ArrivingGuest => {
            made.push(...offered.map(({ lengthBytes }) => regionOf(lengthBytes)));
            return { regions: made, prepare: async () => {}, resume: () => {}, abandon: () => {} };
          },
        });
        expect(await arrived.complete).toMatchObject({ verified: true });
        return Buffer.from(made[0]?.views[0] as Uint8Array);
      }),
    );
    expect(came.map((bytes, at) => bytes.equals(guests[at]?.bytes as Buffer))).toEqual(
      guests.map(() => true),
    );
    const seconds = (performance.now() - began) / 1e3;
    for (const { bytesIn, bytesOut } of servers.map((server) => server.status())) {
      // What may be on its way beyond it: a run for each connection of a kind.
      expect(bytesIn).toBeLessThan(bandwidth * seconds + 12 * 65_536);
      expect(bytesOut).toBeLessThan(bandwidth * seconds + 12 * 65_536);
    }
    process.off('warning', onWarning);
    expect(warned).toEqual([]);
  });
});

describe('a gang', () => {
  test('of two goes through two servers to one destination', async () => {
    const servers = [await staged('i', 32), await staged('j', 32)];
    const via = servers.map(addressOf);
    const to = await destination();
    const guests = [guestOf('a', 12), guestOf('b', 12)];
    const gang = migrateGang(guests.map((guest) => ({ guest, options: optionsTo(to, { via }) })));
    open.push(...gang.migrations);
    const evicted = await gang.evicted;
    const longest = Math.max(...evicted.guests.map(({ evictionMs }) => evictionMs));
    // From the first one's start, and they start together.
    expect(evicted.evictionMs).toBeGreaterThanOrEqual(longest);
    expect(evicted.evictionMs).toBeLessThan(longest + 1000);
    const report = await gang.done;
    expect(report.evictionMs).toBe(evicted.evictionMs);
    expect(report.totalMs).toBeGreaterThanOrEqual(Math.max(...report.guests.map(({ totalMs }) => totalMs)));
    for (const [at, guest] of guests.entries()) {
      const { intermediaries, verified } = report.guests[at] as (typeof report.guests)[number];
      expect(verified).toBe(true);
      expect(intermediaries.map(({ name, failed }) => [name, failed])).toEqual([
        ['i', null],
        ['j', null],
      ]);
      expect(intermediaries.reduce((sum, { pages }) => sum + pages, 0)).toBeGreaterThan(0);
      await to.expectWhole(guest);
    }
    await expectEmpty(...servers);
  });

  test('does not count on the same memory for each of its guests', async () => {
    const server = await staged('i', 20);
    const to = await destination();
    const guests = [guestOf('a', 12), guestOf('b', 12)];
    const options = optionsTo(to, { via: [addressOf(server)] });
    const gang = migrateGang(guests.map((guest) => ({ guest, options })));
    open.push(...gang.migrations);
    const outcomes = await Promise.allSettled(gang.migrations.map(({ done }) => done));
    const refused = outcomes.findIndex(({ status }) => status === 'rejected');
    expect(outcomes[refused]).toMatchObject({ reason: { code: 'VMD_CAPACITY' } });
    expect(outcomes.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
    await expect(gang.done).rejects.toMatchObject({
      code: 'VMD_CAPACITY',
      facts: { guest: guests[refused]?.name },
    });
    await to.expectWhole(guests[1 - refused] as (typeof guests)[number]);
    // Whoever comes after the gang finds all of it free.
    await expectEmpty(server);
    const again = migrate(guests[refused] as Guest, options);
    open.push(again);
    await again.done;
    await to.expectWhole(guests[refused] as (typeof guests)[number]);
  });
});
