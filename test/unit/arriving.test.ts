/** The parts of one arrival, each with what it needs of the others. */
import { describe, expect, it } from 'vitest';
import { DestinationCommit } from '../../src/destination/commit-driver.js';
import type { DestinationEngine } from '../../src/destination/engine.js';
import { growGuest } from '../../src/destination/grow-guest.js';
import { ArrivalOutcome } from '../../src/destination/outcome.js';
import { Preparation } from '../../src/destination/preparation.js';
import { MemferryError } from '../../src/errors.js';
import type { ArrivingGuest, GuestOffer } from '../../src/guest.js';
import type { NativeReceiver } from '../../src/native.js';

const settled = () => new Promise((resolve) => setImmediate(resolve));

describe('a region that grows on its way', () => {
  const offer = { regions: [{ name: 'heap', capacityBytes: 16384 }] } as unknown as GuestOffer;
  function growing() {
    const region = { pageSize: 4096, lengthBytes: 4096, refresh: () => region.lengthBytes };
    const grow = async (_: number, lengthBytes: number) => {
      region.lengthBytes = lengthBytes;
    };
    return { region, guest: { regions: [region], grow } as unknown as ArrivingGuest };
  }

  it('takes what it grows by', async () => {
    const { region, guest } = growing();
    const taken: number[] = [];
    const takes = (bytes: number) => taken.push(bytes);
    expect(await growGuest(guest, offer, { index: 0, lengthBytes: 12288 }, true, takes)).toBe(3);
    expect(region.lengthBytes).toBe(12288);
    // Said twice, it is there already.
    expect(await growGuest(guest, offer, { index: 0, lengthBytes: 12288 }, true, takes)).toBe(3);
    expect(taken).toEqual([8192]);
  });

  it.each([
    ['one that is not there', { index: 1, lengthBytes: 8192 }, true],
    ['too late', { index: 0, lengthBytes: 8192 }, false],
    ['to a part of a page', { index: 0, lengthBytes: 8193 }, true],
    ['beyond its capacity', { index: 0, lengthBytes: 20480 }, true],
  ])('is refused: %s', async (_, growth, receiving) => {
    const { region, guest } = growing();
    const refused = growGuest(guest, offer, growth, receiving, () => expect.unreachable());
    await expect(refused).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    expect(region.lengthBytes).toBe(4096);
  });

  it('is refused where the guest cannot, or there is no memory', async () => {
    const growth = { index: 0, lengthBytes: 8192 };
    const rigid = { ...growing().guest, grow: undefined } as unknown as ArrivingGuest;
    await expect(growGuest(rigid, offer, growth, true, () => {})).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
    });
    const { region, guest } = growing();
    const full = () => {
      throw new MemferryError('NO_MEMORY', 'full');
    };
    await expect(growGuest(guest, offer, growth, true, full)).rejects.toMatchObject({ code: 'NO_MEMORY' });
    expect(region.lengthBytes).toBe(4096);
  });
});

describe('preparing', () => {
  const order: string[] = [];
  function preparing(
    overrides: Partial<ArrivingGuest> = {},
    engine: object = {},
    gatherMs: number | null = null,
    timeoutMs = 10_000,
  ) {
    order.length = 0;
    const guest = {
      prepare: async () => void order.push('prepare'),
      ...overrides,
    } as unknown as ArrivingGuest;
    const receiver = {
      seal: () => {
        order.push('seal');
        return true;
      },
    };
    return new Preparation(
      guest,
      { receiver, ...engine } as unknown as DestinationEngine,
      timeoutMs,
      gatherMs,
    );
  }

  it('comes after the switch, where that is on its way', async () => {
    const switched = settled().then(() => void order.push('switched'));
    const preparation = preparing({}, { switched });
    preparation.stateCame(new Uint8Array(1), true);
    await preparation.run();
    expect(order).toEqual(['switched', 'seal', 'prepare']);
    expect(preparation.tookMs).toBeGreaterThan(0);
  });

  it('comes after the gathering, for as long as the source says', async () => {
    const preparation = preparing({}, { filled: async () => void order.push('filled') }, 10_000);
    preparation.stateCame(new Uint8Array(1), false);
    await preparation.run();
    expect(order).toEqual(['filled', 'seal', 'prepare']);
    const late = preparing({}, { filled: () => new Promise(() => {}) }, 20);
    late.stateCame(new Uint8Array(1), false);
    await expect(late.run()).rejects.toMatchObject({ code: 'PREPARE_TIMEOUT' });
    expect(order).toEqual([]);
  });

  it('needs the state, and every page that no pager could fetch', async () => {
    await expect(preparing().run()).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    const short = preparing({}, { receiver: { seal: () => false } });
    short.stateCame(new Uint8Array(1), false);
    await expect(short.run()).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
  });

  it('fails with what the guest throws, or with its time', async () => {
    const cause = new Error('no');
    const failing = preparing({ prepare: () => Promise.reject(cause) });
    failing.stateCame(new Uint8Array(1), false);
    await expect(failing.run()).rejects.toMatchObject({ code: 'PREPARE_FAILED', message: 'no', cause });
    const busy = new MemferryError('GUEST_BUSY', 'busy');
    const own = preparing({ prepare: () => Promise.reject(busy) });
    own.stateCame(new Uint8Array(1), false);
    await expect(own.run()).rejects.toBe(busy);
    const slow = preparing({ prepare: () => new Promise(() => {}) }, {}, null, 50);
    slow.stateCame(new Uint8Array(1), false);
    await expect(slow.run()).rejects.toMatchObject({ code: 'PREPARE_TIMEOUT' });
  });
});

