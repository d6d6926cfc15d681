/** Threads that a guest's program starts itself: at rest they stand still with the guest, otherwise they are named. */
import { execFile } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { rm, writeFile } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { deserialize } from 'node:v8';
import { BroadcastChannel } from 'node:worker_threads';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { WorkerGuest } from '../../lib/worker/index.js';
import { guestModule } from '../support/guests/by-hand.js';

const guests: WorkerGuest[] = [];

async function start(file = 'pool', data: object = {}): Promise<WorkerGuest> {
  const guest = await WorkerGuest.start({ module: { name: file, url: guestModule(`${file}.mjs`) }, data });
  guests.push(guest);
  return guest;
}

afterEach(async () => {
  await Promise.all(guests.splice(0).map((guest) => guest.terminate()));
});

const thread = String.raw`\(pool, .*pool-thread\.mjs\)`;
const busy = (name: RegExp) => ({ code: 'GUEST_BUSY', names: [expect.stringMatching(name)] });
const turns = async (count: number) => {
  for (let i = 0; i < count; i++) await new Promise(setImmediate);
};

describe('threads of the program that are at rest', () => {
  it('stand still with the guest, and go on with it', async () => {
    const guest = await start();
    const channel = new BroadcastChannel(randomUUID());
    const count = new Int32Array(new SharedArrayBuffer(4));
    try {
      await guest.request({ op: 'ask', message: { op: 'beat', channel: channel.name, count } });
      const beat = async () => {
        const before = Atomics.load(count, 0);
        channel.postMessage(null);
        await vi.waitFor(() => expect(Atomics.load(count, 0)).toBe(before + 1), 10_000);
      };
      await beat();
      await guest.check();
      await beat();
      await guest.pause();
      const before = Atomics.load(count, 0);
      for (let i = 0; i < 20; i++) {
        channel.postMessage(null);
        await turns(20);
      }
      expect(Atomics.load(count, 0)).toBe(before);
      guest.unpause();
      await vi.waitFor(() => expect(Atomics.load(count, 0)).toBe(before + 20), 10_000);
      expect(await guest.request({ op: 'add', by: 5 })).toHaveLength(2);
      expect(await guest.request({ op: 'sum' })).toBe(10);
    } finally {
      channel.close();
    }
  });

  it('may have worked a moment ago, time and again', async () => {
    const guest = await start('pool', { threads: 4 });
    for (let round = 1; round <= 30; round++) {
      await guest.request({ op: 'add', by: 1 });
      await guest.pause();
      guest.unpause();
      expect(await guest.request({ op: 'sum' })).toBe(4 * round);
    }
  });

  it.each([
    ['by a message', { op: 'go-on' }],
    ['by shared memory', { op: 'go-on-apart' }],
    ['by a BroadcastChannel', { op: 'go-on-apart', channel: randomUUID() }],
  ])('have nothing under way, and the guest has heard all that they had to say (work %s)', async (_, way) => {
    const guest = await start('pool', { threads: 1 });
    await guest.request({ ...way, everyMs: 12 });
    let done = 0;
    for (let round = 0; round < 100; round++) {
      const [state] = deserialize(await guest.pause()) as [Uint8Array];
      const { app } = deserialize(state) as { app: { given: number; done: number } };
      expect(app.done).toBe(app.given);
      done = app.done;
      guest.unpause();
      await sleep(round % 12);
    }
    expect(done).toBeGreaterThan(10);
  });

  it('may have begun to work as they were to stand still: the guest goes on until they have done it', async () => {
    const guest = await start('pool', { threads: 2 });
    await guest.request({ op: 'work-late' });
    const [state] = deserialize(await guest.pause()) as [Uint8Array];
    expect(deserialize(state)).toMatchObject({ app: { given: 1, done: 1 } });
  });

  it('are given nothing that would be lost with them', async () => {
    const guest = await start();
    await guest.request({ op: 'tell-at-save', tell: true });
    const refusal = busy(/^a thread of its own that gets work while the guest stands still$/);
    await expect(guest.pause()).rejects.toMatchObject(refusal);
    await guest.request({ op: 'tell-at-save', tell: false });
    expect(await guest.request({ op: 'add', by: 1 })).toHaveLength(2);
    await guest.pause();
  });

  it('stand still while the guest is asked whether it may move', async () => {
    const guest = await start();
    for (let round = 0; round < 50; round++) {
      const checks = [guest.check(), guest.check()];
      await guest.pause();
      guest.unpause();
      await Promise.all(checks);
    }
  });

  it('refuse all the same where the guest does not say that they keep nothing', async () => {
    const guest = await start('pool-stateful');
    const refusal = {
      code: 'GUEST_BUSY',
      names: [1, 2].map(() => expect.stringMatching(`^a thread of its own ${thread}$`)),
    };
    await expect(guest.check()).rejects.toMatchObject(refusal);
    await expect(guest.pause()).rejects.toMatchObject(refusal);
    expect(await guest.request({ op: 'add', by: 1 })).toHaveLength(2);
  });

  it('have grown the memory: the guest knows its length', async () => {
    const guest = await start();
    await guest.pause();
    expect(guest.regions[0]?.region.lengthBytes).toBe(65_536);
    guest.unpause();
    expect(await guest.request({ op: 'ask', message: { op: 'grow', pages: 30 } })).toBe(1);
    await guest.pause();
    expect(guest.regions[0]?.region.lengthBytes).toBe(31 * 65_536);
  });
});

