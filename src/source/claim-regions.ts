/** One migration at a time: the regions of a guest are claimed together, or none of them. */
import { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';

/** Gives what lets go of them, which may be called twice. Throws REGION_BUSY. */
export function claimRegions(guest: Guest): () => void {
  const claimed: Guest['regions'][number][] = [];
  const release = () => {
    for (const { region } of claimed.splice(0)) region.native.release();
  };
  for (const entry of guest.regions) {
    if (!entry.region.native.claim()) {
      release();
      throw new MemferryError('REGION_BUSY', `region '${entry.name}' is moving already`, {
        facts: { region: entry.name },
      });
    }
    claimed.push(entry);
  }
  return release;
}
