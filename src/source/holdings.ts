/** What a guest that leaves takes hold of, and how it is let go of again. Owned by one migration; JavaScript thread. */
import { MemferryError } from '../errors.js';
import type { ImageSet } from '../staging/image-set.js';
import type { DirtyTracker } from '../trackers.js';
import type { SourceEngine } from './engine.js';
import type { SourceSession } from './session.js';

/** In the order in which they are had. */
export class Holdings {
  /** May be called twice. */
  releaseRegions = (): void => {};
  session: SourceSession | null = null;
  images: ImageSet | null = null;
  trackers: (DirtyTracker | null)[] = [];
  /** Of the regions, in bytes, as whoever is to hold them was told. */
  lengths: number[] = [];
  engine: SourceEngine | null = null;

  requireEngine(): SourceEngine {
    if (!this.engine) throw new MemferryError('CANCELLED', 'the migration is over');
    return this.engine;
  }

  /**
   * Twice is fine.
   * @param dissolve what was staged for a guest that stays here is nobody's; a destination dissolves its own image
   */
  async letGo(goodbye: boolean, reason: MemferryError, dissolve: boolean): Promise<void> {
    this.engine?.close(goodbye, reason);
    if (dissolve) await this.images?.dissolve().catch(() => {});
    await this.images?.close();
    await this.session?.close(goodbye);
    this.freeMemory();
  }

  /** Of an engine that is closed. Twice is fine. */
  freeMemory(): void {
    for (const tracker of this.trackers) tracker?.close();
    this.releaseRegions();
  }
}
