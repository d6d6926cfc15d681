/** A source's region has grown before the switchover: ours has to, as far as it may. */
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';

export interface Growth {
  /** Of the region, as the source says it. */
  index: number;
  lengthBytes: number;
}

/**
 * The region that grows. Throws PROTOCOL_ERROR: growth that cannot be. Pure.
 * @param receiving nothing has been prepared yet
 */
export function growingRegion<R extends { pageSize: number }>(
  regions: readonly R[],
  offered: readonly { capacityBytes: number }[],
  { index, lengthBytes }: Growth,
  receiving: boolean,
): R {
  const region = regions[index];
  if (!region || !receiving || lengthBytes % region.pageSize !== 0) {
    throw new MemferryError('PROTOCOL_ERROR', 'growth of a region that is not there, or too late', {
      facts: { region: index, lengthBytes },
    });
  }
  if (lengthBytes > (offered[index]?.capacityBytes ?? 0)) {
    throw new MemferryError('PROTOCOL_ERROR', 'a region that grows beyond its own capacity');
  }
  return region;
}

/**
 * Gives the region's pages. Rejects with PROTOCOL_ERROR, LIMIT_EXCEEDED, or what the guest's own function does.
 * @param takes so many bytes more are about to be taken; throws when they may not be
 */
export async function growGuest(
  guest: ArrivingGuest,
  offer: GuestOffer,
  growth: Growth,
  receiving: boolean,
  takes: (bytes: number) => void,
): Promise<number> {
  const region = growingRegion(guest.regions, offer.regions, growth, receiving);
  const { index, lengthBytes } = growth;
  if (lengthBytes > region.lengthBytes) {
    if (!guest.grow) throw new MemferryError('LIMIT_EXCEEDED', 'this guest cannot grow at the destination');
    takes(lengthBytes - region.lengthBytes);
    await guest.grow(index, lengthBytes);
    region.refresh();
  }
  return lengthBytes / region.pageSize;
}
