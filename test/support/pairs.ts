/** Rows that have every pair of values of every two axes in at least one of them: most faults take two. */
import { randomFrom } from './random.js';

export type Axes = Record<string, readonly unknown[]>;
export type Row<A extends Axes> = { [K in keyof A]: A[K][number] };

/**
 * Greedy, the same for the same seed: each row begins with a pair that is missing, and takes of each other axis the value
 * that covers most. `excluded`: what cannot be combined; a pair of which no row is possible is left out.
 */
export function coverPairs<A extends Axes>(
  axes: A,
  seed: number,
  excluded: (row: Partial<Row<A>>) => boolean = () => false,
): Row<A>[] {
  const random = randomFrom(seed);
  const names = Object.keys(axes);
  const values = (axis: string) => axes[axis] as readonly unknown[];
  const key = (a: string, x: unknown, b: string, y: unknown) => JSON.stringify([a, x, b, y]);
  const missing = new Map<string, Partial<Row<A>>>();
  for (const [i, a] of names.entries()) {
    for (const b of names.slice(i + 1)) {
      for (const x of values(a)) {
        for (const y of values(b)) {
          const pair = { [a]: x, [b]: y } as Partial<Row<A>>;
          if (!excluded(pair)) missing.set(key(a, x, b, y), pair);
        }
      }
    }
  }
  const covered = (row: Record<string, unknown>): string[] => {
    const set = names.filter((name) => name in row);
    return set.flatMap((a, i) => set.slice(i + 1).map((b) => key(a, row[a], b, row[b])));
  };
  const complete = (row: Record<string, unknown>): Record<string, unknown> | null => {
    const open = names.filter((name) => !(name in row));
    if (open.length === 0) return row;
    // In an order of chance, or the first axes would always have the choice.
    const axis = open[Math.floor(random() * open.length)] as string;
    const choices = values(axis)
      .map((value) => ({ ...row, [axis]: value }))
      .filter((next) => !excluded(next as Partial<Row<A>>))
      .map((next) => ({
        next,
        gain: covered(next).filter((pair) => missing.has(pair)).length,
        tie: random(),
      }))
      .sort((x, y) => y.gain - x.gain || x.tie - y.tie);
    for (const { next } of choices) {
      const whole = complete(next);
      if (whole) return whole;
    }
    return null;
  };
  const rows: Row<A>[] = [];
  while (missing.size > 0) {
    const [first, pair] = missing.entries().next().value as [string, Record<string, unknown>];
    const row = complete({ ...pair });
    missing.delete(first);
    if (!row) continue;
    for (const each of covered(row)) missing.delete(each);
    rows.push(row as Row<A>);
  }
  return rows;
}
