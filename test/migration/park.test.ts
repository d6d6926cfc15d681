/** Parking: a guest leaves with no destination chosen, and one claimant, and only one, has it later. */
import { getEventListeners } from 'node:events';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, describe, expect, test } from 'vitest';
import { MemferryError } from '../../src/errors.js';
import type { ArrivingGuest, Guest, PausedGuest } from '../../src/guest.js';
import {
  type ParkTicket,
  type Staging,
  stage,
  park,
  Region,
  unpark,
  type Unparked,
} from '../../src/index.js';
import { deferred } from '../../src/protocol/deferred.js';
import { stageAttempts } from '../../src/staging/image-secret.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const SECRET = 'a secret that only this test knows';
const MIB = 2 ** 20;

const open: { [Symbol.asyncDispose](): PromiseLike<void> }[] = [];
const regions: Region[] = [];
afterEach(async () => {
  await closeProxies();
  for (const one of open.splice(0).reverse()) await one[Symbol.asyncDispose]();
  for (const region of regions.splice(0)) region.close();
});

async function servers(count: number, memoryBytes = 64 * MIB): Promise<Staging[]> {
  const all = await Promise.all(
    Array.from({ length: count }, (_, index) =>
      stage({ secret: SECRET, memoryBytes, name: `I${index + 1}` }),
    ),
  );
  open.push(...all);
  return all;
}
const via = (all: readonly Staging[]) => all.map(({ port }) => `127.0.0.1:${port}`);

class PlainGuest implements Guest {
  readonly name = 'plain';
  readonly module = null;
  readonly regions: Guest['regions'];
  runs = true;
  released = false;
  readonly content: Uint8Array;
  readonly memory: Uint8Array;

  constructor(lengthBytes = 8 * MIB) {
    const region = Region.allocate({ lengthBytes });
    regions.push(region);
    this.regions = [{ name: 'memory', region }];
    const [view] = region.views as [Uint8Array];
    const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
    for (let word = 0; word < words.length; word++) words[word] = Math.imul(word, 2654435761);
    // Some pages of zeros, and some never touched content is fine as it is.
    view.fill(0, 40 * 4096, 60 * 4096);
    this.memory = view;
    this.content = Uint8Array.from(view);
  }
  async pause(): Promise<Uint8Array | PausedGuest> {
    this.runs = false;
    return Uint8Array.of(1, 2, 3);
  }
  unpause(): void {
    this.runs = true;
  }
  release(): void {
    this.released = true;
  }
}

async function claimed(ticket: Parameters<typeof unpark>[0], options = {}): Promise<Unparked> {
  const unparked = await unpark(ticket, { secret: SECRET, ...options });
  open.push(unparked);
  regions.push(...unparked.regions);
  return unparked;
}

test.each([
  [1, 1],
  [2, 1],
  [3, 2],
] as const)(
  '%i servers, %i replicas: parked, claimed, gathered, every byte the same',
  async (count, replicas) => {
    const all = await servers(count);
    const guest = new PlainGuest();
    const report = await park(guest, { secret: SECRET, via: via(all), replicas });
    expect(guest).toMatchObject({ runs: false, released: true });
    expect(all[0]?.status().held).toMatchObject([{ phase: 'parked', kind: 'park' }]);
    // The source's memory is its owner's again.
    guest.memory.fill(0xee);

    const unparked = await claimed(report.ticket, { gatherLimit: 20e6 });
    const [region] = unparked.regions as [Region];
    const [view] = region.views as [Uint8Array];
    // On demand, long before it is all here.
    expect(
      Buffer.compare(view.subarray(7 * MIB, 7 * MIB + 4096), guest.content.subarray(7 * MIB, 7 * MIB + 4096)),
    ).toBe(0);
    expect(await unparked.complete).toMatchObject({ verified: true, heapBytes: 8 * MIB });
    expect(Buffer.compare(view, guest.content)).toBe(0);
    for (const { status } of all.map((server) => ({ status: server.status() })))
      expect(status.held).toEqual([]);
  },
);

