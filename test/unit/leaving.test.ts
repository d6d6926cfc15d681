import { describe, expect, it } from 'vitest';
import { type ErrorCode, MemferryError } from '../../src/errors.js';
import type { GuestRegion, PausedGuest } from '../../src/guest.js';
import { modes } from '../../src/options.js';
import type { SourceMessage } from '../../src/protocol/messages.js';
import { gathersFirst, traitsOf } from '../../src/protocol/mode-traits.js';
import { verificationFailed } from '../../src/protocol/verification.js';
import { DestinationAccount } from '../../src/source/account.js';
import type { CommitDriver } from '../../src/source/commit-driver.js';
import type { SourceEngine } from '../../src/source/engine.js';
import { pushRest } from '../../src/source/eviction.js';
import { reasonOfCut } from '../../src/source/gone.js';
import { followGrowth, GrowthWait } from '../../src/source/growth.js';
import { Measurements } from '../../src/source/measurements.js';
import { basePages } from '../../src/source/negotiation.js';
import type { SourceSession } from '../../src/source/session.js';
import { Switchover } from '../../src/source/switchover.js';
import type { ImageSet } from '../../src/staging/image-set.js';

const never = new AbortController().signal;

describe('a destination that gathers before it prepares', () => {
  it('is one of a scatter with rounds alone', () => {
    expect(modes.filter((mode) => gathersFirst(traitsOf(mode)))).toEqual(['scatter-pre-copy']);
  });
});

describe('the base that a destination offers', () => {
  it('is taken as far as there are pages', () => {
    expect(basePages([10, 10, 10], [10, 3])).toEqual([10, 3, 0]);
  });

  it('is one of something else where it has more pages than the guest', () => {
    expect(basePages([10, 10], [11, 10])).toEqual([0, 10]);
  });
});

describe('regions that differ', () => {
  it('are named, or numbered where there is no such region', () => {
    const error = verificationFailed([{ name: 'heap' }, { name: 'stack' }], [1, 7]);
    expect(error).toMatchObject({ code: 'VERIFICATION_FAILED', facts: { regions: ['stack', '7'] } });
    expect(error.message).toBe('the digests of stack, 7 differ');
  });
});

describe('memory that grows while it moves', () => {
  function growing(measured: number, length: number) {
    const grown: number[] = [];
    const region = {
      pageSize: 4096,
      pages: length / 4096,
      measure: () => measured,
      native: { grow: (pages: number) => grown.push(pages) },
    };
    return { entry: { name: 'heap', region } as unknown as GuestRegion, grown };
  }
  function engine() {
    const told: unknown[] = [];
    const toldGrowth = (...what: unknown[]) => void told.push(what);
    return { engine: { toldGrowth } as unknown as SourceEngine, told };
  }

  it('is told of before the engine may send pages of it', async () => {
    const steady = growing(4096, 4096);
    const more = growing(3 * 4096, 4096);
    const { engine: sender, told } = engine();
    const known = [4096, 4096];
    const asked: unknown[] = [];
    await followGrowth([steady.entry, more.entry], known, sender, async (...what) => {
      expect([more.grown, told]).toEqual([[], []]);
      asked.push(what);
    });
    expect(asked).toEqual([[1, 3 * 4096, 3]]);
    expect([steady.grown, more.grown, told, known]).toEqual([[], [3], [[1, 3]], [4096, 3 * 4096]]);
  });

  it('is told of once, and also where somebody else has taken note of it before', async () => {
    const noted = growing(2 * 4096, 2 * 4096);
    const { engine: sender, told } = engine();
    const known = [4096];
    const asked: unknown[] = [];
    for (let times = 0; times < 2; times++) {
      await followGrowth([noted.entry], known, sender, async (...what) => void asked.push(what));
    }
    expect(asked).toEqual([[0, 2 * 4096, 2]]);
    expect([noted.grown, told]).toEqual([[], [[0, 2]]]);
  });

  it('stays as long as it was for the engine when nobody has room for it', async () => {
    const more = growing(8192, 4096);
    const { engine: sender, told } = engine();
    const refused = followGrowth([more.entry], [4096], sender, () => Promise.reject(new Error('no room')));
    await expect(refused).rejects.toThrow('no room');
    expect([more.grown, told]).toEqual([[], []]);
  });

  it('waits for the destination, within a bound', async () => {
    const said: SourceMessage[] = [];
    const wait = new GrowthWait((message) => said.push(message), never, 50);
    wait.onGrown(); // nobody asked
    const first = wait.grow(2, 8192);
    wait.onGrown();
    await first;
    expect(said).toEqual([{ type: 'grow', region: 2, lengthBytes: 8192 }]);
    await expect(wait.grow(2, 12288)).rejects.toMatchObject({ code: 'PREPARE_TIMEOUT' });
    const cut = wait.grow(2, 16384);
    wait.fail(new MemferryError('CHANNEL_LOST', 'cut'));
    await expect(cut).rejects.toMatchObject({ code: 'CHANNEL_LOST' });
  });
});

