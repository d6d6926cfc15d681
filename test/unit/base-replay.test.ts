/**
 * A log that is applied to a base: waited for as long as its own pace promises more than the base has as it is, and called
 * off otherwise. What arrives is the source's memory to the byte, whatever the log has made of it.
 */
import { afterEach, describe, expect, test } from 'vitest';
import {
  type ArrivingGuest,
  type Guest,
  listen,
  migrate,
  type MigrateOptions,
  Region,
} from '../../lib/index.js';

type Apply = NonNullable<ArrivingGuest['replay']>['apply'];

const pages = 2048;
const pageSize = 4096;
const lengthBytes = pages * pageSize;
/** Bytes a second: what differs in half of the pages takes two seconds. */
const bandwidth = 2e6;
const steps = 20;

const open: Region[] = [];
afterEach(() => {
  for (const region of open.splice(0)) region.close();
});
function region(): { region: Region; bytes: Uint8Array } {
  const made = Region.allocate({ lengthBytes });
  open.push(made);
  return { region: made, bytes: made.views[0] as Uint8Array };
}
const rest = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));
/** Pages of a base that is right everywhere else. */
const half = (page: number) => page % 2 === 0;
const all = () => true;

interface Replayed {
  /** Of the arriving region. */
  bytes: Uint8Array;
  /** What the guest has. */
  right: Uint8Array;
}

/** Puts right what is wrong, in steps of so many ms each; gives up between two of them. */
const inSteps =
  (restMs: number, seen: { steps: number }, replayed: () => Replayed): Apply =>
  async (_, { signal, progress }) => {
    progress(0);
    const { bytes, right } = replayed();
    for (let step = 0; step < steps && !signal.aborted; step++) {
      await rest(restMs);
      const from = (step * lengthBytes) / steps;
      bytes.set(right.subarray(from, from + lengthBytes / steps), from);
      seen.steps++;
      progress((step + 1) / steps);
    }
  };

interface Moving {
  wrong?: (page: number) => boolean;
  apply: (replayed: () => Replayed) => Apply;
  expectedMs?: number;
  options?: Partial<MigrateOptions>;
}

async function move({ wrong = half, apply, expectedMs, options = {} }: Moving) {
  const here = region();
  const there = region();
  const base = region();
  for (let page = 0; page < pages; page++) {
    const content = new Uint32Array(here.bytes.buffer, here.bytes.byteOffset + page * pageSize, pageSize / 4);
    for (let i = 0; i < content.length; i++) content[i] = Math.imul(page * 1024 + i + 1, 2654435761);
  }
  base.bytes.set(here.bytes);
  for (let page = 0; page < pages; page++)
    if (wrong(page)) base.bytes.fill(1, page * pageSize, page * pageSize + 64);
  const guest: Guest = {
    name: 'g',
    regions: [{ name: 'r', region: here.region }],
    module: null,
    pause: async () => new Uint8Array(0),
    unpause: () => {},
  };
  await using listening = await listen({
    host: '127.0.0.1',
    port: 0,
    accept: async () => ({
      regions: [there.region],
      bases: [{ region: base.region }],
      replay: {
        apply: apply(() => ({ bytes: there.bytes, right: here.bytes })),
        ...(expectedMs === undefined ? {} : { expectedMs }),
      },
      prepare: async () => {},
      resume: () => {},
      abandon: () => {},
    }),
  });
  const to = `127.0.0.1:${listening.port}`;
  const replayLog = new Uint8Array([1]);
  await using migration = migrate(guest, { to, mode: 'stop-and-copy', bandwidth, replayLog, ...options });
  const report = await migration.done;
  expect(report).toMatchObject({ state: 'completed', verified: true });
  expect(Buffer.compare(there.bytes, here.bytes)).toBe(0);
  return report.base;
}

