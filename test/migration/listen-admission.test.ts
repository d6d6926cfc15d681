/** What a listener lets in: bytes that are booked before they are taken, and guests that nobody has asked for. */
import { afterEach, describe, expect, test } from 'vitest';
import type { ArrivingGuest } from '../../lib/guest.js';
import { type Listening, type ListenOptions, listen, migrate, Region } from '../../lib/index.js';
import { SECRET as secret } from '../support/scenario.js';
import { closeStrangers, Insider, offer } from '../support/stranger.js';

// No Node typings have it.
interface Memory {
  readonly buffer: ArrayBuffer;
  grow(delta: number): number;
}
const { Memory } = (
  globalThis as unknown as {
    WebAssembly: { Memory: new (d: { initial: number; maximum: number }) => Memory };
  }
).WebAssembly;

const open: (() => unknown)[] = [];
afterEach(async () => {
  closeStrangers();
  for (const close of open.splice(0).reverse()) await close();
});

async function listening(options: ListenOptions): Promise<Listening> {
  const listener = await listen({ port: 0, secret, ...options });
  open.push(() => listener.close());
  return listener;
}

const id = (digit: number) => digit.toString(16).padStart(32, '0');
/** Four WebAssembly pages, and one of them to begin with. */
const growing = (digit: number) => offer(id(digit), { capacityBytes: 4 * 65536 });

test('what a guest grows by is asked for first, and counts', async () => {
  const grown: number[] = [];
  const accept = (): ArrivingGuest => {
    const memory = new Memory({ initial: 1, maximum: 4 });
    const region = Region.adopt(memory);
    open.push(() => region.close());
    return {
      regions: [region],
      prepare: async () => {},
      resume: () => {},
      abandon: () => {},
      grow: async (_index, lengthBytes) => {
        grown.push(lengthBytes);
        memory.grow((lengthBytes - region.lengthBytes) / 65536);
      },
    };
  };
  const { port } = await listening({ accept, maxBytes: 3 * 65536 });
  const one = (await Insider.connect(port)).say(growing(1));
  await one.hears('accepted');
  one.say({ type: 'grow', region: 0, lengthBytes: 3 * 65536 });
  await one.hears('grown');
  const other = (await Insider.connect(port)).say(growing(2));
  await other.hears('NO_MEMORY');
  one.say({ type: 'grow', region: 0, lengthBytes: 4 * 65536 });
  await one.hears('NO_MEMORY');
  expect(grown).toEqual([3 * 65536]);
  // With the guest that failed all of it is free again.
  await one.untilEnded();
  await (await Insider.connect(port)).say(growing(3)).hears('accepted');
});

test('an offer that comes again and again while it is accepted is declined each time', async () => {
  let accepted = 0;
  let go = () => {};
  const waiting = new Promise<void>((resolve) => {
    go = resolve;
  });
  const accept = async (): Promise<ArrivingGuest> => {
    accepted++;
    await waiting;
    const region = Region.allocate({ lengthBytes: 65536 });
    return { regions: [region], prepare: async () => {}, resume: () => {}, abandon: () => region.close() };
  };
  const { port } = await listening({ accept, maxBytes: 65536 });
  const first = (await Insider.connect(port)).say(offer(id(1)));
  for (let times = 0; times < 2; times++) {
    const again = (await Insider.connect(port)).say(offer(id(1)));
    await again.hears('a migration with this id is known already');
  }
  const other = (await Insider.connect(port)).say(offer(id(2)));
  await other.hears('NO_MEMORY');
  go();
  await first.hears('accepted');
  expect(accepted).toBe(1);
});

describe('with nobody who takes the arrivals', () => {
  const lengthBytes = 65536;
  async function send(port: number): Promise<void> {
    const region = Region.allocate({ lengthBytes });
    const guest = {
      name: 'small',
      module: null,
      regions: [{ name: 'memory', region }],
      pause: async () => Buffer.from('state'),
      unpause: () => {},
    };
    try {
      await migrate(guest, { to: `127.0.0.1:${port}`, mode: 'stop-and-copy', channels: 1, secret }).done;
    } finally {
      region.close();
    }
  }

  test('guests that have their owners come and come', async () => {
    let resumed = 0;
    const accept = (): ArrivingGuest => {
      const region = Region.allocate({ lengthBytes });
      open.push(() => region.close());
      return { regions: [region], prepare: async () => {}, resume: () => void resumed++, abandon: () => {} };
    };
    const { port } = await listening({ accept });
    for (let guests = 0; guests < 66; guests++) await send(port);
    expect(resumed).toBe(66);
  });

  test('those whose memory is in the arrival alone wait, and further ones are declined', async () => {
    const listener = await listening({});
    for (let guests = 0; guests < 64; guests++) await send(listener.port);
    await expect(send(listener.port)).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
      message: expect.stringContaining('wait to be taken'),
    });
    const { value: arrival } = await listener[Symbol.asyncIterator]().next();
    expect(arrival.state).toBe('completed');
    await send(listener.port);
  });
});
