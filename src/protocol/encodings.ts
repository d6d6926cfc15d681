/**
 * How pages may be encoded on the way, by name in offers and by flag for the native engines (native/wire/frame.h). Each
 * is used only where both ends know it: the source offers, the destination (or a VMD server) says which of those it
 * takes, and one that says nothing gets every page as it is. Pure.
 */
import type { ResolvedMigrateOptions } from '../options.js';
import { traitsOf } from './mode-traits.js';

export const encodings = ['lz4', 'zstd', 'delta'] as const;
export type PageEncoding = (typeof encodings)[number];

const flags: Record<PageEncoding, number> = { lz4: 32, zstd: 64, delta: 128 };

/** What a destination decodes. */
export const decodedHere: readonly PageEncoding[] = encodings;
/** What a VMD server decodes; a delta against what it holds of the same page of the same image. */
export const decodedByServers: readonly PageEncoding[] = encodings;
/** What a destination may be answered with by VMD servers. */
export const packedByServers: readonly PageEncoding[] = ['lz4', 'zstd'];

/** What a source with these options may want to send. */
export function wantedEncodings(
  options: Pick<ResolvedMigrateOptions, 'compress' | 'deltaCacheBytes' | 'mode'>,
): PageEncoding[] {
  const { compress, deltaCacheBytes, mode } = options;
  const codecs: PageEncoding[] = compress === 'auto' ? ['lz4', 'zstd'] : compress === 'off' ? [] : [compress];
  return deltaCacheBytes > 0 && traitsOf(mode).rounds ? [...codecs, 'delta'] : codecs;
}

/** Of what one side names, what the other one knows too; names that nobody knows yet are passed over. */
export function agreedEncodings(named: readonly string[], known: readonly PageEncoding[]): PageEncoding[] {
  return known.filter((encoding) => named.includes(encoding));
}

export function encodingFlags(agreed: readonly PageEncoding[]): number {
  return agreed.reduce((sum, encoding) => sum | flags[encoding], 0);
}
