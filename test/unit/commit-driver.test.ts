/**
 * The driver of the source's commit with guests whose pause() heeds no signal, and moves that follow one another: a
 * pause that succeeds late never lets a guest run that has gone, or stands for another move, and never leaves one
 * standing that stays.
 */
import { describe, expect, test, vi } from 'vitest';
import { MemferryError } from '../../src/errors.js';
import type { Guest, PausedGuest } from '../../src/guest.js';
import type { SourceMessage } from '../../src/protocol/commit.js';
import { type Deferred, deferred } from '../../src/protocol/deferred.js';
import { CommitDriver } from '../../src/source/commit-driver.js';

class TestGuest {
  runs = true;
  readonly pauses: Deferred<void>[] = [];
  /** Of unpause(); it begins at once and ends when this does. */
  unpausing: Promise<void> = Promise.resolve();
  readonly regions = [];
  readonly name = 'g';
  paused: PausedGuest = { state: new Uint8Array(1) };
  async pause(): Promise<PausedGuest> {
    const asked = deferred<void>();
    this.pauses.push(asked);
    await asked.promise;
    this.runs = false;
    return this.paused;
  }
  async unpause(): Promise<void> {
    await this.unpausing;
    this.runs = true;
  }
}

function move(
  guest: TestGuest,
  { send: cut = false, ...timeouts }: { pause?: number; doubt?: number; send?: boolean } = {},
) {
  const said: SourceMessage[] = [];
  const driver = new CommitDriver(guest as unknown as Guest, {
    timeoutsMs: { pause: 60_000, ready: 60_000, doubt: 60_000, retry: 60_000, ...timeouts },
    send: (message) => {
      // Whose end was told before the commit had anybody to tell it to.
      if (cut) throw new MemferryError('PEER_LOST', 'the connection is cut');
      said.push(message);
    },
    redial: () => new Promise(() => {}),
  });
  return { driver, said };
}

const turn = () => new Promise((resolve) => setImmediate(resolve));

/** Until PREPARE is answered: GRANT is out. */
async function grant(guest: TestGuest, { driver }: ReturnType<typeof move>, pause: number): Promise<void> {
  const pausing = driver.pause();
  await turn();
  guest.pauses[pause]?.resolve();
  await pausing;
  driver.transferred();
  driver.message({ type: 'ready', epoch: 0 });
}

async function givenUp(guest: TestGuest): Promise<ReturnType<typeof move>> {
  const first = move(guest, { pause: 5 });
  await expect(first.driver.pause()).rejects.toMatchObject({ code: 'PAUSE_TIMEOUT' });
  return first;
}

describe('a pause that succeeds after it was given up', () => {
  test('lets the guest run again', async () => {
    const guest = new TestGuest();
    await givenUp(guest);
    guest.pauses[0]?.resolve();
    await turn();
    expect(guest.runs).toBe(true);
  });

  test('does not let it run while it stands for another move, nor when that has taken it away', async () => {
    const guest = new TestGuest();
    await givenUp(guest);
    const second = move(guest);
    await grant(guest, second, 1);
    guest.pauses[0]?.resolve();
    await turn();
    expect(guest.runs).toBe(false);
    second.driver.message({ type: 'resumed', epoch: 0 });
    expect(await second.driver.settled).toEqual({ outcome: 'departed' });
    await turn();
    expect(guest.runs).toBe(false);
  });

  test('does not let one run that has left', async () => {
    const guest = new TestGuest();
    await givenUp(guest);
    const second = move(guest);
    await grant(guest, second, 1);
    second.driver.message({ type: 'resumed', epoch: 0 });
    guest.pauses[0]?.resolve();
    await turn();
    expect(guest.runs).toBe(false);
  });

  test('leaves none standing when the other move cannot pause it', async () => {
    const guest = new TestGuest();
    await givenUp(guest);
    const second = move(guest);
    const pausing = second.driver.pause();
    await turn();
    guest.pauses[0]?.resolve();
    await turn();
    expect(guest.runs).toBe(false);
    guest.pauses[1]?.reject(new Error('it is being paused'));
    await expect(pausing).rejects.toMatchObject({ code: 'PAUSE_FAILED' });
    await turn();
    expect(guest.runs).toBe(true);
  });

  test('of one that is given up as well: it runs', async () => {
    const guest = new TestGuest();
    await givenUp(guest);
    await givenUp(guest);
    guest.pauses[1]?.resolve();
    guest.pauses[0]?.resolve();
    await turn();
    expect(guest.runs).toBe(true);
  });
});