test('a guest that somebody has let run in its pause is not parked: what was read of it is not what it is', async () => {
  const all = await servers(1);
  const guest = new PlainGuest();
  guest.pause = async () => {
    guest.runs = false;
    const stillPaused = async () => {
      throw new MemferryError('GUEST_BUSY', 'somebody else has let it run');
    };
    return { state: Uint8Array.of(1), stillPaused };
  };
  await expect(park(guest, { secret: SECRET, via: via(all) })).rejects.toMatchObject({ code: 'GUEST_BUSY' });
  expect(guest).toMatchObject({ runs: true, released: false });
  expect(all[0]?.status().held).toEqual([]);
});

test.each([1, 2] as const)(
  'guests that are parked refer to each other, and each goes alone; %i replicas',
  async (replicas) => {
    const all = await servers(2);
    const options = { secret: SECRET, via: via(all), replicas, bandwidth: 16e6 };
    const dedup = { domain: 'parked' };
    const [first, second, other] = [new PlainGuest(), new PlainGuest(), new PlainGuest()];
    // A page of the second that nobody else has.
    second.memory.fill(0xab, 100 * 4096, 101 * 4096);
    second.content.fill(0xab, 100 * 4096, 101 * 4096);
    const plain = await park(other, options);
    expect(plain.dedup).toBe(null);
    const one = await park(first, { ...options, dedup });
    const two = await park(second, { ...options, dedup });
    expect(two.dedup?.pagesDeduplicated).toBeGreaterThan(0);
    expect(two.bytesOnWire).toBeLessThan(one.bytesOnWire);
    const expectHere = async ({ ticket }: typeof one, guest: PlainGuest) => {
      guest.memory.fill(0xee);
      const unparked = await claimed(ticket);
      expect(await unparked.complete).toMatchObject({ verified: true });
      expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
    };
    // The one that brought the pages is dissolved, and takes nothing along.
    await expectHere(one, first);
    await expectHere(two, second);
    await expectHere(plain, other);
    for (const server of all) expect(server.status().held).toEqual([]);
  },
);

/** Where a server is dialled through a proxy. */
async function throughProxy(all: Staging[], at: number): Promise<{ proxy: TcpProxy; addresses: string[] }> {
  const proxy = await TcpProxy.start(all[at]?.port as number);
  return { proxy, addresses: via(all).map((to, index) => (index === at ? `127.0.0.1:${proxy.port}` : to)) };
}

test.each(['seal', 'hold'] as const)(
  'a server goes that does not hold its pages for good yet, at %s: the guest stays',
  async (name) => {
    const all = await servers(2);
    const { proxy, addresses } = await throughProxy(all, 1);
    const point = proxy.at({ on: 'control', direction: 'up', name }, () => void proxy.close());
    const guest = new PlainGuest();
    const options = { secret: SECRET, via: addresses, recoverTimeoutMs: 1500, leaseMs: 1000 };
    const parked = park(guest, options).then(
      () => 'parked',
      (error: MemferryError) => error.code,
    );
    await point.reached;
    expect(['PEER_LOST', 'CONNECT_FAILED', 'VMD_LOST']).toContain(await parked);
    expect(guest).toMatchObject({ runs: true, released: false });
    expect(Buffer.compare(guest.memory, guest.content)).toBe(0);
    await expect.poll(() => all.map((server) => server.status().held), { timeout: 15_000 }).toEqual([[], []]);
  },
);

test('READY is lost with the connection: the guest stays, and the servers let go of it', async () => {
  const all = await servers(2);
  const { proxy, addresses } = await throughProxy(all, 0);
  proxy.at({ on: 'control', direction: 'down', name: 'ready' }, () => {
    proxy.cut();
    proxy.heal();
  });
  const guest = new PlainGuest();
  await expect(park(guest, { secret: SECRET, via: addresses })).rejects.toMatchObject({ code: 'PEER_LOST' });
  expect(guest).toMatchObject({ runs: true, released: false });
  await expect.poll(() => all.map((server) => server.status().held), { timeout: 15_000 }).toEqual([[], []]);
});

