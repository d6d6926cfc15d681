/**
 * Deduplication between guests that move through VMD servers: guests with the same memory leave one after the other and
 * at once, in rounds while they write and in the push, servers are lost meanwhile, and every byte is compared with what
 * the journal of writes says.
 */
import { afterEach, expect, test } from 'vitest';
import { endHosts, type Host } from '../support/host.js';
import {
  expectEmpty,
  expectIntact,
  expectOneOwner,
  expectRuns,
  hosts,
  listen,
  migrate,
  PAGES,
  type Report,
  regionsOf,
  report,
  type Stage,
  startGuest,
  startStages,
  via,
} from '../support/scenario.js';

afterEach(async () => {
  await endHosts();
});

const MB = 1e6;
/** The servers get nearly everything, and keep it for as long as the test wants. */
const slow = { bandwidth: 0.5 * MB, gatherLimit: 0.2 * MB };
/** A link that is slower than any hash, on a busy machine too. */
const bandwidth = 8 * MB;
/** It writes a little, wherever it runs. */
const calm = { batch: 1, restMs: 20 };
/** It writes all the time. */
const busy = { batch: 4, restMs: 2 };
const pages = 2 * PAGES;

interface Deduplicated extends Report {
  dedup: { pagesDeduplicated: number; bytesSaved: number; pagesHashed: number; probes: number } | null;
  rounds: (Report['rounds'][number] & { pagesDeduplicated: number })[];
}

async function evicted(host: Host, key: string): Promise<Deduplicated> {
  await host.until(`${key} evicted`, (event) => event.event === 'evicted' && event['key'] === key);
  return (await host.call<{ value: Deduplicated }>('evicted', { key })).value;
}

const move = (a: Host, port: number, guest: string, dedup: unknown, stages: Stage[], more: object = {}) =>
  migrate(a, port, { mode: 'scatter', dedup, bandwidth, ...via(...stages), ...more }, { key: guest, guest });

async function expectArrived(a: Host, b: Host, guests: string[]): Promise<void> {
  await b.call('limit', { limits: { bandwidth: 0, gatherLimit: 0 } });
  for (const guest of guests) {
    expect(await report(a, guest)).toMatchObject({ state: 'completed', verified: true });
    expect(await b.untilArrival(`main/${guest}`, 'complete')).toMatchObject({ ok: true });
    await expectRuns(b, guest);
    await expectIntact(a, guest);
    await expectOneOwner([a, b], guest);
  }
}

test.each([1, 2])('a guest whose pages the servers hold sends references; %i replicas', async (replicas) => {
  const [a, b] = await hosts('a', 'b');
  const stages = await startStages('i', 'j');
  const port = await listen(b, { options: slow, rate: calm });
  for (const guest of ['first', 'second', 'other']) {
    await startGuest(a, regionsOf('allocate', pages), { guest, rate: calm });
  }
  await move(a, port, 'first', { domain: 'd' }, stages, { replicas });
  // How many pages are looked at before they have gone plainly is a matter of speed, and none of what is right.
  const first = await evicted(a, 'first');
  expect(first.dedup?.probes).toBeGreaterThan(0);
  await move(a, port, 'second', { domain: 'd' }, stages, { replicas, bandwidth: bandwidth / 2 });
  const second = await evicted(a, 'second');
  expect(second.dedup?.pagesDeduplicated).toBeGreaterThan(0);
  expect(second.dedup?.bytesSaved).toBeGreaterThan(0);
  // A domain of its own: nobody else's pages count, though they are the same.
  await move(a, port, 'other', true, stages, { replicas });
  const other = await evicted(a, 'other');
  expect(other.dedup?.pagesDeduplicated).toBeLessThan(pages / 8);
  expect(other.dedup?.probes).toBeGreaterThan(0);
  await expectArrived(a, b, ['first', 'second', 'other']);
  for (const stage of stages) await expectEmpty(stage);
});

