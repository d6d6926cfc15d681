/**
 * The lineage of a guest: 32 random bytes that go with it from host to host, sealed in each offer. Whoever shows them
 * is, or was, a host of this guest: a stored base of it is laid out for nobody else (base-files.ts). Made when it is
 * first needed; kept by the regions, since these are what arrives and leaves again.
 */
import { randomBytes, timingSafeEqual } from 'node:crypto';
import type { GuestModule, GuestOffer } from './guest.js';
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

/** What shows whose a stored guest is. */
export interface KnownGuest {
  name: string;
  module: GuestModule | null;
  lineage: Uint8Array;
}

/**
 * Whether a stored guest may be the base of the one that is offered: the same name, module and lineage. Whoever offers
 * a guest learns what equals its base. `anySource`: the lineage does not matter; any host with the shared secret can
 * have the base then (docs/security.md).
 */
export function mayBeBase(
  known: KnownGuest,
  offer: Pick<GuestOffer, 'name' | 'module' | 'lineage'>,
  { anySource = false }: { anySource?: boolean | undefined } = {},
): boolean {
  const shown = offer.lineage !== undefined && sameLineage(offer.lineage, known.lineage);
  return (shown || anySource) && known.name === offer.name && sameModule(known.module, offer.module);
}

function sameModule(a: GuestModule | null, b: GuestModule | null): boolean {
  if (a === null || b === null) return a === b;
  return a.name === b.name && a.sha256.toLowerCase() === b.sha256.toLowerCase();
}

export function sameLineage(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === lineageBytes && b.length === lineageBytes && timingSafeEqual(a, b);
}
