/**
 * What every byte of a test guest's memory must be. A page is eight stripes. Version v of a page (v >= 1) wrote
 * stripe v % 8 with words that depend on region, page and v alone; what no version wrote is as the page began.
 * So the number of writes to a page, which travels in the execution state and never with the pages, is enough to
 * compute it; and since a write leaves seven stripes alone, a write onto a page that had not come yet shows.
 */
export const STRIPES = 8;

/** How a page begins, by its number: what engines treat differently. */
export const PageKind = {
  /** Never read nor written. */
  Untouched: 0,
  /** Written with zeros once. */
  Zeroed: 1,
  /** Untouched until the guest writes it. */
  Late: 2,
  Random: 3,
};

/** `initialPages`: pages beyond were gained by growth. */
export function pageKind(page, initialPages) {
  if (page >= initialPages) return PageKind.Late;
  // Runs as well as single pages, so that neither is special.
  if (page % 64 >= 56) return PageKind.Untouched;
  switch (page % 16) {
    case 3:
      return PageKind.Untouched;
    case 5:
      return PageKind.Zeroed;
    case 9:
      return PageKind.Late;
    default:
      return PageKind.Random;
  }
}

export function writable(page, initialPages) {
  const kind = pageKind(page, initialPages);
  return kind === PageKind.Late || kind === PageKind.Random;
}

function mix(a) {
  let h = a | 0;
  h = Math.imul(h ^ (h >>> 16), 0x85ebca6b);
  h = Math.imul(h ^ (h >>> 13), 0xc2b2ae35);
  return h ^ (h >>> 16);
}

/** The words of one version of one stripe; every sixteenth version writes zeros, as guests that free memory do. */
function seedOf(region, page, version) {
  if (version > 0 && mix(page * 31 + version) % 16 === 0) return null;
  return mix(mix(region * 0x9e3779b1 + page) + version * 0x7feb352d);
}

function fillStripe(words, start, count, seed) {
  if (seed === null) {
    words.fill(0, start, start + count);
    return;
  }
  for (let i = 0; i < count; i++) words[start + i] = mix(seed + i);
}

/** Writes version `version` of a page: one stripe of it. `words` is a Uint32Array over the region. */
export function writeVersion(words, wordsPerPage, region, page, version) {
  const count = wordsPerPage / STRIPES;
  fillStripe(words, page * wordsPerPage + (version % STRIPES) * count, count, seedOf(region, page, version));
}

/** How a page begins. */
export function writeFirst(words, wordsPerPage, region, page, initialPages) {
  const kind = pageKind(page, initialPages);
  if (kind === PageKind.Zeroed) words.fill(0, page * wordsPerPage, (page + 1) * wordsPerPage);
  if (kind === PageKind.Random) {
    fillStripe(words, page * wordsPerPage, wordsPerPage, seedOf(region, page, 0));
  }
}

/** The whole page after `version` writes, computed from nothing but the numbers. */
export function expectedPage(wordsPerPage, region, page, version, initialPages) {
  const words = new Uint32Array(wordsPerPage);
  if (pageKind(page, initialPages) === PageKind.Random) {
    fillStripe(words, 0, wordsPerPage, seedOf(region, page, 0));
  }
  const count = wordsPerPage / STRIPES;
  for (let v = Math.max(1, version - STRIPES + 1); v <= version; v++) {
    fillStripe(words, (v % STRIPES) * count, count, seedOf(region, page, v));
  }
  return words;
}

/** The first word of a page that is not what it must be, or null. */
export function comparePage(words, wordsPerPage, region, page, version, initialPages) {
  const expected = expectedPage(wordsPerPage, region, page, version, initialPages);
  const base = page * wordsPerPage;
  for (let i = 0; i < wordsPerPage; i++) {
    if (words[base + i] !== expected[i]) {
      return { region, page, word: i, version, found: words[base + i], expected: expected[i] };
    }
  }
  return null;
}
