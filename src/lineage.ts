/**
 * The lineage of a guest: 32 random bytes that go with it from host to host, sealed in each offer. Whoever shows them
 * is, or was, a host of this guest: a stored base of it is laid out for nobody else (base-files.ts). Made when it is
 * first needed; kept by the regions, since these are what arrives and leaves again.
 */
import { randomBytes, timingSafeEqual } from 'node:crypto';
import type { Region } from './region.js';

export const lineageBytes = 32;

const known = new WeakMap<Region, Uint8Array>();

/** Of the guest that has these regions. */
export function lineageOf(regions: readonly Region[]): Uint8Array {
  const found = regions.map((region) => known.get(region)).find((each) => each !== undefined);
  if (found) return found;
  const made = Uint8Array.from(randomBytes(lineageBytes));
  inherit(regions, made);
  return made;
}

/** A guest has arrived in these regions. */
export function inherit(regions: readonly Region[], lineage: Uint8Array): void {
  for (const region of regions) known.set(region, lineage);
}

export function sameLineage(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === lineageBytes && b.length === lineageBytes && timingSafeEqual(a, b);
}
