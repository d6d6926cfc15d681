/**
 * Everything that can be combined, every pair of it in at least one migration: mode, memory, tracker, compression, deltas,
 * deduplication, base and log, copies, channels, a slow destination. A guest writes throughout, and every byte that arrives
 * is compared with the journal of its writes.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Share } from '../../lib/index.js';
import { change, changeWithLog, saveImages } from '../support/base-images.js';
import { endHosts } from '../support/host.js';
import { coverPairs, type Row } from '../support/pairs.js';
import {
  expectEmpty,
  expectIntact,
  expectOneOwner,
  expectRuns,
  expectStands,
  hosts,
  listen,
  migrate,
  regionsOf,
  report,
  SECRET,
  serversOf,
  startGuest,
  through,
} from '../support/scenario.js';

const MB = 1e6;
const axes = {
  mode: ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid', 'scatter', 'scatter-pre-copy', 'scatter-hybrid'],
  memory: ['allocate', 'shared', 'wasm', 'wasm-shared'],
  tracker: ['auto', 'hash-diff', 'uffd-wp'],
  split: [false, true],
  compress: ['off', 'lz4', 'zstd', 'auto'],
  deltas: [0, 64 * 2 ** 20],
  dedup: [false, true],
  /** `guess`: whether it is used is the source's choice. */
  base: ['none', 'image', 'log', 'wrong log', 'guess'],
  replicas: [1, 2],
  release: [false, true],
  channels: [1, 3],
  destination: ['fast', 'slow'],
} as const;
type Combination = Row<typeof axes>;

/** What is refused, and what means nothing. */
function excluded({ mode, memory, tracker, base, replicas, release }: Partial<Combination>): boolean {
  if (mode && !mode.startsWith('scatter') && (replicas === 2 || release)) return true;
  // Memory that is a worker's alone: nobody there applies a log (test/migration/replay.test.ts has guests that do).
  if (memory === 'wasm' && (base === 'log' || base === 'wrong log')) return true;
  // Write protection that somebody serves is for private memory.
  return tracker === 'uffd-wp' && (memory === 'shared' || memory === 'wasm-shared');
}

/** Each covers all pairs, and with others of three. */
const rows = [1, 2].flatMap((seed) => coverPairs(axes, seed, excluded));
const described = (row: Combination) =>
  Object.keys(axes)
    .map((axis) => `${axis} ${row[axis as keyof Combination]}`)
    .join(', ');

let directory = '';
let share: Share | null = null;
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'memferry-combined-'));
});
afterEach(async () => {
  await share?.close();
  share = null;
  await endHosts();
  await rm(directory, { recursive: true, force: true });
});

async function moves(row: Combination): Promise<void> {
  const { mode, memory, tracker, split, compress, deltas, base, replicas, release, channels } = row;
  const rate = { batch: 2, restMs: 10 };
  const [a, b] = await hosts('a', 'b');
  const servers = await serversOf(mode);
  const regions = regionsOf(memory);
  await startGuest(a, regions, { rate });
  const images = base === 'none' ? [] : await saveImages(a, directory, regions.length);
  const image = images[0] as string;
  const hasLog = base === 'log' || base === 'wrong log';
  const replayLog = hasLog ? await changeWithLog(image, 5) : undefined;
  if (base === 'image' || base === 'guess') await change(image, 5);
  const dedup = row.dedup ? { domain: 'd' } : false;
  if (dedup && images.length > 0) {
    share = await Share.open({
      budgetBytes: 16 * 2 ** 20,
      dedup,
      secret: SECRET,
      file: join(directory, 'share'),
    });
    await share.fill(image);
  }
  const port = await listen(b, {
    ...(base === 'none' ? {} : { bases: images }),
    ...(hasLog ? { replay: base === 'log' ? 'exact' : 'diverge' } : {}),
    rate,
    options: {
      dedup,
      ...(share ? { share: share.path } : {}),
      ...(row.destination === 'slow' ? { bandwidth: 4 * MB, gatherLimit: 4 * MB } : {}),
    },
  });
  await migrate(a, port, {
    ...{ mode, compress, channels, dedup },
    deltaCacheBytes: deltas,
    ...(tracker === 'auto' ? {} : { tracker }),
    splitHugePages: split,
    ...(base === 'none' ? {} : { base: base === 'guess' ? 'auto' : 'always' }),
    ...(replayLog ? { replayLog } : {}),
    ...(mode.startsWith('scatter') ? { replicas, releaseAsEvicted: release } : {}),
    // The guest writes all the time: no round leaves so little.
    ...{ maxRounds: 3, downtimeLimitMs: 0.01 },
    ...through(servers),
  });
  const figures = await report(a);
  expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
  expect(figures.base === null).toBe(base === 'none');
  if (base === 'image' || hasLog) expect(figures.base).toMatchObject({ used: true, problem: null });
  if (hasLog) expect(figures.base).toMatchObject({ replay: 'applied' });
  expect((await b.untilArrival('main/g', 'complete')).ok).toBe(true);
  await expectRuns(b);
  // What was given back is not there to be compared.
  if (!release) await expectIntact(a);
  await expectStands(a);
  await expectOneOwner([a, b]);
  for (const server of servers) await expectEmpty(server);
}

for (const row of rows) test(described(row), () => moves(row));
