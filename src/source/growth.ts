/**
 * Memory that grows while it moves: whoever is to hold it is told before the engine may send pages of it. Looked at
 * before each round, and once after the pause. The region's own length is no guide: others take note of growth as well,
 * at any moment. JavaScript thread.
 */
import type { GuestRegion } from '../guest.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import type { SourceMessage } from '../protocol/messages.js';
import type { SourceEngine } from './engine.js';

/**
 * `known`: the lengths that everyone who is to hold the regions knows of, in bytes; brought up to date. `tell` resolves
 * when they have room for `lengthBytes` of region `index`, which are `pages`.
 */
export async function followGrowth(
  regions: readonly GuestRegion[],
  known: number[],
  engine: SourceEngine,
  tell: (index: number, lengthBytes: number, pages: number) => Promise<void>,
): Promise<void> {
  for (const [index, { region }] of regions.entries()) {
    const lengthBytes = region.measure();
    if (lengthBytes <= (known[index] ?? 0)) continue;
    const pages = lengthBytes / region.pageSize;
    await tell(index, lengthBytes, pages);
    known[index] = lengthBytes;
    if (pages > region.pages) region.native.grow(pages);
    engine.toldGrowth(index, pages);
  }
}

/** The destination's memory grows with the guest's; one region at a time. */
export class GrowthWait {
  #grown: Deferred<void> | null = null;

  constructor(
    private readonly send: (message: SourceMessage) => void,
    private readonly signal: AbortSignal,
    private readonly timeoutMs: number,
  ) {}

  /** Rejects with CANCELLED, PREPARE_TIMEOUT, or what fail() was given. */
  async grow(region: number, lengthBytes: number): Promise<void> {
    this.#grown = deferred();
    this.send({ type: 'grow', region, lengthBytes });
    const grown = untilAborted(this.#grown.promise, this.signal);
    // While the guest stands.
    await within(grown, this.timeoutMs, 'PREPARE_TIMEOUT', 'the memory did not grow with the guest');
  }

  onGrown(): void {
    this.#grown?.resolve();
  }

  /** The connection is gone. */
  fail(error: Error): void {
    this.#grown?.reject(error);
  }
}
