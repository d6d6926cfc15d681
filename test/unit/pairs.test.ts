/** The rows of the combinations: every pair that is possible is in one, and none that is not. */
import { describe, expect, test } from 'vitest';
import { coverPairs } from '../support/pairs.js';

const axes = { a: [1, 2, 3], b: ['x', 'y'], c: [true, false], d: [0, 1, 2, 3, 4] } as const;
const names = ['a', 'b', 'c', 'd'] as const;

describe.each([1, 2, 3])('seed %i', (seed) => {
  test('every pair, in fewer rows than there are combinations', () => {
    const rows = coverPairs(axes, seed);
    for (const [i, one] of names.entries()) {
      for (const other of names.slice(i + 1)) {
        for (const x of axes[one]) {
          for (const y of axes[other])
            expect(rows.some((row) => row[one] === x && row[other] === y)).toBe(true);
        }
      }
    }
    expect(rows.length).toBeLessThan(30);
  });

  test('but for those that cannot be', () => {
    const excluded = (row: Partial<Record<'a' | 'b' | 'c' | 'd', unknown>>) => row.a === 1 && row.b === 'x';
    const rows = coverPairs(axes, seed, excluded);
    expect(rows.filter(excluded)).toEqual([]);
    expect(rows.some(({ a, c }) => a === 1 && c)).toBe(true);
    expect(rows.some(({ b, d }) => b === 'x' && d === 4)).toBe(true);
  });
});
