/**
 * The copy that a source keeps of a guest that has left: its regions as raw image files, from which it may start when
 * the guest comes back. Written after the eviction, so it costs nobody any time but the memory's release.
 */
import { createHash } from 'node:crypto';
import { mkdir, open, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { nativeAsync } from '../errors.js';
import type { Guest, GuestOffer, RegionBase } from '../guest.js';

export interface StaleCopyOptions {
  directory: string;
  /** A guest with more memory leaves nothing. */
  maxBytes: number;
}

/** Between two looks at the world; some ms. */
const piecePages = 2048;

/** A guest's name comes from a peer: nothing of it may be a path. */
function fileName(guest: string, index: number): string {
  const readable = guest.replace(/[^A-Za-z0-9_-]/g, '_');
  const exact = createHash('sha256').update(guest).digest('hex').slice(0, 16);
  return `${readable}-${exact}-${index}.image`;
}

/**
 * Keeps it. A disk that is full or a directory that cannot be written costs the copy, never the migration, which is
 * over: a warning says so.
 */
export async function keepStaleCopy(guest: Guest, options: StaleCopyOptions | undefined): Promise<boolean> {
  if (!options) return false;
  const regions = guest.regions.map(({ region }) => region);
  const bytes = regions.reduce((sum, region) => sum + region.lengthBytes, 0);
  try {
    if (bytes > options.maxBytes) throw new Error(`${bytes} bytes; ${options.maxBytes} may be kept`);
    await mkdir(options.directory, { recursive: true, mode: 0o700 });
    for (const [index, region] of regions.entries()) {
      const path = join(options.directory, fileName(guest.name, index));
      const made = `${path}.${process.pid}.tmp`;
      try {
        // Others may not read what a guest had in memory.
        const file = await open(made, 'w', 0o600);
        await file.truncate(region.lengthBytes).finally(() => file.close());
        for (let first = 0; first < region.pages; first += piecePages) {
          const count = Math.min(piecePages, region.pages - first);
          await nativeAsync(() => region.native.save(made, first, count));
        }
        await rename(made, path);
      } finally {
        await rm(made, { force: true });
      }
    }
    return true;
  } catch (error) {
    process.emitWarning(`no stale copy of guest '${guest.name}' was kept: ${String(error)}`, {
      code: 'MEMFERRY_NO_STALE_COPY',
    });
    return false;
  }
}

/** What was kept of the guest of this offer, as `ArrivingGuest.bases` takes it; all null when there is nothing. */
export async function staleCopy(
  directory: string,
  offer: Pick<GuestOffer, 'name' | 'regions'>,
): Promise<(RegionBase | null)[]> {
  return Promise.all(
    offer.regions.map(async (_, index) => {
      const path = join(directory, fileName(offer.name, index));
      return stat(path).then(
        (found) => (found.isFile() ? { path } : null),
        () => null,
      );
    }),
  );
}
