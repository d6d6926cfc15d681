import { describe, expect, it } from 'vitest';
import { KnownTable } from '../../src/worker/wasm-tables.js';
import { randomFrom } from '../support/random.js';

const PER_INSTANCE = 2 ** 32;

describe('a table of functions as numbers', () => {
  const tableOf = (...entries: number[]) => new KnownTable(entries.length, (slot) => entries[slot] as number);

  it('has four bytes for each only where every entry survives that', () => {
    expect(tableOf(-1, 0, 7, -3, 2 ** 31 - 1).entries).toEqual(Int32Array.of(-1, 0, 7, -3, 2 ** 31 - 1));
    for (const wide of [PER_INSTANCE + 5, 2 ** 31, Number.NaN]) {
      const known = tableOf(1, 2, -2);
      known.set(1, wide);
      expect(known.entries).toEqual(Float64Array.of(1, wide, -2));
      expect([...known.toSettle(Int32Array.of(1, 2, -2))]).toEqual([1, 2]);
    }
  });

  it('keeps in view what is special, also after writes', () => {
    const known = tableOf(4, -2, Number.NaN, -1);
    expect(known.special).toEqual([1, 2]);
    known.set(1, 9);
    known.set(3, -5);
    expect(known.special).toEqual([2, 3]);
  });

  it('finds every slot to settle, and each once', () => {
    const next = randomFrom(20261127);
    const random = () => Math.floor(next() * 2 ** 31);
    let wide = false;
    const entry = () => {
      const kind = random() % 40;
      if (kind === 0 && wide) return Number.NaN;
      if (kind === 1) return -2 - (random() % 9);
      return kind === 2 ? -1 : random() % 5000;
    };
    for (let round = 0; round < 60; round++) {
      wide = round % 2 === 0;
      const length = random() % 3000;
      const here = Float64Array.from({ length }, entry);
      const longer = length + (random() % 3 === 0 ? random() % 600 : 0);
      const entries = Array.from({ length: longer }, (_, slot) =>
        slot < length && random() % 500 > 0 ? (here[slot] as number) : entry(),
      );
      const wanted = wide ? Float64Array.from(entries) : Int32Array.from(entries);
      const expected = [...wanted.keys()].filter((slot) => {
        const now = here[slot];
        return slot >= length || !Object.is(now, wanted[slot]) || !(Number(now) >= -1);
      });
      const found = [...tableOf(...here).toSettle(wanted)];
      expect(found.sort((a, b) => a - b)).toEqual(expected);
    }
  });
});
