/**
 * References in the direct modes: a destination that has most of a guest's pages in its page share, which shrinks, is
 * cut off or turns to nonsense meanwhile; guests that come at once; other domains. Every byte is compared with what the
 * journal of writes says.
 */
import { closeSync, openSync, truncateSync, unlinkSync, writeFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { Share } from '../../lib/index.js';
import { endHosts, type Host } from '../support/host.js';
import { expectedPage, pageKind, PageKind } from '../support/oracle.mjs';
import {
  expectIntact,
  expectOneOwner,
  expectRuns,
  expectStands,
  hosts,
  listen,
  migrate,
  PAGES,
  type Report,
  regionsOf,
  report,
  SECRET,
  startGuest,
} from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const pageBytes = 4096;
const pages = 2 * PAGES;
const MB = 1e6;
/** A link that is slower than any hash. */
const bandwidth = 12 * MB;
/** It writes a little, wherever it runs. */
const calm = { batch: 1, restMs: 10 };
/** And where pages are counted next to nothing: what it touches at the destination comes as it is. */
const quiet = { batch: 1, restMs: 100 };
const dedup = { domain: 'd' };

let image: string;
let file: string;
let share: Share | null = null;

beforeEach(() => {
  const name = `memferry-references-${process.pid}-${Math.trunc(performance.now())}`;
  image = join(tmpdir(), `${name}.image`);
  file = join('/dev/shm', name);
});

afterEach(async () => {
  await closeProxies();
  await share?.close();
  share = null;
  for (const path of [image, file]) {
    try {
      unlinkSync(path);
    } catch {
      // Not every test has both.
    }
  }
  await endHosts();
});

/** Four pages in five of how a guest begins, in a share of the domain. Gives how many have content. */
async function prime(domain = 'd'): Promise<number> {
  const out = openSync(image, 'w');
  let content = 0;
  for (let page = 0; page < pages; page++) {
    if (page % 5 === 4 || pageKind(page, pages) !== PageKind.Random) continue;
    writeSync(
      out,
      new Uint8Array(expectedPage(pageBytes / 4, 0, page, 0, pages).buffer),
      0,
      pageBytes,
      page * pageBytes,
    );
    content++;
  }
  closeSync(out);
  share = await Share.open({ budgetBytes: 64 * 2 ** 20, dedup: { domain }, secret: SECRET, file });
  const filled = await share.fill(image);
  expect(filled.inserted).toBe(content);
  return content;
}

interface Referred extends Report {
  dedup: { pagesDeduplicated: number; bytesSaved: number; pagesHashed: number; refused: number } | null;
}

async function expectArrived(a: Host, b: Host, guest = 'g', key = 'main'): Promise<Referred> {
  const figures = (await report(a, key)) as Referred;
  expect(figures).toMatchObject({ state: 'completed', verified: true });
  const arrival = await b.untilArrival(`main/${guest}`, 'complete');
  expect(arrival.ok).toBe(true);
  await expectRuns(b, guest);
  await expectIntact(a, guest);
  await expectStands(a, guest);
  await expectOneOwner([a, b], guest);
  return figures;
}

const modes = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const;

describe.each(modes)('%s', (mode) => {
  const paging = mode === 'post-copy' || mode === 'hybrid';
  const pace = mode === 'pre-copy' ? { maxRounds: 4 } : {};

  test.each([
    { compress: 'off' as const },
    { compress: 'lz4' as const, deltaCacheBytes: 16 * 2 ** 20 },
    { compress: 'auto' as const, channels: 4 },
  ])('most pages are there already: %o', async (options) => {
    const content = await prime();
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { options: { dedup, share: file }, rate: quiet });
    await startGuest(a, regionsOf('allocate', pages), { rate: quiet });
    // What goes before the destination has told what it has goes plainly: not half of it in any case.
    await migrate(a, port, { mode, dedup, bandwidth: bandwidth / 16, ...pace, ...options });
    const figures = await expectArrived(a, b);
    // Written pages are not as they began, and a few went before anything was told.
    expect(figures.dedup?.pagesDeduplicated).toBeGreaterThan(content / 2);
    expect(figures.dedup?.bytesSaved).toBeGreaterThan((content / 2) * 4000);
    expect(figures.bytesOnWire).toBeLessThan(pages * pageBytes);
  });

  test('the share shrinks and grows meanwhile', async () => {
    await prime();
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { options: { dedup, share: file }, rate: calm });
    await startGuest(a, regionsOf('wasm', pages), { rate: calm });
    await migrate(a, port, { mode, dedup, bandwidth: bandwidth / 8, ...pace });
    let over = false;
    const arrived = expectArrived(a, b).finally(() => {
      over = true;
    });
    for (let budget = 6; !over; budget = budget > 1 ? budget - 1 : 6) {
      await share?.setBudget(budget * 2 ** 20);
      if (budget === 6) await share?.fill(image);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    const figures = await arrived;
    expect(figures.dedup?.pagesHashed).toBeGreaterThan(0);
  });

  test.each([
    ['cut off', (path: string) => truncateSync(path, 100 * pageBytes + 17)],
    ['emptied', (path: string) => truncateSync(path, 0)],
    [
      'overwritten with nonsense',
      (path: string) => writeFileSync(path, Buffer.alloc(2000 * pageBytes, 'nonsense '), { flag: 'r+' }),
    ],
    ['deleted', (path: string) => unlinkSync(path)],
  ] as const)('the share is %s meanwhile', async (_, spoil) => {
    await prime();
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { options: { dedup, share: file }, rate: calm });
    await startGuest(a, regionsOf('shared', pages), { rate: calm });
    await migrate(a, port, { mode, dedup, bandwidth: bandwidth / 8, ...pace });
    if (paging) await b.untilArrival('main/g', 'resumed');
    else await new Promise((resolve) => setTimeout(resolve, 100));
    spoil(file);
    await expectArrived(a, b);
  });
});

