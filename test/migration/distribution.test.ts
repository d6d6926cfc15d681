/**
 * Page distribution between real processes: hosts whose guests are sampled, VMD servers that count, a share that is
 * filled; with servers that are killed and come again, and a budget that shrinks. What is in the share is read from its
 * file, byte by byte.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, expect, test } from 'vitest';
import { loadAddon } from '../../src/addon.js';
import type { NativeShare } from '../../src/native.js';
import { type Distribution, distribute } from '../../src/share/distribution.js';
import type { SamplingStats } from '../../src/share/sampling.js';
import { domainKey } from '../../src/source/dedup-domain.js';
import { counter, forEachTest, loopbackOfItsOwn, command as run } from '../support/command-line.js';
import { pageOf } from '../support/sampled-host.mjs';
import { digestOf, readShare } from '../support/share-file.js';

const place = forEachTest();
const domain = 'images';
const key = domainKey(Buffer.from('a'.repeat(64)), domain);
const program = fileURLToPath(new URL('../support/sampled-host.mjs', import.meta.url));
const hosts: ChildProcess[] = [];
const distributions: Distribution[] = [];
const shares: NativeShare[] = [];

afterEach(async () => {
  await Promise.all(distributions.splice(0).map((each) => each.close()));
  for (const share of shares.splice(0)) share.close();
  for (const host of hosts.splice(0)) host.kill('SIGKILL');
});

async function server(address = '127.0.0.1:0') {
  const there = run(
    'stage',
    ...['--listen', address, '--memory', '64Mi', '--no-announce', '--secret-file', place.secretFile],
  );
  const { port } = await there.next('listening');
  return { ...there, address: address.replace(/:0$/, `:${port}`) };
}

/** What `memferry status` says. */
async function statusOf(address: string) {
  const asked = run('status', address, '--secret-file', place.secretFile);
  expect(await asked.closed, asked.errors()).toBe(0);
  return asked.lines.at(-1);
}

const connection = (via: string[]) => ({ via, secretFile: place.secretFile, dedup: { domain } });

interface GuestSpec {
  base: number;
  basePages: number;
  own: number;
  ownPages: number;
}

interface SampledHost {
  child: ChildProcess;
  /** How it has ended; null while it lives. */
  ended: string | null;
  stats: SamplingStats[];
  processCpuMs: number;
  /** When these were the figures, by its own clock. */
  atMs: number;
}

function host(guests: GuestSpec[], via: string[], more: object = {}): SampledHost {
  const sample = { ...connection(via), cpuShare: 0.2, passIntervalMs: 50, ...more };
  const child = fork(program, [JSON.stringify({ guests, sample })]);
  const made: SampledHost = { child, ended: null, stats: [], processCpuMs: 0, atMs: 0 };
  child.on('message', (message: Omit<SampledHost, 'child' | 'ended'>) => Object.assign(made, message));
  child.once('exit', (code, signal) => {
    made.ended = `${code ?? signal}`;
  });
  hosts.push(child);
  return made;
}

async function share(via: string[], budgetBytes: number) {
  const path = join(place.directory, 'share');
  const native = loadAddon().openShare({ path, key, budgetBytes }) as NativeShare;
  shares.push(native);
  const distribution = await distribute({ native }, { ...connection(via), intervalMs: 100 });
  distributions.push(distribution);
  return { path, native, distribution };
}

