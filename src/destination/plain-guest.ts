/** A guest that is memory alone: what a destination makes of an offer when it was not told how to accept one. */
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { Region } from '../region.js';

/** Throws MODULE_REFUSED for a guest that wants code run, NO_MEMORY. */
export function allocateGuest(offer: GuestOffer): ArrivingGuest {
  if (offer.module) {
    throw new MemferryError(
      'MODULE_REFUSED',
      `module '${offer.module.name}' is not on the list: this listener runs none`,
    );
  }
  const regions: Region[] = [];
  const close = () => {
    for (const region of regions) region.close();
  };
  try {
    for (const { lengthBytes } of offer.regions) regions.push(Region.allocate({ lengthBytes }));
  } catch (error) {
    close();
    throw error;
  }
  return { regions, prepare: async () => {}, resume: () => {}, abandon: close };
}
