/** Waiting for a base, and comparing with it: when it pays by measured rates, and when it steps aside. */
import { describe, expect, test } from 'vitest';
import { sampleNodes, samplePages } from '../../lib/protocol/base-sample.js';
import {
  decideCompare,
  decideReplay,
  decideWait,
  decideWaitWithReplay,
  probeBytes,
  replayBounds,
} from '../../lib/source/decide-base.js';

const GIB = 2 ** 30;
const MIB = 2 ** 20;

describe('decideCompare', () => {
  /** 1 GiB; a sample of 16 MiB that took as long as hashing at this rate does. */
  const given = (linkMBs: number, hashMBs: number, same: number) =>
    decideCompare({
      bytes: GIB,
      pageSize: 4096,
      linkBytesPerSecond: linkMBs * 1e6,
      sampledPages: 4096,
      samePages: Math.round(4096 * same),
      sampleMs: (16 * MIB) / (hashMBs * 1e3),
    });

  test.each([
    // A 1 Gb/s link.
    [119, 2000, 0.8, 'compare', 'saves'],
    [119, 2000, 1, 'compare', 'saves'],
    [119, 200, 0.8, 'compare', 'saves'],
    [119, 2000, 0, 'plain', 'nothing-matches'],
    [119, 2000, 0.005, 'plain', 'nothing-matches'],
    // A tenth of the pages is not worth a hash that is as slow as the link.
    [119, 130, 0.1, 'plain', 'link-is-faster'],
    // Loopback.
    [2500, 2000, 1, 'plain', 'link-is-faster'],
    // 10 Gb/s, a fast hash, and a base that is nearly right.
    [1150, 3000, 0.9, 'compare', 'saves'],
    [1150, 3000, 0.3, 'plain', 'link-is-faster'],
  ] as const)('link %i MB/s, hashes %i MB/s, %f equal: %s', (link, hash, same, action, reason) => {
    expect(given(link, hash, same)).toMatchObject({ action, reason });
  });

  test('what it decides for is never predicted to take longer than plain, and it changes its mind once', () => {
    for (const same of [0, 0.1, 0.5, 0.9, 1]) {
      let compared = true;
      for (let link = 1; link < 20_000; link *= 1.3) {
        const { action, plainMs, compareMs } = given(link, 1500, same);
        if (action === 'compare') expect(compareMs).toBeLessThan(plainMs);
        // The faster the link, the less reason to compare.
        if (!compared) expect(action).toBe('plain');
        compared = action === 'compare';
      }
    }
  });

  test('without a sample there is nothing to go by', () => {
    const input = {
      bytes: GIB,
      pageSize: 4096,
      linkBytesPerSecond: 1,
      sampledPages: 0,
      samePages: 0,
      sampleMs: 0,
    };
    expect(decideCompare(input).action).toBe('plain');
  });
});

describe('decideWait', () => {
  const plainMs = 9000;

  test.each([
    ['at first, whatever is known', { elapsedMs: 10, fraction: 0, expectedMs: null }, 'wait'],
    ['without a word', { elapsedMs: 500, fraction: 0, expectedMs: 0 }, 'give-up'],
    ['a file that is read quickly', { elapsedMs: 300, fraction: 0.5, expectedMs: 0 }, 'wait'],
    ['a disk slower than the link', { elapsedMs: 1000, fraction: 0.05, expectedMs: 0 }, 'give-up'],
    [
      'a log of which nobody knows how long it takes',
      { elapsedMs: 300, fraction: 1, expectedMs: null },
      'give-up',
    ],
    ['a log that takes a second', { elapsedMs: 300, fraction: 0.9, expectedMs: 1000 }, 'wait'],
    [
      'a log that takes longer than the migration',
      { elapsedMs: 300, fraction: 1, expectedMs: 8000 },
      'give-up',
    ],
    ['a log that is late', { elapsedMs: 1800, sinceToldMs: 1500, fraction: 1, expectedMs: 1000 }, 'wait'],
    [
      'one that is far too late',
      { elapsedMs: 3000, sinceToldMs: 2700, fraction: 1, expectedMs: 1000 },
      'give-up',
    ],
  ] as const)('%s', (_, input, decision) => {
    expect(decideWait({ sinceToldMs: 0, worthMs: null, ...input, plainMs })).toBe(decision);
  });

  test('after a sample, as long as the base is worth', () => {
    const input = { elapsedMs: 1000, sinceToldMs: 0, fraction: 0.5, expectedMs: 0, plainMs };
    expect(decideWait({ ...input, worthMs: 7000 })).toBe('wait');
    expect(decideWait({ ...input, worthMs: 900 })).toBe('give-up');
  });

  test('on a link that takes no time nobody waits for long', () => {
    expect(
      decideWait({ elapsedMs: 55, sinceToldMs: 0, fraction: 0.2, expectedMs: 0, plainMs: 50, worthMs: null }),
    ).toBe('give-up');
  });
});

