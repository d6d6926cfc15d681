/**
 * The table that a serving guest keeps in its region, and the messages by which it is asked. A slot's content
 * follows from its key and version, so that a client can tell a right answer from a torn or stale one.
 */

/** YCSB's record. */
export const slotBytes = 1024;
const slotWords = slotBytes / 4;

/** [id, operation, key, version], 32-bit words each, little-endian. */
export const requestBytes = 16;
export const operations = { get: 1, put: 2 } as const;
/** [id, key] and, for a get, the slot. */
export const answerHeaderBytes = 8;

function mixed(key: number, version: number): number {
  const state = Math.imul(key ^ 0x5bd1e995, 0x9e3779b1) ^ Math.imul(version + 1, 0x85ebca6b);
  return (state ^ (state >>> 15)) | 1;
}

/** `words`: the slot, of `slotWords` words from `at` on. */
export function writeSlot(words: Uint32Array, at: number, key: number, version: number): void {
  words[at] = key;
  words[at + 1] = version;
  let state = mixed(key, version);
  for (let i = at + 2; i < at + slotWords; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = state;
  }
}

/** The slot's version, or null where its words are not those of any one version of this key. */
export function versionOf(words: Uint32Array, key: number): number | null {
  const version = words[1] as number;
  if (words[0] !== key) return null;
  let state = mixed(key, version);
  for (let i = 2; i < slotWords; i++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    if (words[i] !== state >>> 0) return null;
  }
  return version;
}

export function fillTable(buffer: ArrayBufferLike): void {
  const words = new Uint32Array(buffer);
  for (let key = 0, at = 0; at < words.length; key++, at += slotWords) writeSlot(words, at, key, 0);
}
