/** The guest runs at the destination: what only this side has of it leaves. JavaScript thread. */
import type { ImageSet } from '../staging/image-set.js';
import type { SourceEngine } from './engine.js';

/**
 * Resolves when every page has been acknowledged by whoever holds it, and no lease ends the image any more.
 * @param pushing post-copy: called before the push; null: every page was there before the guest
 */
export async function pushRest(
  engine: SourceEngine,
  images: ImageSet | null,
  pushing: (() => void) | null,
): Promise<void> {
  // From here on no lease may end the image. The push need not wait for it; eviction does.
  const committed = images?.commit();
  committed?.catch(() => {});
  if (pushing) {
    pushing();
    await engine.push();
  }
  // A server that has nothing of the guest any more need not answer.
  for (const [ordinal, { failed }] of engine.stats().servers.entries()) {
    if (failed !== null) images?.giveUp(ordinal, failed);
  }
  await committed;
}
