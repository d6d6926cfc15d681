/**
 * Which regions are still waiting for pages of a migration that brought them here, so that a guest that
 * leaves again waits for its last page instead of being refused. Keyed by the region object itself.
 */
import { memferryError } from './errors.js';
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

/**
 * That pages may come into these: what two arrivals write into one is neither's.
 * @throws REGION_BUSY where one of them waits for pages, is moving, or is there twice
 */
export function requireFree(regions: readonly Region[]): void {
  const busy = regions.findIndex(
    (region, index) => arriving.has(region) || region.native.claimed() || regions.indexOf(region) !== index,
  );
  if (busy < 0) return;
  throw memferryError(
    'REGION_BUSY',
    `a guest is on its way into region ${busy} already, or out of it: each guest needs regions of its own`,
    { facts: { id: regions[busy]?.id } },
  );
}

const resting = new WeakMap<Region, Promise<unknown>>();

/** `rest` settles when no page comes into the region any more: each is here, or lost. */
export function markResting(region: Region, rest: Promise<unknown>): void {
  resting.set(region, rest);
}

/** Settles, and never rejects, when no arrival brings the region any page more. */
export async function restHere(region: Region): Promise<void> {
  await resting.get(region)?.catch(() => {});
}

const reported = new WeakMap<Region, Promise<unknown>>();

/** `over` settles when the arrival that brought it needs the region no more: its pages are compared after the last came. */
export function markReported(region: Region, over: Promise<unknown>): void {
  reported.set(region, over);
}

/** Settles, and never rejects, when no arrival needs the region any more. */
export async function arrivalOver(region: Region): Promise<void> {
  await reported.get(region)?.catch(() => {});
}