describe('a home server that does not answer GRANT', () => {
  const inDoubt = async (options: Partial<Parameters<typeof park>[1]>) => {
    const all = await servers(2);
    const { proxy, addresses } = await throughProxy(all, 0);
    proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'cut');
    const guest = new PlainGuest();
    const tickets: ParkTicket[] = [];
    const parking = park(guest, {
      secret: SECRET,
      via: addresses,
      inDoubtTimeoutMs: 700,
      onTicket: (ticket) => void tickets.push(ticket),
      ...options,
    });
    parking.catch(() => {});
    return { all, proxy, guest, tickets, parking };
  };

  test('is told of, and asked until it does', async () => {
    const told = deferred<MemferryError>();
    const { all, proxy, guest, tickets, parking } = await inDoubt({ onInDoubt: told.resolve });
    expect((await told.promise).code).toBe('MIGRATION_IN_DOUBT');
    const over = parking.then(() => true);
    // It is in doubt again by then, and nobody is told a second time.
    expect(await Promise.race([over, sleep(1500, false)])).toBe(false);
    expect(guest).toMatchObject({ runs: false, released: false });
    proxy.heal();
    expect((await parking).ticket).toEqual(tickets[0]);
    expect(guest).toMatchObject({ runs: false, released: true });
    const home = { ...(tickets[0] as ParkTicket), home: via(all)[0] as string };
    expect(await (await claimed(home)).complete).toMatchObject({ verified: true });
  });

  test('is asked until the caller gives up, and the guest never runs here again', async () => {
    const told = deferred<MemferryError>();
    const given = new AbortController();
    const { all, guest, tickets, parking } = await inDoubt({
      onInDoubt: (error) => {
        told.resolve(error);
        throw new Error('which ends nothing');
      },
      signal: given.signal,
    });
    await told.promise;
    given.abort();
    await expect(parking).rejects.toBe(await told.promise);
    expect(guest).toMatchObject({ runs: false, released: false });
    expect(getEventListeners(given.signal, 'abort')).toEqual([]);
    // It has it.
    const home = { ...(tickets[0] as ParkTicket), home: via(all)[0] as string };
    expect(await (await claimed(home)).complete).toMatchObject({ verified: true });
  });

  test('ends the park where nobody wants to know', async () => {
    const { guest, parking } = await inDoubt({});
    await expect(parking).rejects.toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    expect(guest).toMatchObject({ runs: false, released: false });
  });
});

test('a server is asked, and has its image made, over one connection; who is not needed is let go of', async () => {
  const all = await servers(2);
  const { proxy, addresses } = await throughProxy(all, 1);
  proxy.record();
  await park(new PlainGuest(), { secret: SECRET, via: addresses });
  expect(proxy.recorded().filter(({ role }) => role === 'control')).toHaveLength(1);
  await expect.poll(() => proxy.connections('control')).toBe(0);

  const small = await servers(1, 16 * MIB);
  const beside = await throughProxy(small, 0);
  const parking = park(new PlainGuest(32 * MIB), { secret: SECRET, via: beside.addresses });
  await expect(parking).rejects.toMatchObject({ code: 'VMD_CAPACITY' });
  await expect.poll(() => beside.proxy.connections('control')).toBe(0);
});