test('a share whose header is nonsense is none', async () => {
  await prime();
  writeFileSync(file, 'MFSHARE1 and nonsense', { flag: 'r+' });
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { options: { dedup, share: file }, rate: calm });
  await startGuest(a, regionsOf('allocate', pages), { rate: calm });
  await migrate(a, port, { mode: 'hybrid', dedup, bandwidth });
  const figures = await expectArrived(a, b);
  // But for what the guest itself has twice.
  expect(figures.dedup?.pagesDeduplicated ?? 0).toBeLessThan(pages / 20);
});

test.each([
  ['the source is of another domain', { domain: 'e' }, { dedup, share: true }],
  [
    "the source's domain has another secret",
    { domain: 'd', secret: 'another secret of sixteen' },
    { dedup, share: true },
  ],
  ['the source is of no domain', false, { dedup, share: true }],
  ['the guest has a domain of its own', true, { dedup, share: true }],
  ['the destination is of no domain', { domain: 'd' }, {}],
  ['the share is of another domain', { domain: 'e' }, { dedup: { domain: 'e' }, share: true }],
] as const)(
  '%s: nothing is referred to',
  async (_, ours, { share: shared = false, ...theirs }: { share?: boolean; dedup?: object }) => {
    await prime();
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { options: { ...theirs, ...(shared ? { share: file } : {}) }, rate: calm });
    await startGuest(a, regionsOf('allocate', pages), { rate: calm });
    await migrate(a, port, { mode: 'pre-copy', maxRounds: 3, dedup: ours, bandwidth });
    const figures = await expectArrived(a, b);
    // But for what the guest itself has twice.
    expect(figures.dedup?.pagesDeduplicated ?? 0).toBeLessThan(pages / 20);
  },
);

test('guests that come at once, and one after them, have what the others brought', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { options: { dedup, maxMigrations: 8 }, rate: calm });
  const guests = ['g0', 'g1', 'g2'];
  for (const guest of guests) await startGuest(a, regionsOf('allocate', pages), { guest, rate: calm });
  for (const [index, guest] of guests.entries()) {
    await migrate(
      a,
      port,
      { mode: 'post-copy', dedup, bandwidth: bandwidth / (4 - index) },
      { key: guest, guest },
    );
    await a.untilState('migration', guest, 'postcopy-active');
  }
  let referred = 0;
  for (const guest of guests) {
    referred += (await expectArrived(a, b, guest, guest)).dedup?.pagesDeduplicated ?? 0;
  }
  expect(referred).toBeGreaterThan(0);
});

test('connections that are cut while pages are pushed', async () => {
  await prime();
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { options: { dedup, share: file }, rate: calm });
  const proxy = await TcpProxy.start(port);
  await startGuest(a, regionsOf('allocate', pages), { rate: calm });
  await migrate(a, proxy.port, { mode: 'post-copy', dedup, bandwidth: bandwidth / 16 });
  await a.untilState('migration', 'main', 'postcopy-active');
  for (let cut = 0; cut < 3; cut++) {
    proxy.cut();
    await new Promise((resolve) => setTimeout(resolve, 40));
    proxy.heal();
    await new Promise((resolve) => setTimeout(resolve, 60));
  }
  await expectArrived(a, b);
});
