/**
 * Guests whose memory belongs to other processes, at both ends: every mode, every byte compared with what the source's
 * owner had when it was paused; owners that die, exec or let go of memory; pagers that are killed.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, writeFileSync } from 'node:fs';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, test, vi } from 'vitest';
import { DirtyTracker, MemferryError, Region, servePages, superviseGuest } from '../../lib/index.js';
import { modes } from '../../lib/options/migrate.js';
import {
  closeAll,
  destination,
  expectArrives,
  expectSame,
  move,
  open,
  pages,
  resumed,
  type Source,
  servers,
  source,
  tracked,
} from '../support/attached-guests.js';
import { buildOwner, features, MemoryOwner, removeOwner } from '../support/memory-owner.js';

const folder = mkdtempSync(join(tmpdir(), 'memferry-attach-'));

beforeAll(buildOwner);
afterEach(closeAll);
afterAll(() => {
  removeOwner();
  rmSync(folder, { recursive: true, force: true });
});

describe.each([
  ['shared', true],
  ['private', false],
] as const)('%s memory', (_name, shared) => {
  test.each(modes)('%s', async (mode) => {
    const from = await source({ shared });
    const to = await destination({ shared });
    const via = mode.startsWith('scatter') ? await servers(2) : [];
    const migration = await move(from, to, { mode, via, maxRounds: 4 });
    await expectArrives(from, to, migration);
  });

  test.each(['uffd-wp-async', 'hash-diff'] as const)('tracked by %s while it writes', async (tracker) => {
    const from = await source({ shared });
    const to = await destination({ shared });
    const migration = await move(from, to, { mode: 'pre-copy', tracker, maxRounds: 5 });
    await resumed(to, migration);
    await expectSame(from, to);
    expect(await migration.done).toMatchObject({ tracker, verified: true });
  });

  test('encoded, deduplicated, and through one server', async () => {
    const from = await source({ shared });
    const to = await destination({ shared });
    const migration = await move(from, to, {
      mode: 'scatter-hybrid',
      via: await servers(1),
      compress: 'lz4',
      dedup: true,
      maxRounds: 3,
    });
    await resumed(to, migration);
    await expectSame(from, to);
    expect((await migration.done).verified).toBe(true);
  });

  test('it arrives, and moves on from there', async () => {
    const from = await source({ shared });
    const to = await destination({ shared, features: tracked });
    await (await move(from, to, { mode: 'post-copy' })).done;
    const arrival = await to.arrival;
    await arrival.complete;
    const region = to.region() as Region;
    await to.owner.ask('run 9');
    const second: Source = { ...from, owner: to.owner, region, paused: null };
    second.guest = {
      name: 'g',
      regions: [{ name: 'ram', region }],
      module: null,
      async pause() {
        await to.owner.ask('stop');
        second.paused = await to.owner.content();
        return new Uint8Array();
      },
      unpause() {},
    };
    const further = await destination({ shared });
    const migration = await move(second, further, { mode: 'hybrid' });
    await further.resumed;
    await expectSame(second, further);
    expect((await migration.done).verified).toBe(true);
  });

  test('a source whose owner dies fails at once', async () => {
    const from = await source({ shared });
    const to = await destination({ shared });
    // So slow that the first round would take longer than this test may: its pause would find out too.
    const migration = await move(from, to, { mode: 'pre-copy', bandwidth: 32 * 2 ** 10 });
    await to.arrival;
    const began = performance.now();
    from.owner.kill();
    await expect(migration.done).rejects.toMatchObject({ code: 'OWNER_GONE' });
    expect(performance.now() - began).toBeLessThan(10_000);
    await expect(from.region.ownerGone).resolves.toMatchObject({ code: 'OWNER_GONE' });
    await to.abandoned;
  });

  test('a destination whose owner runs another program fails, and the source goes on', async () => {
    const from = await source({ shared });
    const to = await destination({ shared });
    const migration = await move(from, to, { mode: 'pre-copy', bandwidth: 2 * 2 ** 20 });
    await to.arrival;
    void to.owner.ask('exec');
    await expect(migration.done).rejects.toBeInstanceOf(MemferryError);
    await expect(to.region()?.ownerGone).resolves.toMatchObject({ code: 'OWNER_GONE' });
    expect(await from.owner.ask('read 0')).not.toBeNull();
  });

  test.each(['kill', 'exec'] as const)(
    'a destination whose owner ends after the switch (%s): the source hears of it at once',
    async (how) => {
      const from = await source({ shared });
      const to = await destination({ shared });
      const migration = await move(from, to, { mode: 'post-copy', bandwidth: 2 * 2 ** 20 });
      await resumed(to, migration);
      const arrival = await to.arrival;
      const failed = expect(arrival.complete).rejects.toMatchObject({ code: 'OWNER_GONE' });
      const began = performance.now();
      if (how === 'kill') to.owner.kill();
      else void to.owner.ask('exec');
      await failed;
      await expect(migration.done).rejects.toMatchObject({ code: 'GUEST_LOST' });
      // It would look for the destination for a minute.
      expect(performance.now() - began).toBeLessThan(20_000);
    },
  );

  test('a pager that is killed is followed by another', async () => {
    // Enough that the first ones cannot bring it all before they are killed.
    const many = 4 * pages;
    const owner = await MemoryOwner.start({
      pages: many,
      shared,
      features: features.missingShmem | features.eventRemove,
    });
    const snapshot = join(folder, `snapshot-${shared}`);
    const content = Buffer.alloc(many * 4096);
    for (let at = 0; at < content.length; at += 8) content.writeDoubleLE(Math.random() + 1, at);
    writeFileSync(snapshot, content);
    const pids: number[] = [];
    let killed = () => {};
    const firstIsDead = new Promise<void>((resolve) => (killed = resolve));
    const supervision = superviseGuest({
      attachment: owner.attachment(),
      snapshot,
      prepage: false,
      mostPagers: 4,
      onPager: ({ pid, turn }) => {
        pids.push(pid);
        // The second one is in the middle of it, or has just brought the last page.
        if (turn < 3) process.kill(pid, 'SIGKILL');
        killed();
      },
    });
    supervision.done.catch(() => {});
    await firstIsDead;
    expect(Buffer.compare(await owner.content(), content)).toBe(0);
    expect(pids.length).toBeGreaterThan(1);
    expect(await supervision.done).toMatchObject({ stats: { pagesSettled: many, pagesLost: 0 } });
  });
});

test('a guest that nobody pages any more is ended, and never reads zeros', async () => {
  const owner = await MemoryOwner.start({ pages, shared: false });
  const snapshot = join(folder, 'snapshot-end');
  writeFileSync(snapshot, Buffer.alloc(pages * 4096, 0xab));
  const supervision = superviseGuest({
    attachment: owner.attachment(),
    snapshot,
    prepage: false,
    onPagerDeath: 'end',
    onPager: ({ pid }) => void setTimeout(() => process.kill(pid, 'SIGKILL'), 100),
  });
  await expect(supervision.done).rejects.toMatchObject({ code: 'GUEST_LOST' });
  expect(await owner.ask('read 100')).toBeNull();
});

describe('before a pager has begun', () => {
  const begin = async () => {
    const owner = await MemoryOwner.start({ pages: 64, shared: false });
    const snapshot = join(folder, 'snapshot-begin');
    const content = Buffer.alloc(64 * 4096, 0x77);
    writeFileSync(snapshot, content);
    return { owner, snapshot, content };
  };

  test.each<[object, string, RegExp]>([
    [{ offsetBytes: -1 }, 'INVALID_ARGUMENT', /offsetBytes/],
    [{ offsetBytes: 2 ** 30 }, 'INVALID_ARGUMENT', /snapshot has 262144 bytes/],
    [{ snapshot: '/nowhere/at/all' }, 'SYSTEM', /ENOENT/],
    [{ snapshot: folder }, 'INVALID_ARGUMENT', /not a regular file/],
    [{ snapshot: '/dev/zero' }, 'INVALID_ARGUMENT', /not a regular file/],
    [{ onPagerDeath: 'End' }, 'INVALID_ARGUMENT', /onPagerDeath/],
    [{ stallMs: '5s' }, 'INVALID_ARGUMENT', /stallMs/],
    [{ prepage: 'no' }, 'INVALID_ARGUMENT', /prepage/],
    [{ onPager: 1 }, 'INVALID_ARGUMENT', /onPager: must be a function/],
    [{ prepaging: true }, 'INVALID_ARGUMENT', /prepaging/],
  ])('%j is refused, and the guest is as it was', async (wrong, code, message) => {
    const { owner, snapshot, content } = await begin();
    const options = { attachment: owner.attachment(), snapshot, ...wrong };
    expect(() => superviseGuest(options as never)).toThrow(
      expect.objectContaining({ code, message: expect.stringMatching(message) }),
    );
    // Nothing is registered, and nobody was ended.
    const supervision = superviseGuest({ attachment: owner.attachment(), snapshot });
    expect(await supervision.done).toMatchObject({ stats: { pagesSettled: 64, pagesLost: 0 } });
    expect(Buffer.compare(await owner.content(), content)).toBe(0);
  });

  test('a first pager that fails leaves the guest waiting, and the next supervision goes on', async () => {
    const { owner, snapshot, content } = await begin();
    const before = process.execPath;
    process.execPath = '/bin/false';
    const failing = superviseGuest({ attachment: owner.attachment(), snapshot, onPagerDeath: 'end' });
    await expect(failing.done).rejects.toMatchObject({
      code: 'SYSTEM',
      facts: { pagers: 5, unpaged: true },
      message: expect.stringMatching(/no pager could begin, and the guest waits/),
    });
    process.execPath = before;
    // Not even where the owner keeps no descriptor of its own, and ours is closed.
    const read = owner.ask('read 7');
    const first = await Promise.race([read, new Promise((resolve) => setTimeout(resolve, 300, 'waits'))]);
    expect(first).toBe('waits');
    const supervision = superviseGuest({ attachment: owner.attachment(), snapshot });
    expect(await read).toBe(String(0x7777777777777777n));
    await supervision.done;
    expect(Buffer.compare(await owner.content(), content)).toBe(0);
    // It is not that one's any more.
    failing.end();
    expect(await owner.ask('read 7')).toBe(String(0x7777777777777777n));
  });

  test('one that is closed lets the guest wait for another', async () => {
    const { owner, snapshot, content } = await begin();
    {
      using supervision = superviseGuest({ attachment: owner.attachment(), snapshot, prepage: false });
      supervision.done.catch(() => {});
      expect(await owner.ask('read 9')).toBe(String(0x7777777777777777n));
      supervision.close();
      await expect(supervision.done).rejects.toMatchObject({ code: 'CANCELLED', facts: { unpaged: true } });
    }
    const supervision = superviseGuest({ attachment: owner.attachment(), snapshot });
    await supervision.done;
    expect(Buffer.compare(await owner.content(), content)).toBe(0);
    supervision.close();
    expect(await owner.ask('read 9')).toBe(String(0x7777777777777777n));
  });

  test('one that is closed can be ended', async () => {
    const { owner, snapshot } = await begin();
    const supervision = superviseGuest({ attachment: owner.attachment(), snapshot, prepage: false });
    supervision.close();
    await expect(supervision.done).rejects.toMatchObject({ code: 'CANCELLED' });
    supervision.end();
    expect(await owner.ask('read 9')).toBeNull();
  });

  test('a process that ends with a guest that nobody pages ends the guest', async () => {
    const { owner, snapshot } = await begin();
    const { pidfd, uffd, mappings } = owner.attachment();
    const library = new URL('../../lib/index.js', import.meta.url);
    const [{ address, lengthBytes }] = mappings as [{ address: bigint; lengthBytes: number }];
    const program = `
      import { superviseGuest } from '${library}';
      const supervision = superviseGuest({
        attachment: { pidfd: 3, uffd: 4, mappings: [{ address: ${address}n, lengthBytes: ${lengthBytes} }] },
        snapshot: '${snapshot}', prepage: false,
      });
      supervision.done.catch(() => {});
      supervision.close();`;
    const supervisor = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'ignore', 'inherit', pidfd, uffd as number],
    });
    await once(supervisor, 'exit');
    await expect.poll(() => owner.exitSignal).toBe('SIGKILL');
  });
});

test('a supervisor that stood still itself blames no pager', async () => {
  const owner = await MemoryOwner.start({ pages, shared: false });
  const snapshot = join(folder, 'snapshot-stood');
  const content = Buffer.alloc(pages * 4096, 0xab);
  writeFileSync(snapshot, content);
  let pager = 0;
  let serves = () => {};
  const serving = new Promise<void>((resolve) => (serves = resolve));
  const supervision = superviseGuest({
    ...{ attachment: owner.attachment(), snapshot, prepage: false, onPagerDeath: 'end', stallMs: 1500 },
    onPager: ({ pid }) => {
      pager = pid;
      serves();
    },
  });
  supervision.done.catch(() => {});
  await Promise.race([serving, supervision.done]);
  for (let times = 0; times < 3; times++) {
    await new Promise((resolve) => setImmediate(resolve));
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2500);
  }
  await new Promise((resolve) => setTimeout(resolve, 300));
  expect(supervision.pagerPid).toBe(pager);
  expect(Buffer.compare(await owner.content(), content)).toBe(0);
  await supervision.done;
});

test('a pager whose supervisor is killed brings the rest by itself, and ends', async () => {
  const owner = await MemoryOwner.start({ pages, shared: true, features: features.missingShmem });
  const snapshot = join(folder, 'snapshot-orphan');
  const content = Buffer.alloc(pages * 4096, 0x3c);
  writeFileSync(snapshot, content);
  const { pidfd, uffd, mappings, memory } = owner.attachment();
  const library = new URL('../../lib/index.js', import.meta.url);
  const places = mappings.map(
    (each) => `{ ...${JSON.stringify({ ...each, address: 0 })}, address: ${each.address}n }`,
  );
  const program = `
    import { superviseGuest } from '${library}';
    superviseGuest({
      attachment: { pidfd: 3, uffd: 4, memory: 5, mappings: [${places}] },
      snapshot: '${snapshot}', prepage: false, onPager: ({ pid }) => console.log(pid),
    });`;
  const supervisor = spawn(process.execPath, ['--input-type=module', '-e', program], {
    stdio: ['ignore', 'pipe', 'inherit', pidfd, uffd as number, memory as number],
  });
  const [said] = (await once(supervisor.stdout as NodeJS.ReadableStream, 'data')) as [Buffer];
  const pager = Number(said.toString());
  supervisor.kill('SIGKILL');
  await once(supervisor, 'exit');
  // It tries to say something twice a second.
  await new Promise((resolve) => setTimeout(resolve, 1500));
  const alive = () => existsSync(`/proc/${pager}/fd/0`);
  expect(alive()).toBe(true);
  expect(Buffer.compare(await owner.content(), content)).toBe(0);
  await expect.poll(alive, { timeout: 10_000 }).toBe(false);
});

test('a supervised guest whose pages are all there is on its own', async () => {
  const owner = await MemoryOwner.start({ pages, shared: true, features: features.missingShmem });
  const snapshot = join(folder, 'snapshot-whole');
  const content = Buffer.alloc(pages * 4096, 0x5a);
  writeFileSync(snapshot, content);
  const supervision = superviseGuest({ attachment: owner.attachment(), snapshot });
  const report = await supervision.done;
  expect(report).toMatchObject({ pagers: 1, stats: { pages, pagesSettled: pages, pagesLost: 0 } });
  expect(Buffer.compare(await owner.content(), content)).toBe(0);
});

test('pages that the snapshot does not have are reported, and fail to be read', async () => {
  const owner = await MemoryOwner.start({ pages, shared: false });
  const snapshot = join(folder, 'snapshot-short');
  writeFileSync(snapshot, Buffer.alloc(100 * 4096, 1));
  const lost: number[] = [];
  const region = owner.attach();
  const service = servePages({
    region,
    snapshot,
    prepage: false,
    onLost: (runs) => void lost.push(...runs.map(({ first }) => first)),
  });
  expect(await owner.ask('read 50')).toBe(String(0x0101010101010101n));
  expect(await owner.ask('read 500')).toBeNull();
  expect(owner.exitSignal ?? 'SIGBUS').toBe('SIGBUS');
  await vi.waitFor(() => expect(lost).toContain(500), { timeout: 20_000 });
  await expect(service.done).rejects.toMatchObject({ code: 'OWNER_GONE' });
  region.close();
});

describe('what is refused', () => {
  const refuses = (options: unknown, pattern: RegExp, code = 'INVALID_ARGUMENT') => {
    let error: unknown = null;
    try {
      Region.attach(options as Parameters<typeof Region.attach>[0]).close();
    } catch (thrown) {
      error = thrown;
    }
    expect(error).toBeInstanceOf(MemferryError);
    expect((error as MemferryError).message).toMatch(pattern);
    expect((error as MemferryError).code).toBe(code);
  };

  test('mappings, page sizes and descriptors that cannot be', async () => {
    const owner = await MemoryOwner.start({ pages: 16, shared: true });
    const good = owner.attachment();
    const at = owner.address;
    const mapping = (change: object) => ({
      ...good,
      mappings: [{ address: at, lengthBytes: 8192, offset: 0, ...change }],
    });
    refuses({ ...good, mappings: [] }, /no mapping/);
    refuses(mapping({ address: at + 1n }), /address is not at a page boundary/);
    refuses(mapping({ address: -4096n }), /no address/);
    refuses(mapping({ address: Number(at) }), /no address/);
    refuses(mapping({ lengthBytes: 100 }), /lengthBytes/);
    refuses(mapping({ lengthBytes: 0 }), /lengthBytes/);
    refuses(mapping({ offset: 5 }), /offset/);
    refuses(mapping({ lengthBytes: 17 * 4096 }), /beyond the end/);
    refuses(mapping({ address: 2n ** 64n - 4096n }), /beyond the address space/);
    refuses({ ...good, mappings: [good.mappings[0], good.mappings[0]] }, /overlap/);
    refuses({ ...good, pageSize: 2 ** 21 }, /pageSize/);
    refuses({ ...good, pidfd: 0.5 }, /pidfd/);
    refuses({ ...good, pidfd: owner.uffd }, /no pidfd/, 'SYSTEM');
    refuses({ ...good, uffd: owner.pidfd }, /no userfaultfd/, 'SYSTEM');
    refuses({ ...good, uffd: 999_999 }, /descriptor/, 'SYSTEM');
    refuses(mapping({ offset: 4096 }), /not the given file/, 'SYSTEM');
    refuses({ ...good, memory: undefined }, /its memory must be given/, 'SYSTEM');
    await owner.ask('unmap 3 1');
    refuses(good, /not mapped/, 'SYSTEM');
  });

  test('a process that has ended', async () => {
    const owner = await MemoryOwner.start({ pages: 16, shared: false });
    const options = owner.attachment();
    owner.child.kill('SIGKILL');
    await new Promise((resolve) => owner.child.once('exit', resolve));
    refuses(options, /ended/, 'OWNER_GONE');
  });

  test('tracking by write protection without a userfaultfd that can', async () => {
    const owner = await MemoryOwner.start({ pages: 16, shared: false });
    const region = owner.attach();
    open.push({ close: () => region.close() });
    expect(DirtyTracker.create(region).name).toMatch(/^(soft-dirty|hash-diff)$/);
    expect(() => DirtyTracker.create(region, 'uffd-wp-async')).toThrow(/WP_ASYNC/);
    expect(region.views).toEqual([]);
    expect(await region.digest()).toMatch(/^[0-9a-f]{32}$/);
  });

  test('a userfaultfd that was left to memferry gets what is needed', async () => {
    const owner = await MemoryOwner.start({ pages: 16, shared: false, features: null });
    const region = owner.attach();
    open.push({ close: () => region.close() });
    expect(DirtyTracker.create(region).name).toBe('uffd-wp-async');
  });
});
