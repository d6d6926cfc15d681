import { randomBytes } from 'node:crypto';
import { xxhash3 } from 'hash-wasm';
import { describe, expect, it } from 'vitest';
import { loadAddon } from '../../src/addon.js';
import { diffPages, hash, hashImplementation, hashPages } from '../../src/hash.js';
import type { PageRun } from '../../src/trackers.js';

const { pageSize } = loadAddon();

/** The naive twin: byte by byte. */
function naiveDiff(a: Uint8Array, b: Uint8Array, size: number): PageRun[] {
  const runs: PageRun[] = [];
  for (let page = 0; page < a.length / size; page++) {
    let same = true;
    for (let i = page * size; i < (page + 1) * size; i++) same &&= a[i] === b[i];
    if (same) continue;
    const last = runs.at(-1);
    if (last && last.first + last.count === page) last.count++;
    else runs.push({ first: page, count: 1 });
  }
  return runs;
}

describe('hash', () => {
  it('is XXH3_64 with seed 0, as an independent build has it, at every length where it changes its way', async () => {
    const bytes = randomBytes(20_000);
    const lengths = [0, 1, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 512, 1024, 1025, 4096, 16_384, 19_999];
    for (const length of lengths) {
      const view = bytes.subarray(0, length);
      expect(hash(view), `${length} bytes`).toBe(BigInt(`0x${await xxhash3(view)}`));
    }
  });

  it('does not care where the bytes start', () => {
    const bytes = randomBytes(9000);
    for (let offset = 0; offset < 70; offset++) {
      const moved = new Uint8Array(9100);
      moved.set(bytes, offset);
      expect(hash(moved.subarray(offset, offset + bytes.length))).toBe(hash(bytes));
    }
  });

  it('names what it was chosen to run', () => {
    expect(hashImplementation()).toMatch(/^(avx2|sse2|neon|scalar)$/);
  });
});

describe('hashPages', () => {
  for (const size of [512, 4096, 16_384, 65_536]) {
    it(`hashes each page of ${size} bytes by itself`, async () => {
      const bytes = randomBytes(size * 5);
      const hashes = hashPages(bytes, size);
      expect(hashes).toHaveLength(5);
      for (let page = 0; page < 5; page++) {
        const expected = await xxhash3(bytes.subarray(page * size, (page + 1) * size));
        expect(hashes[page]).toBe(BigInt(`0x${expected}`));
      }
    });
  }

  it('writes into an array that it is given, of shared memory too', () => {
    const bytes = new Uint8Array(new SharedArrayBuffer(3 * pageSize)).fill(1);
    const out = new BigUint64Array(new SharedArrayBuffer(24));
    expect(hashPages(bytes, pageSize, out)).toBe(out);
    expect(out[0]).not.toBe(0n);
    expect(out[0]).toBe(out[2]);
  });

  it('refuses what does not fit', () => {
    const bytes = new Uint8Array(2 * pageSize);
    const invalid = { code: 'INVALID_ARGUMENT' };
    expect(() => hashPages(bytes.subarray(1))).toThrow(expect.objectContaining(invalid));
    expect(() => hashPages(bytes, 0)).toThrow(expect.objectContaining(invalid));
    expect(() => hashPages(bytes, 0.5)).toThrow(expect.objectContaining(invalid));
    expect(() => hashPages(bytes, pageSize, new BigUint64Array(1))).toThrow(expect.objectContaining(invalid));
    expect(() => hashPages('x' as never)).toThrow(expect.objectContaining(invalid));
    expect(() => hash({} as never)).toThrow(expect.objectContaining(invalid));
  });

  it('refuses at the boundary too, whoever calls it', () => {
    const addon = loadAddon();
    const bytes = new Uint8Array(2 * pageSize);
    expect(() => addon.hashPages(bytes, 0, new BigUint64Array(2))).toThrow(TypeError);
    expect(() => addon.hashPages(bytes, pageSize, new BigUint64Array(1))).toThrow(TypeError);
    expect(() => addon.hashPages(bytes, pageSize, null as never)).toThrow(TypeError);
    expect(() => addon.diffPages(bytes, bytes.subarray(1), pageSize)).toThrow(TypeError);
  });
});

describe('diffPages', () => {
  it('finds what a comparison byte by byte finds', () => {
    const a = randomBytes(64 * pageSize);
    for (let round = 0; round < 50; round++) {
      const b = Buffer.from(a);
      const changes = randomBytes(2 * (round % 8));
      for (let i = 0; i + 1 < changes.length; i += 2) {
        const page = (changes[i] as number) % 64;
        const at = page * pageSize + (((changes[i + 1] as number) * 16) % pageSize);
        b[at] = (b[at] as number) ^ 1;
      }
      expect(diffPages(a, b)).toEqual(naiveDiff(a, b, pageSize));
    }
  });

  it('notices the last byte of the last page', () => {
    const a = new Uint8Array(3 * pageSize);
    const b = a.slice();
    b[b.length - 1] = 1;
    expect(diffPages(a, b)).toEqual([{ first: 2, count: 1 }]);
  });

  it('refuses views of different lengths', () => {
    const refused = expect.objectContaining({ code: 'INVALID_ARGUMENT' });
    expect(() => diffPages(new Uint8Array(pageSize), new Uint8Array(2 * pageSize))).toThrow(refused);
  });
});