describe('a server is away when the guest is claimed', () => {
  const parkedThrough = async (replicas: 1 | 2) => {
    const all = await servers(2);
    const { proxy, addresses } = await throughProxy(all, 1);
    const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: addresses, replicas });
    await expect.poll(() => proxy.connections()).toBe(0);
    proxy.cut();
    return { all, proxy, ticket };
  };

  test('and has pages of which there is no other copy: it is waited for', async () => {
    const { all, proxy, ticket } = await parkedThrough(1);
    const claiming = claimed(ticket);
    await sleep(1000);
    expect(all[0]?.status().held).toMatchObject([{ phase: 'parked' }]);
    proxy.heal();
    const unparked = await claiming;
    expect(await unparked.complete).toMatchObject({ verified: true });
    for (const server of all) await expect.poll(() => server.status().held).toEqual([]);
  });

  test('and does not come back: the guest stays parked, unless that is what one wants', async () => {
    const { all, ticket } = await parkedThrough(1);
    const options = { recoverTimeoutMs: 1000 };
    await expect(claimed(ticket, options)).rejects.toMatchObject({ facts: { server: expect.any(String) } });
    expect(all.map((server) => server.status().held)).toMatchObject([
      [{ phase: 'parked' }],
      [{ phase: 'parked' }],
    ]);
    const unparked = await claimed(ticket, { ...options, withLosses: true, verify: false });
    await expect(unparked.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
  });

  test('and another has its pages: it is let go of when it is back', async () => {
    const { all, proxy, ticket } = await parkedThrough(2);
    const unparked = await claimed(ticket);
    expect(await unparked.complete).toMatchObject({ verified: true });
    expect(all.map((server) => server.status().held)).toMatchObject([[], [{ phase: 'parked' }]]);
    proxy.heal();
    await expect.poll(() => all[1]?.status().held, { timeout: 15_000 }).toEqual([]);
  });
});

test('a server that says nothing when the guest is granted does not hold it up, and hears of it later', async () => {
  const all = await servers(2);
  const { proxy, addresses } = await throughProxy(all, 1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: addresses });
  const region = Region.allocate({ lengthBytes: 8 * MIB });
  regions.push(region);
  let prepared = 0;
  const accept = (): ArrivingGuest => ({
    regions: [region],
    prepare: async () => {
      proxy.stall();
      prepared = performance.now();
    },
    resume: () => {},
    abandon: () => {},
  });
  const unparked = await claimed(ticket, { accept, gatherLimit: 1e6 });
  expect(performance.now() - prepared).toBeLessThan(6000);
  proxy.heal();
  await expect
    .poll(() => all[1]?.status().held, { timeout: 15_000 })
    .not.toMatchObject([{ phase: 'parked' }]);
  await unparked[Symbol.asyncDispose]();
});

test.each(['accept', 'prepare'] as const)('%s throws what it likes: it is told what failed', async (at) => {
  const all = await servers(1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  const thrown = new Error('not today');
  const accept = (): ArrivingGuest => {
    if (at === 'accept') throw thrown;
    const region = Region.allocate({ lengthBytes: 8 * MIB });
    regions.push(region);
    const prepare = () => Promise.reject(thrown);
    return { regions: [region], prepare, resume: () => {}, abandon: () => {} };
  };
  await expect(claimed(ticket, { accept })).rejects.toMatchObject({ code: 'PREPARE_FAILED', cause: thrown });
  expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
});

test('parking leaves nothing with the signal that could have ended it', async () => {
  const all = await servers(1);
  const { signal } = new AbortController();
  await park(new PlainGuest(), { secret: SECRET, via: via(all), signal });
  const none = park(new PlainGuest(), { secret: SECRET, via: ['127.0.0.1:9'], signal });
  await expect(none).rejects.toThrow();
  expect(getEventListeners(signal, 'abort')).toEqual([]);
});

test('a server loses its part when the guest runs: the pages of the other still come', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const region = Region.allocate({ lengthBytes: 8 * MIB });
  regions.push(region);
  const lost = new Set<number>();
  const accept = () => ({
    regions: [region],
    prepare: async () => {},
    resume: () => {},
    abandon: () => {},
    lost: (runs: { first: number; count: number }[]) => {
      for (const { first, count } of runs)
        for (let page = first; page < first + count; page++) lost.add(page);
    },
  });
  const unparked = await unpark(ticket, { secret: SECRET, accept, gatherLimit: 2e6 });
  open.push(unparked);
  all[1]?.drop(ticket.image);
  await expect(unparked.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
  await unparked.restHere;
  // What had not come fails to be read from here on.
  await unparked[Symbol.asyncDispose]();
  const [view] = region.views as [Uint8Array];
  let wrong = 0;
  for (let page = 0; page < region.pages; page++) {
    const at = [page * 4096, (page + 1) * 4096] as const;
    if (!lost.has(page) && Buffer.compare(view.subarray(...at), guest.content.subarray(...at)) !== 0) wrong++;
  }
  expect([wrong, lost.size > 0, lost.size < region.pages]).toEqual([0, true, true]);
});

test('a gather whose connections are cut more often than there are tokens in advance', {
  timeout: 60_000,
}, async () => {
  const [server] = (await servers(1)) as [Staging];
  const proxy = await TcpProxy.start(server.port);
  const guest = new PlainGuest(32 * MIB);
  const { ticket } = await park(guest, { secret: SECRET, via: [`127.0.0.1:${proxy.port}`] });
  // It dials again soon, however often it was cut.
  const unparked = await claimed(ticket, { gatherLimit: 4e6, recoverTimeoutMs: 2000 });
  const answers = () => proxy.counts.get('stage down pages') ?? 0;
  for (let cuts = 0; cuts < stageAttempts + 16; cuts++) {
    const before = answers();
    await expect.poll(answers, { timeout: 5000, interval: 5 }).toBeGreaterThan(before);
    proxy.cut();
    proxy.heal();
  }
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
});

test('two claims at once: one owner, one clear refusal', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const outcomes = await Promise.allSettled([
    claimed(ticket, { gatherLimit: 1e6 }),
    claimed(ticket, { gatherLimit: 1e6 }),
  ]);
  expect(outcomes.map(({ status }) => status).sort()).toEqual(['fulfilled', 'rejected']);
  const refused = outcomes.find((outcome) => outcome.status === 'rejected') as PromiseRejectedResult;
  expect(refused.reason).toBeInstanceOf(MemferryError);
  expect(refused.reason).toMatchObject({ code: 'VMD_REFUSED' });
});