async function until(
  what: string,
  holds: () => boolean | Promise<boolean>,
  describe: () => unknown = () => null,
): Promise<void> {
  // Who dials again in vain waits up to 15 s between two attempts.
  const end = performance.now() + 90_000;
  while (!(await holds())) {
    if (performance.now() > end) throw new Error(`waited for ${what}: ${JSON.stringify(describe())}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

const digests = (image: number, pages: number) =>
  Array.from({ length: pages }, (_, at) => digestOf(key, pageOf(image, at)));

function expectShare(path: string, expected: string[]): void {
  const pages = readShare(path);
  for (const page of pages) expect(digestOf(key, page.bytes)).toBe(page.digest);
  expect(pages.map(({ digest }) => digest).sort()).toEqual([...expected].sort());
}

const basePages = 200;
const ownPages = 60;
/** Four hosts with two guests each, of two base images. */
const fleet = (via: string[], more: object = {}) =>
  [0, 1, 2, 3].map((at) =>
    host(
      [
        { base: 1, basePages, own: 10 + at, ownPages },
        { base: 2, basePages, own: 20 + at, ownPages },
      ],
      via,
      more,
    ),
  );

test('what eight guests on four hosts have in common comes into a share, and nothing of their own', async () => {
  const servers = [await server(), await server()];
  const via = servers.map(({ address }) => address);
  const four = fleet(via);
  const { path, native, distribution } = await share(via, 8 * 2 ** 20);
  await until(
    'the share',
    () => native.stats().pages >= 2 * basePages,
    () => [distribution.stats(), four[0]?.stats],
  );
  const { rounds } = distribution.stats();
  await until('more rounds', () => distribution.stats().rounds > rounds + 3);
  expectShare(path, [...digests(1, basePages), ...digests(2, basePages)]);
  expect(distribution.stats()).toMatchObject({
    pagesHeld: 2 * basePages,
    directories: [{ connected: true }, { connected: true }],
  });
  // The share may have had everything before the last of them joined, or joined again.
  let told: Awaited<ReturnType<typeof statusOf>>;
  await until(
    'everybody to be a member',
    async () => {
      told = await statusOf(via[0] as string);
      return told?.['members'] === 9;
    },
    () => [told, four.map(({ ended, stats }) => [ended, stats])],
  );
  expect(told?.['popularPages']).toBeGreaterThan(basePages / 2);
});

test('a server that is killed and comes again is filled again; what its share was stays', async () => {
  const servers = [await server(), await server(`${loopbackOfItsOwn()}:7100`)];
  const via = servers.map(({ address }) => address);
  const four = fleet(via);
  const { path, native, distribution } = await share(via, 8 * 2 ** 20);
  await until('the share', () => native.stats().pages >= 2 * basePages);
  const [, second] = servers;
  second?.child.kill('SIGKILL');
  await second?.closed;
  await until('the loss to be noticed', () =>
    distribution.stats().directories.some(({ connected, problem }) => !connected && problem !== null),
  );
  await new Promise((resolve) => setTimeout(resolve, 500));
  expectShare(path, [...digests(1, basePages), ...digests(2, basePages)]);
  const again = await server(second?.address);
  const all = () => [
    distribution.stats().directories,
    ...four.flatMap(({ stats }) => stats.map((s) => s.directories)),
  ];
  let told: Awaited<ReturnType<typeof statusOf>>;
  await until(
    'the server to have its pages again',
    async () => {
      told = await statusOf(again.address);
      return Number(told?.['popularPages']) >= basePages / 2;
    },
    () => [told, distribution.stats(), four.map(({ ended, stats }) => [ended, stats])],
  );
  await until(
    'everybody to be back',
    () => all().every((each) => each.every(({ connected }) => connected)),
    all,
  );
  expectShare(path, [...digests(1, basePages), ...digests(2, basePages)]);
});

test('a budget that shrinks takes what fewest have', async () => {
  const via = [(await server()).address];
  host(
    [
      { base: 1, basePages: 60, own: 2, ownPages: 60 },
      { base: 1, basePages: 60, own: 2, ownPages: 60 },
    ],
    via,
  );
  host(
    [
      { base: 1, basePages: 60, own: 3, ownPages: 10 },
      { base: 1, basePages: 60, own: 4, ownPages: 10 },
    ],
    via,
  );
  const { path, native, distribution } = await share(via, 8 * 2 ** 20);
  await until(
    'all counts',
    () => readShare(path).filter(({ score }) => score >= 4 * 256).length === 60,
    () => [native.stats(), distribution.stats()],
  );
  await until('all pages', () => native.stats().pages === 120);
  await native.setBudget(64 * 4096);
  expect(native.stats().bytesUsed).toBeLessThanOrEqual(64 * 4096);
  const left = new Set(readShare(path).map(({ digest }) => digest));
  expect(digests(2, 60).filter((each) => left.has(each))).toHaveLength(Math.max(0, left.size - 60));
  expect(digests(1, 60).filter((each) => left.has(each))).toHaveLength(Math.min(60, left.size));
  const { rounds } = distribution.stats();
  await until('more rounds', () => distribution.stats().rounds > rounds + 3);
  expect(native.stats().bytesUsed).toBeLessThanOrEqual(64 * 4096);
});

test('the commands: share is filled by --via while guests are sampled, and gives back what SIGHUP tells it to', async () => {
  const via = [(await server()).address];
  fleet(via);
  const [file, budget] = [join(place.directory, 'share'), join(place.directory, 'budget')];
  writeFileSync(budget, '8Mi');
  const sharing = run(
    'share',
    ...['--dedup-domain', domain, '--via', via.join(','), '--interval', '100ms', '--file', file],
    ...['--budget-file', budget, '--secret-file', place.secretFile],
  );
  await sharing.next('sharing');
  const pages = () => Number(sharing.lines.findLast(({ type }) => type === 'stats')?.['pages'] ?? 0);
  await until(
    'the share',
    () => pages() === 2 * basePages,
    () => sharing.lines.at(-1),
  );
  expectShare(file, [...digests(1, basePages), ...digests(2, basePages)]);
  writeFileSync(budget, '512Ki');
  sharing.child.kill('SIGHUP');
  await until('the smaller share', () => pages() > 0 && pages() < 128);
  sharing.child.kill('SIGINT');
  expect(await sharing.closed, sharing.errors()).toBe(0);
  expect(readShare(file).length).toBeLessThan(128);
});

test('send --sample: a guest on the command line is a member, until it leaves', async () => {
  const there = await server();
  const here = run(
    'send',
    ...['--to', '127.0.0.1:1', '--module', `counter=${counter}`, '--via', there.address],
    ...['--sample', '--dedup-domain', domain, '--secret-file', place.secretFile],
  );
  await here.next('started');
  const members = async (count: number) => {
    let told: unknown;
    await until(
      `${count} members`,
      async () => {
        told = (await statusOf(there.address))?.['members'];
        return told === count;
      },
      () => told,
    );
  };
  await members(1);
  here.child.stdin.end();
  // Nobody waits at its destination.
  expect(await here.closed).not.toBe(0);
  await members(0);
});

test('another domain, and a host without the secret, get nothing', async () => {
  const via = [(await server()).address];
  const sampled = fleet(via);
  const native = loadAddon().openShare({
    path: join(place.directory, 'other'),
    key: domainKey(Buffer.from('a'.repeat(64)), 'x'),
    budgetBytes: 2 ** 23,
  }) as NativeShare;
  shares.push(native);
  const other = await distribute({ native }, { ...connection(via), dedup: { domain: 'x' }, intervalMs: 50 });
  distributions.push(other);
  const secret = 'b'.repeat(64);
  const stranger = await distribute(
    { native },
    { via, secret, dedup: { domain, secret: 'a'.repeat(64) }, intervalMs: 50 },
  );
  distributions.push(stranger);
  await until('pages to be given', () =>
    sampled.some(({ stats }) => stats.some(({ pagesGiven }) => pagesGiven > 0)),
  );
  await until('rounds', () => other.stats().rounds > 5);
  await until('the refusal', () => stranger.stats().directories[0]?.problem !== null);
  expect(native.stats().pages).toBe(0);
  expect(stranger.stats()).toMatchObject({ rounds: 0, directories: [{ connected: false }] });
});

test('sampling takes its share of a core and no more', async () => {
  const via = [(await server()).address];
  const sampled = host([{ base: 1, basePages: 4000, own: 2, ownPages: 4000 }], via, {
    cpuShare: 0.02,
    passIntervalMs: 1,
  });
  await until('the first figures', () => sampled.stats.length > 0);
  const figures = () => ({ cpuMs: sampled.stats[0]?.cpuMs ?? 0, atMs: sampled.atMs });
  const before = figures();
  // At its share this is two seconds' worth; a sampler that takes more is through sooner, and its quotient too large.
  await until('40 ms of sampling', () => figures().cpuMs - before.cpuMs >= 40);
  const after = figures();
  expect(sampled.stats[0]?.pagesHashed).toBeGreaterThan(0);
  expect((after.cpuMs - before.cpuMs) / (after.atMs - before.atMs)).toBeLessThan(0.06);
});
