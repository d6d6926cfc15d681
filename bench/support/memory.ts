/** Content for regions: random bytes of a fixed seed, and pages in random order. */

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
