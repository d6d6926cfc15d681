/**
 * Every mode with pages compressed and sent as deltas, with a guest that writes throughout: every byte is compared with
 * what the journal of writes says, and the report with what must have been encoded.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts } from '../support/host.js';
import {
  expectIntact,
  expectOneOwner,
  expectRuns,
  expectStands,
  hosts,
  listen,
  migrate,
  type Report,
  regionsOf,
  report,
  startGuest,
  startStages,
  via,
} from '../support/scenario.js';

afterEach(async () => {
  await endHosts();
});

interface Encoding {
  pages: number;
  rawBytes: number;
  encodedBytes: number;
  cpuMs: number;
}
type Encoded = Report & { compression: Encoding; delta: Encoding };

const MB = 1e6;
const choices = [
  { compress: 'lz4', deltaCacheBytes: 0 },
  { compress: 'zstd', deltaCacheBytes: 64 * 2 ** 20 },
  { compress: 'auto', deltaCacheBytes: 2 ** 20 },
  { compress: 'off', deltaCacheBytes: 64 * 2 ** 20 },
] as const;
const nothing = { pages: 0, rawBytes: 0, encodedBytes: 0 };

function expectEncoded(figures: Encoded, options: (typeof choices)[number], rounds: boolean): void {
  const { compression, delta } = figures;
  if (options.compress === 'off') expect(compression).toMatchObject(nothing);
  if (options.compress === 'lz4' || options.compress === 'zstd') {
    expect(compression.pages).toBeGreaterThan(0);
    expect(compression.rawBytes).toBe(compression.pages * 4096);
    expect(compression.encodedBytes).toBeLessThan(compression.rawBytes);
  }
  if (options.deltaCacheBytes === 0 || !rounds) expect(delta).toMatchObject(nothing);
  else {
    expect(delta.rawBytes).toBe(delta.pages * 4096);
    expect(delta.encodedBytes).toBeLessThanOrEqual(delta.rawBytes / 2);
  }
}

describe.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const)('%s', (mode) => {
  test.each(choices)('$compress, deltas within $deltaCacheBytes bytes', async (options) => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b);
    await startGuest(a, regionsOf('wasm'));
    const rounds = mode === 'pre-copy' || mode === 'hybrid';
    // The guest writes all the time: no round leaves so little.
    await migrate(a, port, { mode, ...options, ...(rounds ? { downtimeLimitMs: 0.01, maxRounds: 4 } : {}) });
    const figures = (await report(a)) as Encoded;
    expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
    expectEncoded(figures, options, rounds);
    // So there are later rounds, with pages of the first.
    if (rounds && options.deltaCacheBytes > 2 ** 20) {
      expect(figures.delta.pages).toBeGreaterThan(0);
    }
    expect((await b.untilArrival('main/g', 'complete')).ok).toBe(true);
    await expectRuns(b);
    await expectIntact(a);
    await expectStands(a);
    await expectOneOwner([a, b]);
  });
});

// A slow destination: most of what is sent again goes to the one server, which has had it before.
describe.each(['scatter-pre-copy', 'scatter-hybrid'] as const)('%s by one server', (mode) => {
  test.each([1, 2] as const)('deltas with %i copies', async (replicas) => {
    const [a, b] = await hosts('a', 'b');
    const stages = await startStages(...(replicas === 2 ? ['i', 'j'] : ['i']));
    const port = await listen(b, {
      options: { bandwidth: 3 * MB, gatherLimit: 8 * MB },
      rate: { batch: 2, restMs: 5 },
    });
    // So seldom that a round leaves many pages as they are, and so often that some are sent again.
    await startGuest(a, regionsOf('wasm'), { rate: { batch: 2, restMs: 5 } });
    const options = { compress: 'off', deltaCacheBytes: 64 * 2 ** 20 } as const;
    await migrate(a, port, {
      mode,
      maxRounds: 3,
      downtimeLimitMs: 0.01,
      replicas,
      ...options,
      ...via(...stages),
    });
    const figures = (await report(a)) as Encoded;
    expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
    expectEncoded(figures, options, true);
    expect(figures.delta.pages).toBeGreaterThan(0);
    expect((await b.untilArrival('main/g', 'complete')).ok).toBe(true);
    await expectRuns(b);
    await expectIntact(a);
    await expectStands(a);
    await expectOneOwner([a, b]);
  });
});

describe.each(['scatter', 'scatter-pre-copy', 'scatter-hybrid'] as const)('%s', (mode) => {
  test.each(choices)('$compress, deltas within $deltaCacheBytes bytes', async (options) => {
    const [a, b] = await hosts('a', 'b');
    const stages = await startStages('i', 'j');
    const port = await listen(b, {
      options: { bandwidth: (mode === 'scatter' ? 2 : 8) * MB, gatherLimit: 4 * MB },
      rate: { batch: 2, restMs: 5 },
    });
    await startGuest(a, regionsOf('wasm'), { rate: { batch: 2, restMs: 5 } });
    // The guest writes all the time: no round leaves so little.
    const rounds = { maxRounds: 3, downtimeLimitMs: 0.01 };
    await migrate(a, port, { mode, ...rounds, replicas: 2, ...options, ...via(...stages) });
    const figures = (await report(a)) as Encoded;
    expect(figures).toMatchObject({ mode, state: 'completed', verified: true });
    expectEncoded(figures, options, mode !== 'scatter');
    // The guest writes all the time, so what has gone to a server goes there again.
    if (mode !== 'scatter' && options.deltaCacheBytes > 2 ** 20) {
      expect(figures.delta.pages).toBeGreaterThan(0);
    }
    expect((await b.untilArrival('main/g', 'complete')).ok).toBe(true);
    await expectRuns(b);
    await expectIntact(a);
    await expectStands(a);
    await expectOneOwner([a, b]);
  });
});
