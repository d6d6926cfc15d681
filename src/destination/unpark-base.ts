/**
 * What an unparked guest need not gather: image files of this host, each of them compared with what the VMD says of the
 * guest's pages (docs/protocol.md, "Hashes of what a server holds"). Nothing of them is believed; what cannot be read
 * costs the base, not the unpark. JavaScript thread.
 */
import { readBase } from '../base-files.js';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer, RegionBase } from '../guest.js';
import type { NativeBaseImage } from '../native.js';
import type { ResolvedUnparkOptions } from '../options.js';
import type { ImageInfo } from '../protocol/stage-messages.js';

export interface UnparkBase {
  /** In the order of the regions; null: there is none for any. */
  images: (NativeBaseImage | null)[] | null;
  /** Why there is none, where one was asked for; for reports. */
  problem: string | null;
}

/**
 * Before anything is claimed: a base for a region that the guest has not is a mistake of the caller's.
 * @throws INVALID_ARGUMENT
 */
export function checkBaseRegions(base: ResolvedUnparkOptions['base'], info: ImageInfo | null): void {
  if (!base || !('images' in base)) return;
  const names = new Set(info?.regions.map(({ name }) => name));
  for (const name of Object.keys(base.images)) {
    if (names.has(name)) continue;
    throw new MemferryError('INVALID_ARGUMENT', `unpark.base.images: the guest has no region '${name}'`, {
      facts: { regions: [...names] },
    });
  }
}

/** What the guest brings itself comes first; of that, image files are what can be compared. */
export async function unparkBase(
  guest: Pick<ArrivingGuest, 'bases'>,
  offer: GuestOffer,
  base: ResolvedUnparkOptions['base'],
): Promise<UnparkBase> {
  const own = offer.regions.map((_, index) => imageOf(guest.bases?.[index]));
  if (own.some((image) => image !== null)) return { images: own, problem: null };
  if (!base) return { images: null, problem: null };
  if ('images' in base) {
    const given = new Map(Object.entries(base.images));
    return { images: offer.regions.map(({ name }) => imageOf(asBase(given.get(name)))), problem: null };
  }
  const files = await readBase(base.directory, offer, base);
  if (!files) return { images: null, problem: `no base of '${offer.name}' is in ${base.directory}` };
  return { images: offer.regions.map((_, index) => imageOf(files.bases[index])), problem: null };
}

const asBase = (given: string | { path: string; offsetBytes: number } | undefined) =>
  typeof given === 'string' ? { path: given } : given;

function imageOf(base: RegionBase | null | undefined): NativeBaseImage | null {
  return base && 'path' in base ? { path: base.path, offsetBytes: base.offsetBytes ?? 0 } : null;
}