describe('a log', { timeout: 30_000 }, () => {
  test.each([
    ['of which nobody has said how long it takes', undefined],
    ['that was said to take long', 60_000],
  ])('%s, and that is quick', async (_, expectedMs) => {
    const seen = { steps: 0 };
    const base = await move({
      apply: (replayed) => inSteps(2, seen, replayed),
      ...(expectedMs === undefined ? {} : { expectedMs }),
    });
    expect(seen.steps).toBe(steps);
    expect(base).toMatchObject({ used: true, replay: 'applied', problem: null, pagesSame: pages });
  });

  test.each([
    ['of which nobody has said how long it takes', undefined],
    ['that was said to take no time', 1],
  ])('%s, and that is slow: the base as it is', async (_, expectedMs) => {
    const seen = { steps: 0 };
    const base = await move({
      // Whatever the first steps have put right counts as well.
      apply: (replayed) => inSteps(800, seen, replayed),
      ...(expectedMs === undefined ? {} : { expectedMs }),
    });
    expect(seen.steps).toBeLessThan(steps / 2);
    expect(base).toMatchObject({ used: true, reason: 'saves', replay: 'skipped', problem: null });
    expect(base?.pagesSame).toBeGreaterThanOrEqual(pages / 2);
    expect(base?.pagesSame).toBeLessThan(pages);
  });

  test('that says nothing is called off, and nothing is compared before it has ended', async () => {
    let ended = false;
    const base = await move({
      apply:
        (replayed) =>
        async (_, { signal }) => {
          await new Promise((resolve) => signal.addEventListener('abort', resolve, { once: true }));
          // It heeds the signal late, and writes until then.
          const { bytes } = replayed();
          for (let i = 0; i < 20; i++) {
            bytes.fill(i, 0, lengthBytes / 4);
            await rest(10);
          }
          ended = true;
        },
    });
    expect(ended).toBe(true);
    // Three quarters are as they were, of which half is right.
    expect(base).toMatchObject({ used: true, replay: 'skipped', pagesSame: (3 / 8) * pages });
  });

  test('that is always nearly done costs no more than it could have won', async () => {
    const base = await move({
      apply:
        () =>
        async (_, { signal, progress }) => {
          while (!signal.aborted) {
            progress(0.99);
            await rest(10);
          }
        },
    });
    expect(base).toMatchObject({ used: true, replay: 'skipped', pagesSame: pages / 2 });
    // Half of the pages take two seconds.
    expect(base?.waitMs).toBeLessThan(6000);
  });

  test('that nobody waits for with a base that has nothing in common', async () => {
    const seen = { steps: 0 };
    const base = await move({ wrong: all, apply: (replayed) => inSteps(800, seen, replayed) });
    expect(base).toMatchObject({ used: false, reason: 'nothing-matches', replay: 'skipped', pagesSame: 0 });
    expect(seen.steps).toBeLessThan(steps / 2);
  });

  test('that makes something of a base that has nothing in common', async () => {
    const seen = { steps: 0 };
    const base = await move({ wrong: all, apply: (replayed) => inSteps(2, seen, replayed) });
    expect(base).toMatchObject({ used: true, replay: 'applied', pagesSame: pages });
  });

  test('on a link that is faster than any of it', async () => {
    const base = await move({
      apply: (replayed) => inSteps(50, { steps: 0 }, replayed),
      options: { bandwidth: 0 },
    });
    expect(base).toMatchObject({ replay: 'skipped' });
  });

  test('that fails leaves the base as it is', async () => {
    const base = await move({
      apply: () => async () => {
        throw new Error('no such log');
      },
    });
    expect(base).toMatchObject({ used: true, replay: 'applied', pagesSame: pages / 2 });
    expect(base?.problem).toBe('replay: Error: no such log');
  });

  test('that says odd things of its progress', async () => {
    const base = await move({
      apply:
        () =>
        async (_, { progress }) => {
          for (const odd of [Number.NaN, -1, 2, 0.5, 0.25, Number.POSITIVE_INFINITY, 0.5, 1]) {
            progress(odd);
            await rest(60);
          }
        },
    });
    expect(base).toMatchObject({ used: true, problem: null, pagesSame: pages / 2 });
  });

  test("and base: 'always': waited for until its time is up", async () => {
    const seen = { steps: 0 };
    const base = await move({
      apply: (replayed) => inSteps(400, seen, replayed),
      options: { base: 'always', baseTimeoutMs: 1500 },
    });
    expect(seen.steps).toBeGreaterThan(1);
    expect(seen.steps).toBeLessThan(steps);
    expect(base).toMatchObject({ used: true, reason: 'always', replay: 'skipped' });
  });
});
