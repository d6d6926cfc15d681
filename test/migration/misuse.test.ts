/** What a caller gets wrong, or its guest's own code: said clearly and at once, and nobody's guest is lost or doubled by it. */
import { tmpdir } from 'node:os';
import { afterEach, describe, expect, test } from 'vitest';
import type { ArrivingGuest, Guest } from '../../src/guest.js';
import { type Arrival, type Listening, listen, migrate, park, Region, saveBase } from '../../src/index.js';
import { deferred } from '../../src/protocol/deferred.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const SECRET = 'a secret that only this test knows';
const LENGTH = 4 * 2 ** 20;

const open: { [Symbol.asyncDispose](): PromiseLike<void> }[] = [];
const regions: Region[] = [];
const warnings: string[] = [];
const onWarning = (warning: Error & { code?: string }) => warnings.push(warning.code ?? warning.name);
process.on('warning', onWarning);
afterEach(async () => {
  await closeProxies();
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]();
  for (const region of regions.splice(0)) region.close();
  warnings.length = 0;
});

function made(fill = 0): Region {
  const region = Region.allocate({ lengthBytes: LENGTH });
  regions.push(region);
  (region.views[0] as Uint8Array).fill(fill);
  return region;
}

function guestOf(name: string, more: Partial<Guest> = {}): Guest & { steps: string[] } {
  const steps: string[] = [];
  const step = (what: string) => void steps.push(what);
  return {
    name,
    module: null,
    regions: [{ name: 'memory', region: made(name.charCodeAt(0)) }],
    steps,
    pause: async () => {
      step('pause');
      return Uint8Array.of(1);
    },
    unpause: () => step('unpause'),
    ...more,
  };
}

function arriving(region: Region, more: Partial<ArrivingGuest> = {}): ArrivingGuest {
  return { regions: [region], prepare: async () => {}, resume: () => {}, abandon: () => {}, ...more };
}

async function listening(accept: (name: string) => ArrivingGuest): Promise<Listening> {
  const listener = await listen({ secret: SECRET, port: 0, accept: ({ name }) => accept(name) });
  open.push(listener);
  return listener;
}

async function arrivalOf(listener: Listening): Promise<Arrival> {
  for await (const arrival of listener) return arrival;
  throw new Error('none came');
}

const to = ({ host, port }: Listening) => ({ to: { host, port }, secret: SECRET });

describe('what is no guest is refused before anything begins', () => {
  const closed = () => {
    const region = Region.allocate({ lengthBytes: LENGTH });
    region.close();
    return region;
  };
  test.each([
    ['no object', () => 7, 'INVALID_ARGUMENT'],
    ['no pause()', () => ({ ...guestOf('g'), pause: undefined }), 'INVALID_ARGUMENT'],
    ['no name', () => ({ ...guestOf('g'), name: undefined }), 'INVALID_ARGUMENT'],
    ['no regions', () => ({ ...guestOf('g'), regions: [] }), 'INVALID_ARGUMENT'],
    ['no region in a region', () => ({ ...guestOf('g'), regions: [{ name: 'a' }] }), 'INVALID_ARGUMENT'],
    ['null for one', () => ({ ...guestOf('g'), regions: [null] }), 'INVALID_ARGUMENT'],
    [
      'bytes',
      () => ({ ...guestOf('g'), regions: [{ name: 'a', region: new Uint8Array(8) }] }),
      'INVALID_ARGUMENT',
    ],
    [
      'a name twice',
      () => ({ ...guestOf('g'), regions: [...guestOf('a').regions, ...guestOf('b').regions] }),
      'INVALID_ARGUMENT',
    ],
    [
      'a closed region',
      () => ({ ...guestOf('g'), regions: [{ name: 'a', region: closed() }] }),
      'REGION_CLOSED',
    ],
  ])('%s', async (_, make, code) => {
    const guest = make() as unknown as Guest;
    const refused = (act: () => unknown) => {
      try {
        act();
      } catch (error) {
        return (error as { code: unknown }).code;
      }
      return null;
    };
    expect(refused(() => migrate(guest, { to: '127.0.0.1:9', secret: SECRET }))).toBe(code);
    await expect(park(guest, { via: ['127.0.0.1:9'], secret: SECRET })).rejects.toMatchObject({ code });
  });
});