test('a pause waits for the unpause of the move before', async () => {
  const guest = new TestGuest();
  const first = move(guest);
  const pausing = first.driver.pause();
  await turn();
  guest.pauses[0]?.resolve();
  await pausing;
  const unpausing = deferred<void>();
  guest.unpausing = unpausing.promise;
  first.driver.fail(new Error('no link'));
  const second = move(guest);
  const again = second.driver.pause();
  await turn();
  expect(guest.pauses).toHaveLength(1);
  unpausing.resolve();
  await turn();
  expect(guest.runs).toBe(true);
  guest.pauses[1]?.resolve();
  await again;
  expect(guest.runs).toBe(false);
});

test('a pause that waits for an unpause too long does not happen', async () => {
  vi.useFakeTimers();
  try {
    const guest = new TestGuest();
    const first = move(guest);
    const pausing = first.driver.pause();
    await vi.advanceTimersByTimeAsync(1);
    guest.pauses[0]?.resolve();
    await pausing;
    guest.unpausing = new Promise(() => {});
    first.driver.fail(new Error('no link'));
    const again = expect(move(guest).driver.pause()).rejects.toMatchObject({ code: 'GUEST_BUSY' });
    await vi.advanceTimersByTimeAsync(20_000);
    await again;
    expect(guest.pauses).toHaveLength(1);
  } finally {
    vi.useRealTimers();
  }
});

test('a PREPARE that cannot leave ends the migration', async () => {
  const guest = new TestGuest();
  const first = move(guest, { send: true });
  const pausing = first.driver.pause();
  await turn();
  guest.pauses[0]?.resolve();
  await pausing;
  first.driver.transferred();
  expect(await first.driver.settled).toMatchObject({ outcome: 'reclaimed', error: { code: 'PEER_LOST' } });
  await turn();
  expect(guest.runs).toBe(true);
});

test.each([
  ['resumed', { type: 'resumed', epoch: 0 }, 'departed', false],
  ['refused', { type: 'refused', epoch: 0, code: 'PREPARE_FAILED', message: 'no' }, 'reclaimed', true],
] as const)(
  '%s, said when the migration is in doubt already, is what resolve() finds',
  async (_, answer, outcome, runs) => {
    const guest = new TestGuest();
    const one = move(guest, { doubt: 5 });
    await grant(guest, one, 0);
    expect(await one.driver.settled).toMatchObject({ outcome: 'in-doubt' });
    one.driver.message(answer as Parameters<CommitDriver['message']>[0]);
    await turn();
    expect(guest.runs).toBe(runs);
    expect(await one.driver.resolve('ask-again')).toMatchObject({ outcome });
    await expect(one.driver.resolve('ask-again')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  },
);

describe('READY', () => {
  const ready = { type: 'ready', epoch: 0 } as const;
  async function prepared(stillPaused: () => Promise<void>) {
    const guest = new TestGuest();
    guest.paused = { state: new Uint8Array(1), stillPaused };
    const { driver, said } = move(guest);
    const pausing = driver.pause();
    await turn();
    guest.pauses[0]?.resolve();
    await pausing;
    driver.transferred();
    return { guest, driver, said };
  }

  test('is answered by GRANT when the guest says that it still stands, not before', async () => {
    const looked = deferred<void>();
    let looks = 0;
    const { driver, said } = await prepared(() => {
      looks++;
      return looked.promise;
    });
    driver.ready(ready);
    await turn();
    expect(said.map(({ type }) => type)).toEqual(['prepare']);
    looked.resolve();
    await turn();
    expect(said.map(({ type }) => type)).toEqual(['prepare', 'grant']);
    // Said again, as the answer to a question: the guest is not this side's to be asked any more.
    driver.ready(ready);
    expect(looks).toBe(1);
    driver.message({ type: 'resumed', epoch: 0 });
    expect(await driver.settled).toEqual({ outcome: 'departed' });
  });

  test('of a guest that somebody has let run is none: it goes on here', async () => {
    const error = new MemferryError('GUEST_BUSY', 'it runs');
    const { guest, driver, said } = await prepared(() => Promise.reject(error));
    driver.ready(ready);
    expect(await driver.settled).toEqual({ outcome: 'reclaimed', error });
    await driver.unpaused();
    expect(said.map(({ type }) => type)).not.toContain('grant');
    expect(guest.runs).toBe(true);
  });
});
