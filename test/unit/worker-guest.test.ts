/** Requests, refusals and endings of a live guest, at the host where it runs. */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { writeFile } from 'node:fs/promises';
import { type AddressInfo, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, it, vi } from 'vitest';

import { Region } from '../../lib/region.js';
import { WorkerGuest, type WorkerGuestOptions } from '../../lib/worker/index.js';
import { guestModule } from '../support/guests/by-hand.js';

const guests: WorkerGuest[] = [];

async function start(file: string, options: Partial<WorkerGuestOptions> = {}): Promise<WorkerGuest> {
  const guest = await WorkerGuest.start({
    module: { name: file, url: guestModule(`${file}.mjs`) },
    ...options,
  });
  guests.push(guest);
  return guest;
}

afterEach(async () => {
  await Promise.all(guests.splice(0).map((guest) => guest.terminate()));
});

const message = (guest: WorkerGuest) => new Promise((resolve) => guest.once('message', resolve));
const gate = () => new SharedArrayBuffer(4);
const openGate = (buffer: SharedArrayBuffer) => {
  const word = new Int32Array(buffer);
  Atomics.store(word, 0, 1);
  Atomics.notify(word, 0);
};

describe('requests', () => {
  it('are answered in order, and a throwing one names what was thrown', async () => {
    const guest = await start('busy');
    const echoes = Array.from({ length: 100 }, (_, value) => guest.request({ op: 'echo', value }));
    expect(await Promise.all(echoes)).toEqual(Array.from({ length: 100 }, (_, i) => i));
    await expect(guest.request({ op: 'throw' })).rejects.toMatchObject({
      code: 'GUEST_REQUEST_FAILED',
      guestErrorName: 'RangeError',
      guestErrorCode: 'E_ASKED',
      message: 'as asked',
    });
    await expect(guest.request({ op: 'unclonable' })).rejects.toMatchObject({ code: 'GUEST_REQUEST_FAILED' });
    await expect(guest.request(() => 1)).rejects.toThrow(/could not be cloned/);
    expect(await guest.request({ op: 'echo', value: 'still here' })).toBe('still here');
  });

  it('wait while the guest stands still, and go on in order when it runs again', async () => {
    const guest = await start('busy');
    await guest.pause();
    expect(guest.status).toBe('paused');
    const done: number[] = [];
    const echoes = [1, 2, 3].map((value) =>
      guest.request({ op: 'echo', value }).then(() => done.push(value)),
    );
    expect(guest.pendingRequests).toBe(3);
    guest.unpause();
    await Promise.all(echoes);
    expect(done).toEqual([1, 2, 3]);
  });

  it('that were not begun are handed back when the guest departs', async () => {
    const guest = await start('busy');
    await guest.pause();
    const waiting = guest.request({ op: 'echo', value: 1 });
    guest.departed();
    await expect(waiting).rejects.toMatchObject({ code: 'GUEST_MOVED' });
    await expect(guest.request({ op: 'echo', value: 2 })).rejects.toMatchObject({ code: 'GUEST_MOVED' });
    expect(guest.status).toBe('departed');
  });
});