test('whatever is promised, nobody waits for longer than sending everything takes', () => {
  const promising = { sinceToldMs: 0, fraction: 0.999, expectedMs: 0, plainMs: 1000, worthMs: 900 };
  expect(decideWait({ ...promising, elapsedMs: 1000 })).toBe('wait');
  expect(decideWait({ ...promising, elapsedMs: 1100 })).toBe('give-up');
});

describe('a log', () => {
  /** 1 GiB at 119 MB/s, a fifth of it other than the base: 2 s and the hashes by the base, 9 s plainly. */
  const estimate = decideCompare({
    bytes: GIB,
    pageSize: 4096,
    linkBytesPerSecond: 119e6,
    sampledPages: 4096,
    samePages: 3277,
    sampleMs: 8,
  });
  const bounds = replayBounds(9000, estimate);
  const now = (input: object) =>
    decideReplay({ elapsedMs: 500, sinceToldMs: 0, expectedMs: 500, ...bounds, ...input });

  test('could win what differs from the base, and no more', () => {
    expect(estimate.action).toBe('compare');
    expect(bounds.otherwiseMs - bounds.bestMs).toBeGreaterThan(1600);
    expect(bounds.otherwiseMs - bounds.bestMs).toBeLessThan(2000);
    expect(replayBounds(9000, null)).toEqual({ otherwiseMs: 9000, bestMs: 0 });
  });

  test.each([
    ['at first, whatever is known', { elapsedMs: 50, expectedMs: null }, 'wait'],
    ['of which nobody knows how long it takes', { expectedMs: null }, 'skip'],
    ['that takes half of what it could win', { expectedMs: 800 }, 'wait'],
    ['that takes more', { expectedMs: 1200 }, 'skip'],
    ['that has said nothing for a while', { sinceToldMs: 1000, expectedMs: 500 }, 'wait'],
    ['and for longer than its word is good for', { sinceToldMs: 1500, expectedMs: 500 }, 'skip'],
    ['that is always nearly done', { elapsedMs: 2500, expectedMs: 1 }, 'skip'],
  ] as const)('%s', (_, input, decision) => expect(now(input)).toBe(decision));

  test.each([
    ['a base that is worth it as it is, with a log that takes for ever', 0.5, 60_000, 'wait'],
    ['a base that is slow, with a log that takes no time', 0.05, 0, 'give-up'],
  ] as const)('%s, while it is laid out', (_, fraction, expectedMs, decision) => {
    const input = { elapsedMs: 1000, sinceToldMs: 0, fraction, expectedMs, plainMs: 9000 };
    expect(decideWaitWithReplay(input, estimate)).toBe(decision);
  });

  test('may make a base worth its time that is not as it is', () => {
    const nothing = { ...estimate, action: 'plain', worthMs: 0 } as const;
    const input = { elapsedMs: 1000, sinceToldMs: 0, fraction: 0.5, expectedMs: 1000, plainMs: 9000 };
    expect(decideWait({ ...input, worthMs: 0 })).toBe('give-up');
    expect(decideWaitWithReplay(input, nothing)).toBe('wait');
    expect(decideWaitWithReplay({ ...input, expectedMs: 8000 }, nothing)).toBe('give-up');
  });
});

test('a probe and a sample are small parts of what they stand for', () => {
  for (const bytes of [4096, MIB, 64 * MIB, GIB, 64 * GIB]) {
    expect(probeBytes(bytes)).toBeLessThanOrEqual(Math.max(64 * 1024, bytes / 256 + 1));
    expect(probeBytes(bytes)).toBeLessThanOrEqual(4 * MIB);
  }
  for (const nodes of [1, 4, 100, 1024, 65536]) {
    expect(sampleNodes(nodes)).toBeGreaterThanOrEqual(1);
    expect(sampleNodes(nodes)).toBeLessThanOrEqual(Math.max(1, Math.min(16, nodes / 64 + 1)));
  }
});

describe('samplePages', () => {
  test.each([[[1]], [[255, 257]], [[0, 4096, 0]], [[262_144]], [[1000, 0, 131_072, 3]]])(
    '%j',
    (basePages) => {
      const runs = samplePages(basePages);
      const nodes = basePages.reduce((sum, pages) => sum + Math.ceil(pages / 256), 0);
      expect(runs.length).toBeGreaterThan(0);
      expect(runs.length).toBeLessThanOrEqual(sampleNodes(nodes));
      for (const { region, first, count } of runs) {
        expect(first % 256).toBe(0);
        expect(first + count).toBeLessThanOrEqual(basePages[region] as number);
        expect(count === 256 || first + count === basePages[region]).toBe(true);
      }
    },
  );

  test('of nothing is nothing', () => {
    expect(samplePages([0, 0])).toEqual([]);
  });
});