test('guests that leave at once, with a server that is lost meanwhile', async () => {
  const [a, b] = await hosts('a', 'b');
  const [i, j] = await startStages('i', 'j');
  const port = await listen(b, { options: slow, rate: calm });
  const guests = ['g0', 'g1', 'g2'];
  for (const guest of guests) await startGuest(a, regionsOf('shared', pages), { guest, rate: calm });
  await Promise.all(guests.map((guest) => move(a, port, guest, { domain: 'd' }, [i, j], { replicas: 2 })));
  for (const guest of guests) await a.untilState('migration', guest, 'postcopy-active');
  await j.host.kill();
  for (const guest of guests) {
    const { dedup } = await evicted(a, guest);
    expect(dedup?.pagesHashed).toBeGreaterThan(0);
    expect(dedup?.probes).toBeGreaterThan(0);
    // Never more than there are, however often a page went.
    expect(dedup?.pagesDeduplicated).toBeLessThanOrEqual(pages);
  }
  await expectArrived(a, b, guests);
  await expectEmpty(i);
});

/** The servers have most of it; what is taken over has to be whole, so it is gathered as fast as it can be. */
const slowDirectly = { bandwidth: 2 * MB };

test.each([
  [1, 'off', 0],
  [2, 'off', 0],
  [1, 'lz4', 2 ** 23],
  [2, 'auto', 2 ** 23],
] as const)(
  'a guest that writes sends references in its rounds; %i replicas, compress %s, %i bytes for deltas',
  async (replicas, compress, deltaCacheBytes) => {
    const [a, b, c] = await hosts('a', 'b', 'c');
    const stages = await startStages('i', 'j');
    const slowPort = await listen(b, { options: slow, rate: calm });
    const port = await listen(c, { options: slowDirectly, rate: busy });
    const more = { replicas, compress, deltaCacheBytes };
    const guests = ['rounds', 'hybrid'];
    await startGuest(a, regionsOf('allocate', pages), { guest: 'first', rate: calm });
    for (const guest of guests) await startGuest(a, regionsOf('allocate', pages), { guest, rate: busy });
    await move(a, slowPort, 'first', { domain: 'd' }, stages, more);
    await evicted(a, 'first');

    await move(a, port, 'rounds', { domain: 'd' }, stages, {
      ...more,
      mode: 'scatter-pre-copy',
      maxRounds: 4,
    });
    const { dedup, rounds } = (await report(a, 'rounds')) as Deduplicated;
    // Pages that pack well go faster than they are hashed, perhaps.
    const some = compress === 'off' ? 1 : 0;
    expect(dedup?.pagesDeduplicated).toBeGreaterThanOrEqual(some);
    expect(dedup?.pagesHashed).toBeGreaterThan(0);
    expect(rounds.reduce((sum, round) => sum + round.pagesDeduplicated, 0)).toBe(dedup?.pagesDeduplicated);
    await move(a, port, 'hybrid', { domain: 'd' }, stages, { ...more, mode: 'scatter-hybrid' });
    expect((await evicted(a, 'hybrid')).dedup?.pagesDeduplicated).toBeGreaterThanOrEqual(some);
    await expectArrived(a, c, guests);
    // Whose pages the others referred to. It was written at neither of them.
    await expectArrived(a, b, ['first']);
    for (const stage of stages) await expectEmpty(stage);
  },
);

test('guests that leave at once, each in a mode of its own, with a server that is lost meanwhile', async () => {
  const [a, b] = await hosts('a', 'b');
  const [i, j, k] = await startStages('i', 'j', 'k');
  const port = await listen(b, { options: slowDirectly, rate: busy });
  const modes = ['scatter', 'scatter-hybrid', 'scatter-pre-copy'] as const;
  for (const guest of modes) await startGuest(a, regionsOf('shared', pages), { guest, rate: busy });
  await Promise.all(
    modes.map((mode) =>
      move(a, port, mode, { domain: 'd' }, [i, j, k], {
        mode,
        replicas: 2,
        maxRounds: 4,
        tracker: 'hash-diff',
      }),
    ),
  );
  await a.untilState('migration', 'scatter', 'postcopy-active');
  await j.host.kill();
  for (const mode of ['scatter', 'scatter-hybrid']) {
    expect((await evicted(a, mode)).dedup?.pagesHashed).toBeGreaterThan(0);
  }
  await expectArrived(a, b, [...modes]);
  for (const stage of [i, k]) await expectEmpty(stage);
});
