/** The hot parts over pages that need no region: hashing and diffing, for microbenchmarks and glue. */
import { loadAddon } from './addon.js';
import { memferryError, native } from './errors.js';
import { type PageRun, runsOf } from './trackers.js';

/**
 * XXH3_64 (seed 0) of every page of `view`. It finds accidents, not attacks.
 * @param pageSize in bytes; default the system's. `view` is a whole number of them.
 * @param out where the hashes go, one element a page; default a new array
 * @throws INVALID_ARGUMENT
 */
export function hashPages(
  view: Uint8Array,
  pageSize: number = loadAddon().pageSize,
  out?: BigUint64Array,
): BigUint64Array {
  const pages = wholePages(view, pageSize);
  const hashes = out ?? new BigUint64Array(pages);
  if (!(hashes instanceof BigUint64Array) || hashes.length !== pages) {
    throw memferryError(
      'INVALID_ARGUMENT',
      `out has room for ${hashes.length} hashes; there are ${pages} pages`,
    );
  }
  native(() => loadAddon().hashPages(view, pageSize, hashes));
  return hashes;
}

/** XXH3_64 (seed 0) of the whole view. @throws INVALID_ARGUMENT */
export function hash(view: Uint8Array): bigint {
  return native(() => loadAddon().hash(view));
}

/**
 * The pages at which two equally long views differ, as runs in order.
 * @throws INVALID_ARGUMENT
 */
export function diffPages(a: Uint8Array, b: Uint8Array, pageSize: number = loadAddon().pageSize): PageRun[] {
  wholePages(a, pageSize);
  wholePages(b, pageSize);
  if (a.byteLength !== b.byteLength) {
    throw memferryError(
      'INVALID_ARGUMENT',
      `views of ${a.byteLength} and ${b.byteLength} bytes cannot be compared`,
    );
  }
  return runsOf(native(() => loadAddon().diffPages(a, b, pageSize)));
}

/** Which code hashes on this machine: `avx2`, `sse2`, `neon` or `scalar`. */
export function hashImplementation(): string {
  return loadAddon().hashImplementation();
}

function wholePages(view: Uint8Array, pageSize: number): number {
  if (!(view instanceof Uint8Array)) throw memferryError('INVALID_ARGUMENT', 'pages are in a Uint8Array');
  if (!Number.isSafeInteger(pageSize) || pageSize <= 0) {
    throw memferryError('INVALID_ARGUMENT', `a page size is a positive number of bytes, not ${pageSize}`);
  }
  if (view.byteLength % pageSize !== 0) {
    throw memferryError(
      'INVALID_ARGUMENT',
      `a view of ${view.byteLength} bytes is no whole number of pages of ${pageSize}`,
    );
  }
  return view.byteLength / pageSize;
}
