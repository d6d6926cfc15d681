/** Content for regions: random bytes of a fixed seed, bytes of a file; and pages in random order. */
import { readFileSync } from 'node:fs';

/** xorshift32 over the whole buffer; a view for each seed has other bytes. */
export function fillRandom(buffer: ArrayBufferLike, seed: number): void {
  const words = new Uint32Array(buffer);
  let state = (Math.imul(seed, 0x9e3779b1) ^ 0x6d2b79f5) | 1;
  for (let i = 0; i < words.length; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state;
  }
}

/** The file's bytes, over and over, whole pages of them. */
export function fillFrom(memory: Uint8Array, path: string): void {
  const bytes = readFileSync(path);
  if (bytes.length === 0) throw new Error(`${path} is empty`);
  for (let at = 0; at < memory.length; at += bytes.length) {
    memory.set(bytes.subarray(0, Math.min(bytes.length, memory.length - at)), at);
  }
}

/** Random bytes of which `alike` pages in a thousand, the same ones for every `ownSeed`, depend on `seed` alone. */
export function fillShared(
  buffer: ArrayBufferLike,
  pageSize: number,
  { seed, ownSeed, alike }: { seed: number; ownSeed: number; alike: number },
): void {
  fillRandom(buffer, seed);
  const words = new Uint32Array(buffer);
  const pageWords = pageSize / 4;
  for (let page = 0; page * pageWords < words.length; page++) {
    // Spread out evenly, in no order that anything else here has.
    if ((Math.imul(page, 0x9e3779b1) >>> 0) % 1000 < alike) continue;
    words[page * pageWords] = Math.imul(ownSeed, 0x85ebca6b) ^ page;
    words[page * pageWords + 1] = ownSeed;
  }
}

/** A permutation of 0 .. count-1. */
export function shuffledPages(count: number, seed: number): Uint32Array {
  const order = new Uint32Array(count);
  let state = (Math.imul(seed, 0x9e3779b1) ^ 0x6d2b79f5) | 1;
  for (let i = 0; i < count; i++) order[i] = i;
  for (let i = count; i > 1; i--) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    const j = (state >>> 0) % i;
    const keep = order[i - 1] as number;
    order[i - 1] = order[j] as number;
    order[j] = keep;
  }
  return order;
}