describe('threads of the program that are not', () => {
  it.each(['wait', 'spin'])('refuse by name, and the guest runs on (%s)', async (op) => {
    const guest = await start();
    await guest.request({ op: 'tell', message: { op } });
    const refusal = busy(new RegExp(`^a running thread of its own ${thread}$`));
    await expect(guest.check()).rejects.toMatchObject(refusal);
    await expect(guest.pause()).rejects.toMatchObject(refusal);
    expect(guest.status).toBe('running');
    if (op === 'wait') return;
    await guest.request({ op: 'poke', at: 1, value: 1 });
    await guest.request({ op: 'ask', message: { op: 'data' } });
    await guest.pause();
  });

  it.each([
    ['timer', 'timer'],
    [
      'nested',
      String.raw`message port of a thread of its own ${thread}|a thread of its own \(setInterval.*\)`,
    ],
  ])('refuse for what they have open (%s)', async (op, name) => {
    const guest = await start();
    await guest.request({ op: 'ask', message: { op } });
    await expect(guest.pause()).rejects.toMatchObject({
      code: 'GUEST_BUSY',
      names: expect.arrayContaining([expect.stringMatching(name)]),
    });
    if (op !== 'timer') return;
    await guest.request({ op: 'ask', message: { op: 'no-timer' } });
    await guest.pause();
  });

  it('are those too that cannot be asked', async () => {
    const guest = await start('holding', {
      wasm: Buffer.from([0, 97, 115, 109, 1, 0, 0, 0]).toString('base64'),
    });
    await guest.request({ op: 'thread' });
    await expect(guest.pause()).rejects.toMatchObject(busy(/^a thread of its own \(setInterval/));
    await guest.request({ op: 'end-thread' });
    await guest.pause();
  });
});

describe('a thread of the program', () => {
  it('sees its own options, and the exports that its module has', async () => {
    const guest = await start('pool', { threads: 0 });
    await guest.request({ op: 'more', options: { workerData: { mine: true }, execArgv: ['--no-warnings'] } });
    expect(await guest.request({ op: 'ask', message: { op: 'data' } })).toEqual({ mine: true });
    expect(await guest.request({ op: 'exports' })).toEqual(['add', 'add']);
    await guest.pause();
  });

  it('starts where the host has flags that no thread may be given', async () => {
    const lib = new URL('../../lib/worker/index.js', import.meta.url).href;
    const file = fileURLToPath(new URL(`../../build/threads-${randomUUID()}.mjs`, import.meta.url));
    const code = `
      import { WorkerGuest } from '${lib}';
      const module = { name: 'pool', url: '${guestModule('pool.mjs').href}' };
      const guest = await WorkerGuest.start({ module });
      await guest.request({ op: 'add', by: 1 });
      await guest.pause();
      console.log(guest.status);
      process.exit();`;
    await writeFile(file, code);
    try {
      const flags = ['--max-old-space-size=512', '--no-warnings', file];
      const { stdout } = await promisify(execFile)(process.execPath, flags, { timeout: 60_000 });
      expect(stdout).toBe('paused\n');
    } finally {
      await rm(file);
    }
  });
});