describe('what becomes of an arrival', () => {
  function arrived(digests: string[], verify = true) {
    const heard: string[] = [];
    const regions = digests.map((_, index) => ({
      name: `region ${index}`,
      lengthBytes: 4096,
      closed: false,
    }));
    const outcome = new ArrivalOutcome({
      migrationId: '00'.repeat(16),
      offer: { name: 'guest', regions } as unknown as GuestOffer,
      guest: { regions } as unknown as ArrivingGuest,
      verify,
      receiver: {
        digest: async (index: number) => digests[index],
        stats: () => ({ servers: [] }),
      } as unknown as NativeReceiver,
      images: null,
      completed: () => heard.push('completed'),
      failed: (error) => heard.push(error.message),
    });
    return { outcome, heard };
  }

  it('is compared, and reported once', async () => {
    const { outcome, heard } = arrived(['a', 'b']);
    outcome.conclude(await outcome.verify(['a', 'b']));
    outcome.finish();
    expect(heard).toEqual(['completed']);
    expect(await outcome.complete).toMatchObject({ verified: true, heapBytes: 8192, notRunning: null });
  });

  it('fails where a region differs', async () => {
    const { outcome, heard } = arrived(['a', 'b']);
    outcome.conclude(await outcome.verify(['a', 'x']));
    expect(heard).toEqual(['the digests of region 1 differ']);
    expect(outcome.concluded).toBe(false);
  });

  it('is not verified by fewer digests than there are regions, nor where nobody asked for it', async () => {
    const fewer = arrived(['a', 'b']);
    fewer.outcome.conclude(await fewer.outcome.verify(['a']));
    expect(await fewer.outcome.complete).toMatchObject({ verified: false });
    const unasked = arrived(['a'], false);
    unasked.outcome.conclude(await unasked.outcome.verify(['x']));
    expect(await unasked.outcome.complete).toMatchObject({ verified: null });
  });

  it('waits for whoever runs the guest', async () => {
    const { outcome, heard } = arrived(['a']);
    let say = (_: string | null): void => {};
    outcome.notRunning = new Promise<string | null>((resolve) => {
      say = resolve;
    });
    outcome.finish();
    expect(heard).toEqual(['completed']);
    expect(outcome.concluded).toBe(true);
    say('it fell over');
    expect(await outcome.complete).toMatchObject({ notRunning: 'it fell over' });
  });
});

describe("the destination's commit", () => {
  function committing(grantMs = 60_000) {
    const heard: string[] = [];
    const commit: DestinationCommit = new DestinationCommit(
      { grant: grantMs },
      {
        prepare: () => {
          heard.push('prepare');
        },
        resume: () => heard.push('resume'),
        abandon: (error) => heard.push(`abandon ${error?.code ?? 'by the peer'}`),
        send: ({ type }) => heard.push(type),
        decided: ({ phase }) => heard.push(`decided ${phase}`),
        abandoned: ({ code }) => heard.push(`abandoned ${code}`),
      },
    );
    return { commit, heard };
  }

  it('is decided before anyone hears of it', () => {
    const { commit, heard } = committing();
    commit.message({ type: 'prepare', epoch: 0 });
    commit.prepared();
    commit.message({ type: 'grant', epoch: 0 });
    expect(heard.slice(0, 3)).toEqual(['prepare', 'ready', 'decided resumed']);
    expect(heard.indexOf('resume')).toBeGreaterThan(2);
    expect(commit.phase).toBe('resumed');
    commit.fail(new MemferryError('CANCELLED', 'too late'));
    expect(commit.phase).toBe('resumed');
    commit.stopTimers();
  });

  it('gives the owner the error itself, with its facts', () => {
    const errors: MemferryError[] = [];
    const commit = new DestinationCommit(
      { grant: 60_000 },
      {
        prepare: () => {},
        resume: () => {},
        abandon: (error) => error && errors.push(error),
        send: () => {},
        decided: () => {},
        abandoned: (error) => errors.push(error),
      },
    );
    const error = new MemferryError('NO_MEMORY', 'full', { facts: { bytes: 1 } });
    commit.fail(error);
    expect(errors).toEqual([error, error]);
  });

  it('is refused for good when no GRANT comes in time', async () => {
    const { commit, heard } = committing(20);
    commit.message({ type: 'prepare', epoch: 0 });
    commit.prepared();
    commit.connectionLost();
    expect(commit.phase).toBe('ready');
    await expect.poll(() => commit.phase).toBe('abandoned');
    expect(heard).toContain('decided abandoned');
    expect(heard).toContain('abandoned PEER_LOST');
    commit.stopTimers();
  });
});