test('two guests never arrive in one region', async () => {
  const region = made();
  const first = deferred<void>();
  const listener = await listening((name) =>
    arriving(region, { prepare: () => (name === 'a' ? first.promise : Promise.resolve()) }),
  );
  const a = migrate(guestOf('a'), { ...to(listener), mode: 'stop-and-copy' });
  open.push(a);
  const arrival = await arrivalOf(listener);
  await arrival.executionState;
  const second = guestOf('b');
  const b = migrate(second, { ...to(listener), mode: 'stop-and-copy' });
  open.push(b);
  await expect(b.done).rejects.toMatchObject({ code: 'REGION_BUSY' });
  expect(second.steps).not.toContain('pause');
  first.resolve();
  expect(await a.done).toMatchObject({ verified: true });
  expect((region.views[0] as Uint8Array).every((byte) => byte === 'a'.charCodeAt(0))).toBe(true);
});

test('a guest that has left is not moved again: there would be two of it', async () => {
  const listener = await listening(() => arriving(made()));
  const guest = guestOf('g');
  const migration = migrate(guest, to(listener));
  open.push(migration);
  await migration.done;
  expect(() => migrate(guest, to(listener))).toThrow(expect.objectContaining({ code: 'GUEST_BUSY' }));
  await expect(park(guest, { via: ['127.0.0.1:9'], secret: SECRET })).rejects.toMatchObject({
    code: 'GUEST_BUSY',
  });
  await expect(saveBase(guest, { directory: tmpdir(), maxBytes: 2 ** 30 })).rejects.toMatchObject({
    code: 'GUEST_BUSY',
  });
  // Its memory says so, whatever object stands for it.
  expect(() => migrate({ ...guest }, to(listener))).toThrow(expect.objectContaining({ code: 'GUEST_BUSY' }));
  expect(guest.steps).toEqual(['pause']);
});

test('a guest that comes back into the memory that it had left may leave again, and so may another one from there', async () => {
  const home = made();
  const there = made();
  const guest = (name: string, region: Region) => ({
    ...guestOf(name),
    regions: [{ name: 'memory', region }],
  });
  const away = await listening(() => arriving(there));
  const back = await listening(() => arriving(home));
  for (const name of ['one', 'other']) {
    (home.views[0] as Uint8Array).fill(name.charCodeAt(0));
    for (const [region, listener] of [
      [home, away],
      [there, back],
      [home, away],
    ] as const) {
      const migration = migrate(guest(name, region), to(listener));
      open.push(migration);
      const arrival = await arrivalOf(listener);
      expect(await migration.done).toMatchObject({ verified: true });
      await arrival[Symbol.asyncDispose]();
    }
  }
});

describe('what accept() gives is looked at before the first page', () => {
  const hooks = { prepare: async () => {}, resume: () => {}, abandon: () => {} };
  test.each<[string, () => unknown, { code: string; message?: unknown }]>([
    ['nothing', () => undefined, { code: 'PREPARE_FAILED' }],
    ['no resume()', () => arriving(made(), { resume: undefined as never }), { code: 'PREPARE_FAILED' }],
    ['a region too many', () => ({ ...hooks, regions: [made(), made()] }), { code: 'PREPARE_FAILED' }],
    ['a shorter region', () => arriving(Region.allocate({ lengthBytes: 4096 })), { code: 'NO_MEMORY' }],
    [
      'a longer region',
      () => arriving(Region.allocate({ lengthBytes: 2 * LENGTH })),
      { code: 'PREPARE_FAILED' },
    ],
  ])('%s', async (_, make, refused) => {
    const abandoned: unknown[] = [];
    const listener = await listening(() => {
      const guest = make() as ArrivingGuest;
      return guest && { ...guest, abandon: () => void abandoned.push(guest) };
    });
    const guest = guestOf('g');
    const migration = migrate(guest, to(listener));
    open.push(migration);
    await expect(migration.done).rejects.toMatchObject(refused);
    expect(guest.steps).toEqual([]);
    expect(abandoned).toHaveLength(make() === undefined ? 0 : 1);
  });

  test('one that never ends holds up its source no longer than it may, and its seat for as long as it goes on', async () => {
    const late = deferred<ArrivingGuest>();
    let asked = 0;
    const listener = await listen({
      secret: SECRET,
      acceptTimeoutMs: 200,
      maxMigrations: 1,
      accept: () => (asked++ === 0 ? late.promise : arriving(made())),
    });
    open.push(listener);
    const guest = guestOf('g');
    const move = () => {
      const migration = migrate(guest, to(listener));
      open.push(migration);
      return migration.done;
    };
    await expect(move()).rejects.toMatchObject({ code: 'PREPARE_TIMEOUT' });
    await expect(move()).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    const abandoned = deferred<void>();
    late.resolve(arriving(made(), { abandon: () => abandoned.resolve() }));
    await abandoned.promise;
    expect(await move()).toMatchObject({ verified: true });
    expect(guest.steps).toEqual(['pause']);
  });
});