test('what was resumed once is resumed again only by rollback', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const first = await unpark(ticket, { secret: SECRET, gatherLimit: 1e6 });
  first.complete.catch(() => {});
  await first[Symbol.asyncDispose](); // its owner dies before it has everything
  regions.push(...first.regions);
  await expect(claimed(ticket)).rejects.toMatchObject({ code: 'VMD_REFUSED' });
  const again = await claimed(ticket, { rollback: true });
  expect(await again.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(again.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
});

test('a claim whose prepare fails goes back', async () => {
  const all = await servers(1);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const accept = () => {
    const region = Region.allocate({ lengthBytes: 8 * MIB });
    regions.push(region);
    return {
      regions: [region],
      prepare: async () => {
        throw new Error('not today');
      },
      resume: () => {},
      abandon: () => {},
    };
  };
  await expect(claimed(ticket, { accept })).rejects.toThrow('not today');
  expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
});

describe('what accept() gives for a parked guest is looked at before the guest is granted', () => {
  const arriving = (...lengths: number[]) => ({
    regions: lengths.map((lengthBytes) => Region.allocate({ lengthBytes })),
    prepare: async () => {},
    resume: () => {},
    abandon: () => {},
  });
  const whole = () => arriving(8 * MIB);
  test.each<[string, unknown, object]>([
    ['a shorter region', () => arriving(4 * MIB), { code: 'NO_MEMORY' }],
    ['a longer region', () => arriving(16 * MIB), { code: 'PREPARE_FAILED' }],
    ['a region too many', () => arriving(8 * MIB, 4096), { code: 'PREPARE_FAILED' }],
    ['no resume()', () => ({ ...whole(), resume: null }), { code: 'PREPARE_FAILED' }],
    ['nothing', () => undefined, { code: 'PREPARE_FAILED', message: /no guest with regions/ }],
    ['no end', () => new Promise(() => {}), { code: 'PREPARE_TIMEOUT' }],
    ['no function', 'accept', { code: 'INVALID_ARGUMENT' }],
    ['null', null, { code: 'INVALID_ARGUMENT' }],
  ])('%s', async (_, accept, { message, ...refused }: { message?: RegExp }) => {
    const all = await servers(1);
    const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
    const wrong = claimed(ticket, { accept, acceptTimeoutMs: 300 });
    await expect(wrong).rejects.toMatchObject({
      ...refused,
      ...(message ? { message: expect.stringMatching(message) } : {}),
    });
    expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
  });

  test('its signal ends the wait for it', async () => {
    const all = await servers(1);
    const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
    const controller = new AbortController();
    const accept = () => {
      controller.abort();
      return new Promise<never>(() => {});
    };
    await expect(claimed(ticket, { accept, signal: controller.signal })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
  });
});

test('a ticket that nobody ever has kept ends the park, and the guest runs on', async () => {
  const all = await servers(1);
  const guest = new PlainGuest();
  const options = { secret: SECRET, via: via(all), prepareTimeoutMs: 500 };
  const keeping = () => new Promise<void>(() => {});
  await expect(park(guest, { ...options, onTicket: keeping })).rejects.toMatchObject({
    code: 'PREPARE_TIMEOUT',
  });
  expect(guest.runs).toBe(true);
  expect(guest.released).toBe(false);
  expect(all[0]?.status().held).toEqual([]);
});

test.each([
  ['throws', () => Promise.reject(new Error('it will not go'))],
  ['never ends', () => new Promise<void>(() => {})],
])(
  'an owner that cannot let go of the guest (abandon %s): nobody else gets it without a rollback',
  async (_, abandon) => {
    const all = await servers(2);
    const guest = new PlainGuest();
    const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
    const accept = (): ArrivingGuest => {
      const region = Region.allocate({ lengthBytes: 8 * MIB });
      regions.push(region);
      const prepare = () => Promise.reject(new Error('not today'));
      return { regions: [region], prepare, resume: () => {}, abandon };
    };
    await expect(claimed(ticket, { accept, prepareTimeoutMs: 1000 })).rejects.toMatchObject({
      code: 'MIGRATION_IN_DOUBT',
      cause: { message: 'not today' },
    });
    expect(all[0]?.status().held).toMatchObject([{ phase: 'resumed', epoch: 1 }]);
    await expect(claimed(ticket)).rejects.toMatchObject({ code: 'VMD_REFUSED' });
    // The caller has ended whatever there was.
    const again = await claimed(ticket, { rollback: true });
    expect(await again.complete).toMatchObject({ verified: true });
    expect(Buffer.compare(again.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
  },
);

test('a signal that comes when the guest runs takes nothing from it: it is gathered, and the image goes', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const controller = new AbortController();
  const unparked = await claimed(ticket, { gatherLimit: 8e6, signal: controller.signal });
  controller.abort();
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
  for (const server of all) expect(server.status().held).toEqual([]);
});

/** Its `prepare` looks at no signal. */
function acceptAndAbort(abort: () => void): { accept: () => ArrivingGuest; did: string[] } {
  const did: string[] = [];
  const accept = () => {
    const region = Region.allocate({ lengthBytes: 8 * MIB });
    regions.push(region);
    return {
      regions: [region],
      prepare: async () => abort(),
      resume: () => void did.push('resume'),
      abandon: () => void did.push('abandon'),
    };
  };
  return { accept, did };
}

test('a signal during prepare cancels, and the claim goes back at once', async () => {
  const all = await servers(1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  const controller = new AbortController();
  const { accept, did } = acceptAndAbort(() => controller.abort());
  const options = { secret: SECRET, accept, signal: controller.signal };
  await expect(unpark(ticket, options)).rejects.toMatchObject({ code: 'CANCELLED' });
  expect(did).toEqual(['abandon']);
  expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
});

test('a signal while the home server grants comes too late', async () => {
  const all = await servers(1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  const controller = new AbortController();
  // The question goes out before the next turn of the loop, and the answer comes after it.
  const { accept, did } = acceptAndAbort(() => setImmediate(() => controller.abort()));
  const unparked = await claimed(ticket, { accept, signal: controller.signal });
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(controller.signal.aborted).toBe(true);
  expect(did).toEqual(['resume']);
});

test('a prepare that takes too long is told so', async () => {
  const all = await servers(1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  let told = new AbortController().signal;
  const accept = () => {
    const region = Region.allocate({ lengthBytes: 8 * MIB });
    regions.push(region);
    return {
      regions: [region],
      prepare: (_state: Uint8Array, { signal }: { signal: AbortSignal }) => {
        told = signal;
        return new Promise<void>(() => {});
      },
      resume: () => {},
      abandon: () => {},
    };
  };
  await expect(claimed(ticket, { accept, prepareTimeoutMs: 100 })).rejects.toMatchObject({
    code: 'PREPARE_TIMEOUT',
  });
  expect(told.aborted).toBe(true);
  expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
});

/** Its `prepare` ends when `until` does. */
function acceptAndWait(until: (region: Region) => Promise<unknown>): {
  accept: () => ArrivingGuest;
  did: string[];
} {
  const did: string[] = [];
  const accept = () => {
    const region = Region.allocate({ lengthBytes: 8 * MIB });
    regions.push(region);
    return {
      regions: [region],
      prepare: async () => void (await until(region)),
      resume: () => void did.push('resume'),
      abandon: () => void did.push('abandon'),
    };
  };
  return { accept, did };
}

test('every page is here before the guest is granted: it runs all the same, and then the image goes', async () => {
  const all = await servers(2);
  const guest = new PlainGuest();
  const { ticket } = await park(guest, { secret: SECRET, via: via(all) });
  const { accept, did } = acceptAndWait(async (region) => {
    await region.native.digest(); // touches every page
    // Long enough for an image that is let go too early to be gone.
    await new Promise((resolve) => setTimeout(resolve, 200));
    for (const server of all) expect(server.status().held).toHaveLength(1);
  });
  const unparked = await claimed(ticket, { accept });
  expect(did).toEqual(['resume']);
  expect(await unparked.complete).toMatchObject({ verified: true });
  expect(Buffer.compare(unparked.regions[0]?.views[0] as Uint8Array, guest.content)).toBe(0);
  for (const server of all) expect(server.status().held).toEqual([]);
});

test('pages that are lost before the guest is granted: it is not, and stays parked', async () => {
  const all = await servers(2);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  let lost = () => {};
  const told = new Promise<void>((resolve) => {
    lost = resolve;
  });
  const { accept, did } = acceptAndWait(async () => {
    all[1]?.drop(ticket.image);
    await told;
  });
  const acceptLosing = () => ({ ...accept(), lost: () => lost() });
  await expect(claimed(ticket, { accept: acceptLosing, gatherLimit: 1e6 })).rejects.toMatchObject({
    code: 'PAGES_LOST',
  });
  expect(did).toEqual(['abandon']);
  expect(all[0]?.status().held).toMatchObject([{ phase: 'parked' }]);
});

test('servers that are too small: VMD_CAPACITY, and the guest runs on', async () => {
  const all = await servers(1, 16 * MIB);
  const guest = new PlainGuest(32 * MIB);
  await expect(park(guest, { secret: SECRET, via: via(all) })).rejects.toMatchObject({
    code: 'VMD_CAPACITY',
  });
  expect(guest.runs).toBe(true);
  expect(all[0]?.status().held).toEqual([]);
  // Its regions can move again.
  const enough = await servers(2);
  await park(guest, { secret: SECRET, via: via(enough) });
});

test('a ticket of another guest, or a wrong secret, opens nothing', async () => {
  const all = await servers(1);
  const { ticket } = await park(new PlainGuest(), { secret: SECRET, via: via(all) });
  await expect(claimed({ ...ticket, secret: 'ab'.repeat(32) })).rejects.toMatchObject({
    code: 'AUTH_FAILED',
  });
  await expect(unpark(ticket, { secret: 'another secret of some length' })).rejects.toMatchObject({
    code: 'AUTH_FAILED',
  });
  await expect(claimed({ ...ticket, image: 'cd'.repeat(16) })).rejects.toMatchObject({ code: 'VMD_LOST' });
  expect(await (await claimed(ticket)).complete).toMatchObject({ verified: true });
});
