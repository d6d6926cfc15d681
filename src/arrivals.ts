/**
 * Which regions are still waiting for pages of a migration that brought them here, so that a guest that
 * leaves again waits for its last page instead of being refused. Keyed by the region object itself.
 */
import type { Region } from './region.js';

const arriving = new WeakMap<Region, Promise<unknown>>();

/** `complete` settles when the region has every page, or never will. */
export function markArriving(region: Region, complete: Promise<unknown>): void {
  arriving.set(region, complete);
  const forget = () => {
    if (arriving.get(region) === complete) arriving.delete(region);
  };
  complete.then(forget, forget);
}

/** The regions of `regions` that still wait for pages. */
export function stillArriving(regions: readonly Region[]): Promise<unknown>[] {
  return regions.flatMap((region) => arriving.get(region) ?? []);
}