describe('what ended a migration whose data connections were cut', () => {
  const cut = new MemferryError('CHANNEL_LOST', 'cut');

  it("is in the destination's own words, where they come", async () => {
    const refusal = new MemferryError('PREPARE_FAILED', 'no');
    expect(await reasonOfCut(cut, Promise.resolve(refusal))).toBe(refusal);
  });

  it('is the cut, where these say nothing new', async () => {
    const cancelled = new MemferryError('CANCELLED', 'by the peer');
    expect(await reasonOfCut(cut, Promise.resolve(cancelled))).toBe(cut);
  });

  it('is the cut, where none come', async () => {
    expect(await reasonOfCut(cut, new Promise(() => {}))).toBe(cut);
  });
});

describe("the destination's account", () => {
  /** A session that tells, and hears nothing itself. */
  const session = {
    keepTelling: async (_: SourceMessage, answered: Promise<unknown>) => void (await answered),
  } as unknown as SourceSession;
  const faults = { count: 0, p50Us: 0, p99Us: 0, maxUs: 0 };

  it('is what it says', async () => {
    const account = new DestinationAccount();
    const asked = account.ask(session, null, 1000);
    const summary = { type: 'summary', remoteFaults: faults, extraMemoryBytes: 1, mismatched: [] } as const;
    account.onMessage({ ...summary, mismatched: [] });
    expect(await asked).toEqual(summary);
  });

  it('is an error where pages are lost, or nothing is known of the guest any more', async () => {
    const runs = [{ region: 0, first: 1, count: 2 }];
    const lost = new DestinationAccount();
    lost.onMessage({ type: 'lost', runs });
    await expect(lost.ask(session, null, 1000)).rejects.toMatchObject({
      code: 'PAGES_LOST',
      facts: { runs },
    });
    const over = new DestinationAccount();
    over.onMessage({ type: 'over' });
    await expect(over.ask(session, null, 1000)).rejects.toMatchObject({ code: 'PEER_LOST' });
  });
});

