/** Whether an offer can be what it says, before anything is allocated for it. Pure. */
import { MemferryError } from '../errors.js';
import type { OfferMessage } from '../protocol/messages.js';

/** Gives the guest's size in bytes. Throws why the offer is declined. */
export function offeredBytes(regions: Readonly<OfferMessage['guest']['regions']>, pageSize: number): number {
  let bytes = 0;
  for (const region of regions) {
    if (region.pageSize !== pageSize) {
      throw new MemferryError(
        'LIMIT_EXCEEDED',
        `pages of ${region.pageSize} bytes; here they have ${pageSize}`,
      );
    }
    if (
      region.lengthBytes % pageSize !== 0 ||
      region.lengthBytes === 0 ||
      region.capacityBytes < region.lengthBytes
    ) {
      throw new MemferryError('PROTOCOL_ERROR', `region '${region.name}' has a length that cannot be`);
    }
    bytes += region.lengthBytes;
  }
  return bytes;
}