describe('pause', () => {
  it.each([
    ['timer', 'timer'],
    ['server', 'TCP server'],
    ['port', 'message port'],
  ])('refuses while a %s is open, by name, and the guest runs on', async (op, name) => {
    const guest = await start('busy');
    await guest.request({ op });
    await expect(guest.pause()).rejects.toMatchObject({ code: 'GUEST_BUSY', names: [name] });
    expect(guest.status).toBe('running');
    expect(await guest.request({ op: 'echo', value: 1 })).toBe(1);
    await guest.request({ op: 'close' });
    await guest.pause();
  });

  it.each([
    ['unref-server', /^server at port \d+ that was unref'd$/],
    ['unref-socket', /^socket to 127\.0\.0\.1:\d+ that was unref'd$/],
    ['unref-child', /^child process \d+ that was unref'd$/],
    ['unref-watcher', /^file watcher .*memferry-.* that was unref'd$/],
  ])('refuses for what keeps no thread alive too (%s), before the migration', async (op, name) => {
    const server = createServer();
    const path = mkdtempSync(join(tmpdir(), 'memferry-'));
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    try {
      const guest = await start('busy');
      await guest.request({ op, path, port: (server.address() as AddressInfo).port });
      const refusal = { code: 'GUEST_BUSY', names: [expect.stringMatching(name)] };
      await expect(guest.check()).rejects.toMatchObject(refusal);
      await expect(guest.pause()).rejects.toMatchObject(refusal);
      await guest.request({ op: 'close' });
      await guest.check();
      await guest.pause();
    } finally {
      server.close();
      rmSync(path, { recursive: true });
    }
  });

  it('refuses for directories of the host that node:wasi has open, and not for a WASI without any', async () => {
    const guest = await start('busy');
    await guest.request({ op: 'wasi' });
    await guest.check();
    await guest.request({ op: 'wasi', path: tmpdir() });
    const refusal = { code: 'GUEST_BUSY', names: [`host directory ${tmpdir()} of node:wasi`] };
    await expect(guest.check()).rejects.toMatchObject(refusal);
    await expect(guest.pause()).rejects.toMatchObject(refusal);
  });

  it('refuses while a file is read, and by the names that the guest itself gives', async () => {
    const guest = await start('busy');
    const directory = mkdtempSync(join(tmpdir(), 'memferry-'));
    const path = join(directory, 'fifo');
    execFileSync('mkfifo', [path]);
    const read = message(guest);
    await guest.request({ op: 'file', path });
    const file = { code: 'GUEST_BUSY', names: ['file request'] };
    await expect(guest.pause()).rejects.toMatchObject(file);
    await writeFile(path, 'text');
    expect(await read).toBe('read');
    rmSync(directory, { recursive: true });
    await guest.request({ op: 'own', open: true });
    await expect(guest.pause()).rejects.toMatchObject({ code: 'GUEST_BUSY', names: ['journal.txt'] });
    await guest.request({ op: 'own', open: false });
    await guest.pause();
  });

  it('waits for the request in progress, and keeps the next ones back', async () => {
    const guest = await start('busy');
    const shut = gate();
    const begun = message(guest);
    const slow = guest.request({ op: 'slow', gate: shut });
    const next = guest.request({ op: 'echo', value: 'next' });
    await begun;
    const paused = guest.pause();
    expect(await Promise.race([paused.then(() => 'paused'), guest.check().then(() => 'in progress')])).toBe(
      'in progress',
    );
    openGate(shut);
    expect(await slow).toBe('slow');
    await paused;
    expect(guest.pendingRequests).toBe(1);
    guest.unpause();
    expect(await next).toBe('next');
  });

  it('gives up on a request that does not end, by name, and leaves the guest as it was', async () => {
    const guest = await start('busy', { pauseTimeoutMs: 1000 });
    for (const op of ['slow', 'spin']) {
      const shut = gate();
      const begun = message(guest);
      const request = guest.request({ op, gate: shut });
      await begun;
      const next = guest.request({ op: 'echo', value: 'next' });
      await expect(guest.pause()).rejects.toMatchObject({
        code: 'GUEST_BUSY',
        names: ['a request in progress in worker 0'],
      });
      openGate(shut);
      expect(await request).toMatch(/slow|spun/);
      expect(await next).toBe('next');
    }
    await guest.pause();
  });

  it('can be cancelled', async () => {
    const guest = await start('busy');
    await expect(guest.pause({ signal: AbortSignal.abort() })).rejects.toMatchObject({ code: 'CANCELLED' });
    const shut = gate();
    const begun = message(guest);
    const spin = guest.request({ op: 'spin', gate: shut });
    await begun;
    const controller = new AbortController();
    const pause = guest.pause({ signal: controller.signal });
    controller.abort();
    await expect(pause).rejects.toMatchObject({ code: 'CANCELLED' });
    openGate(shut);
    expect(await spin).toBe('spun');
    expect(await guest.request({ op: 'echo', value: 1 })).toBe(1);
  });

  it('however it races with a cancel, leaves the guest either paused or running', async () => {
    const guest = await start('busy');
    for (let i = 0; i < 200; i++) {
      const controller = new AbortController();
      const pause = guest.pause({ signal: controller.signal });
      const echo = guest.request({ op: 'echo', value: i });
      if (i % 2 === 0) queueMicrotask(() => controller.abort());
      else setImmediate(() => controller.abort());
      await pause.then(
        () => guest.unpause(),
        (error: { code: string }) => expect(error.code).toBe('CANCELLED'),
      );
      expect(await echo).toBe(i);
    }
  });

  it('stops timers that do not keep the worker alive, too', async () => {
    const guest = await start('busy');
    await guest.request({ op: 'unref-interval' });
    const ticks = () => guest.request({ op: 'ticks' }) as Promise<number>;
    for (let before = await ticks(); (await ticks()) < before + 3; );
    await guest.pause();
    const states = [await guest.pause().catch((error: { code: string }) => error.code)];
    expect(states).toEqual(['GUEST_BUSY']);
    guest.unpause();
    for (let before = await ticks(); (await ticks()) < before + 3; );
  });

  it('of several workers is a barrier: one refusal lets all run', async () => {
    const guest = await start('busy', { workers: 3, sharedHeapBytes: 1 << 20 });
    expect(await guest.request({ op: 'who' }, { worker: 2 })).toEqual({ worker: 2, workers: 3, shared: 1 });
    for (const worker of [0, 1, 2]) {
      expect(await guest.request({ op: 'shared-add' }, { worker })).toBe(worker);
    }
    await guest.request({ op: 'timer' }, { worker: 1 });
    await expect(guest.pause()).rejects.toMatchObject({ code: 'GUEST_BUSY', names: ['timer'] });
    for (const worker of [0, 1, 2]) {
      expect(await guest.request({ op: 'echo', value: worker }, { worker })).toBe(worker);
    }
    await guest.request({ op: 'close' }, { worker: 1 });
    await guest.pause();
    guest.unpause();
    expect(await guest.request({ op: 'shared-add' }, { worker: 1 })).toBe(3);
    await expect(guest.request({ op: 'who' }, { worker: 3 })).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
  });
});

describe('endings', () => {
  it.each(['exit', 'crash'])('a guest that ends by itself (%s) leaves nobody waiting', async (op) => {
    const guest = await start('busy');
    const ended = new Promise((resolve) => guest.once('ended', resolve));
    const first = guest.request({ op });
    const waiting = guest.request({ op: 'slow', gate: gate() });
    await expect(waiting).rejects.toMatchObject({ code: 'GUEST_LOST' });
    await first.catch(() => undefined);
    expect(await ended).toMatchObject({ code: 'GUEST_LOST' });
    expect(guest.status).toBe('lost');
    await expect(guest.request({ op: 'echo' })).rejects.toMatchObject({ code: 'GUEST_LOST' });
    await expect(guest.pause()).rejects.toMatchObject({ code: 'GUEST_BUSY', names: ['lost'] });
  });

  it("by itself, with a memory that was told of and not looked at yet, is that guest's end alone", async () => {
    const guest = await start('busy');
    const bystander = await start('busy');
    const ended = new Promise((resolve) => guest.once('ended', resolve));
    const thread = new SharedArrayBuffer(4);
    const request = guest.request({ op: 'exit-with-memory', thread });
    request.catch(() => undefined); // awaited below
    const number = new Int32Array(thread);
    const gone = () => number[0] !== 0 && !existsSync(`/proc/self/task/${number[0]}`);
    const uncaught: unknown[] = [];
    const hear = (error: unknown) => void uncaught.push(error);
    process.on('uncaughtException', hear);
    try {
      // This thread is busy meanwhile, and finds all of it waiting.
      for (const end = performance.now() + 10_000; !gone() && performance.now() < end; );
      expect(gone()).toBe(true);
      await expect(request).rejects.toMatchObject({ code: 'GUEST_LOST' });
      expect(await ended).toMatchObject({ code: 'GUEST_LOST' });
    } finally {
      process.removeListener('uncaughtException', hear);
    }
    expect(uncaught).toEqual([]);
    expect(guest.status).toBe('lost');
    expect(await bystander.request({ op: 'echo', value: 1 })).toBe(1);
  });

  it('of one worker before all have started ends the others, and what they would have shared', async () => {
    const allocate = vi.spyOn(Region, 'allocate');
    try {
      const threads = new SharedArrayBuffer(8);
      const options = { workers: 2, sharedHeapBytes: 1 << 20, data: { at: 'end-one', threads } };
      await expect(start('broken', options)).rejects.toMatchObject({ code: 'REGION_GONE' });
      const [other] = new Int32Array(threads);
      // The kernel takes it away a moment after its last word.
      await expect.poll(() => existsSync(`/proc/self/task/${other}`)).toBe(false);
      expect(allocate.mock.results.map(({ value }) => (value as Region).closed)).toEqual([true]);
    } finally {
      allocate.mockRestore();
    }
  });

  it('terminate works while it spins, while it pauses and while it stands still, and twice', async () => {
    for (const paused of [false, true]) {
      const guest = await start('busy');
      if (paused) await guest.pause();
      const shut = gate();
      const request = guest.request({ op: 'spin', gate: shut });
      const pause = paused ? Promise.resolve() : guest.pause();
      const settled = Promise.allSettled([request, pause]);
      await guest.terminate();
      await guest.terminate();
      expect((await settled)[0]).toMatchObject({ status: 'rejected', reason: { code: 'GUEST_LOST' } });
    }
  });

  it('what a guest throws as it starts is what start rejects with', async () => {
    await expect(start('broken', { data: { at: 'create' } })).rejects.toThrow('no creation today');
    await expect(start('by-hand')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await expect(
      WorkerGuest.start({ module: { name: 'x', url: 'data:text/javascript,1' } }),
    ).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await expect(start('busy', { workers: 0 })).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  });
});