describe('eviction', () => {
  it('gives up servers that failed before it waits for the image', async () => {
    const order: string[] = [];
    let committed = (): void => {};
    const images = {
      failures: [],
      commit: () => {
        order.push('commit');
        return new Promise((resolve) => {
          committed = () =>
            resolve([{ ordinal: 1, name: 'b', error: new MemferryError('PEER_LOST', 'gone') }]);
        });
      },
      giveUp: (ordinal: number, why: string) => {
        order.push(`give up ${ordinal}: ${why}`);
        committed();
      },
    } as unknown as ImageSet;
    const engine = {
      pushToKeep: async (kept: Promise<unknown[]>) => {
        order.push('push');
        order.push(`not kept: ${(await kept).length}`);
      },
      stats: () => ({ servers: [{ failed: null }, { failed: 'stalled' }] }),
    } as unknown as SourceEngine;
    await pushRest(engine, images, () => order.push('pushing'));
    expect(order).toEqual([
      'commit',
      'pushing',
      'push',
      'give up 1: stalled',
      'not kept: 0',
      'give up 1: stalled',
    ]);
  });

  it('gives up servers that failed in the push, long after all had said that they keep it', async () => {
    const givenUp: number[] = [];
    let failed: string | null = null;
    const images = {
      failures: [],
      commit: async () => [],
      giveUp: (ordinal: number) => givenUp.push(ordinal),
    } as unknown as ImageSet;
    const engine = {
      pushToKeep: async (kept: Promise<unknown[]>) => {
        await kept;
        failed = 'stalled';
      },
      stats: () => ({ servers: [{ failed: null }, { failed }] }),
    } as unknown as SourceEngine;
    await pushRest(engine, images, () => {});
    expect(givenUp).toEqual([1]);
  });

  it('says which servers do not keep what they hold', async () => {
    const failure = (ordinal: number, code: ErrorCode, reason: string) => ({
      ordinal,
      name: `s${ordinal}`,
      error: new MemferryError(code, reason, { facts: { reason } }),
    });
    const images = {
      failures: [failure(3, 'PEER_LOST', 'cut before')],
      commit: async () => [
        failure(0, 'PEER_LOST', 'no answer'),
        failure(1, 'VMD_LOST', 'lease'),
        failure(2, 'VMD_LOST', 'dissolve'), // by the destination, which has every page
      ],
      giveUp: () => {},
    } as unknown as ImageSet;
    let notKept: readonly { ordinal: number; why: string }[] = [];
    const engine = {
      pushToKeep: async (kept: Promise<typeof notKept>) => {
        notKept = await kept;
      },
      stats: () => ({ servers: [0, 1, 2, 3, 4].map(() => ({ failed: null })) }),
    } as unknown as SourceEngine;
    await pushRest(engine, images, () => {});
    expect(notKept.map(({ ordinal }) => ordinal)).toEqual([3, 0, 1]);
    expect(notKept[1]?.why).toBe('it does not keep what it holds: no answer');
  });

  it('pushes nothing where every page went before the guest', async () => {
    const engine = {
      push: () => Promise.reject(new Error('not asked for')),
      stats: () => ({ servers: [] }),
    } as unknown as SourceEngine;
    await pushRest(engine, null, null);
  });
});

describe('a switchover', () => {
  const ready = { type: 'ready', epoch: 1 } as unknown as Parameters<Switchover['onReady']>[0];

  function switching(paused: PausedGuest, switched: Promise<unknown>) {
    const order: string[] = [];
    const commit = {
      pause: async () => paused,
      transferred: () => order.push('transferred'),
      ready: () => order.push('granted'),
      fail: (error: Error) => order.push(`failed: ${error.message}`),
    } as unknown as CommitDriver;
    const switchover = new Switchover({
      commit,
      measured: new Measurements(),
      signal: never,
      send: (message) => order.push(message.type),
      followGrowth: async () => void order.push('growth'),
    });
    const engine = {
      switchOver: () => {
        order.push('switch');
        return { pages: 0, switched };
      },
      queueDirtyNow: () => order.push('scan'),
      settle: async () => ({ suspects: 3, failed: [] }),
      stats: () => ({ pagesSent: 0, bytesOnWire: 0, dedup: null }),
    } as unknown as SourceEngine;
    return { order, switchover, engine };
  }
  const settled = () => new Promise((resolve) => setImmediate(resolve));

  it('says the state first, and goes on to PREPARE before the switch has been answered', async () => {
    let answered = (_: unknown): void => {};
    const switched = new Promise((resolve) => {
      answered = resolve;
    });
    const { order, switchover, engine } = switching({ state: new Uint8Array(3) }, switched);
    const done = switchover.toPostCopy(engine);
    await settled();
    expect(order).toEqual(['growth', 'state', 'switch', 'transferred']);
    expect(switchover.executionState).toHaveLength(3);
    // READY overtakes the switch's own answer.
    switchover.onReady(ready);
    await settled();
    expect(order).not.toContain('granted');
    answered(null);
    await done;
    expect(order.at(-1)).toBe('granted');
  });

  it('fails where a paused guest is still written', async () => {
    const { order, switchover, engine } = switching({ state: new Uint8Array() }, Promise.resolve());
    await expect(switchover.withEveryPage(engine, true)).rejects.toMatchObject({
      code: 'PROTOCOL_ERROR',
      facts: { pages: 3 },
    });
    expect(order).toEqual(['growth', 'state', 'scan']);
  });
});