describe('a guest in doubt', () => {
  const inDoubt = async () => {
    const listener = await listening(() => arriving(made()));
    const proxy = await TcpProxy.start(listener.port);
    proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'cut');
    const guest = guestOf('g');
    const migration = migrate(guest, {
      to: { host: '127.0.0.1', port: proxy.port },
      secret: SECRET,
      mode: 'stop-and-copy',
      inDoubtTimeoutMs: 700,
    });
    await expect(migration.done).rejects.toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    return { migration, guest, listener };
  };

  test.each([
    {},
    { fence: 'dead' },
    { fence: undefined },
    { fence: true },
    { askAgain: false },
    { fence: 'destination-dead', askAgain: true },
    null,
    undefined,
  ])('is not let run again for %j', async (proof) => {
    const { migration, guest } = await inDoubt();
    await expect(migration.resolve(proof as never)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    expect(guest.steps).toEqual(['pause']);
    await migration[Symbol.asyncDispose]();
  });

  test('is not moved elsewhere, though its migration was let go of', async () => {
    const { migration, guest, listener } = await inDoubt();
    await migration[Symbol.asyncDispose]();
    expect(() => migrate(guest, to(listener))).toThrow(expect.objectContaining({ code: 'GUEST_BUSY' }));
  });

  test('is here again when its destination is dead, and moves', async () => {
    const { migration, guest, listener } = await inDoubt();
    expect(await migration.resolve({ fence: 'destination-dead' })).toBe('source');
    expect(guest.steps).toEqual(['pause', 'unpause']);
    const again = migrate(guest, to(listener));
    open.push(again);
    await again.done;
  });
});

describe("the guest's own hooks after the commit", () => {
  test('may throw', async () => {
    const listener = await listening(() => arriving(made()));
    const fails = () => {
      throw new Error('not today');
    };
    const migration = migrate(guestOf('g', { departed: fails, release: fails }), to(listener));
    open.push(migration);
    expect(await migration.done).toMatchObject({ state: 'completed', verified: true });
    await expect.poll(() => warnings).toContain('MEMFERRY_RELEASE_FAILED');
    expect(warnings).toContain('MEMFERRY_DEPARTED_FAILED');
  });

  test('hold up no page when they do not end', async () => {
    const listener = await listening(() => arriving(made()));
    const migration = migrate(guestOf('g', { departed: () => new Promise(() => {}) }), {
      ...to(listener),
      mode: 'post-copy',
    });
    open.push(migration);
    const arrival = await arrivalOf(listener);
    await arrival.resumed;
    const since = performance.now();
    await arrival.restHere;
    expect(performance.now() - since).toBeLessThan(8_000);
    expect(await migration.done).toMatchObject({ state: 'completed' });
  });

  test('resume() may be asynchronous, and fail: the report says so', async () => {
    const resume = (() => Promise.reject(new Error('it does not start'))) as () => void;
    const listener = await listening(() => arriving(made(), { resume }));
    const migration = migrate(guestOf('g'), to(listener));
    open.push(migration);
    const arrival = await arrivalOf(listener);
    expect(await arrival.complete).toMatchObject({ notRunning: 'it does not start' });
    await migration.done;
  });
});
