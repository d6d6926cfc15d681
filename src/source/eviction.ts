/** The guest runs at the destination: what only this side has of it leaves. JavaScript thread. */
import type { ImageSet } from '../staging/image-set.js';
import type { SourceEngine } from './engine.js';

/** How often it is looked at which servers the engine has given up, while they are asked to keep what they hold. */
const lookMs = 50;

/**
 * Resolves when every page has been acknowledged by whoever holds it, and no lease ends the image any more. A server that
 * does not say so keeps its part for nobody: what it holds goes again, to the destination or to other servers.
 * @param pushing post-copy: called before the push; null: every page was there before the guest
 */
export async function pushRest(
  engine: SourceEngine,
  images: ImageSet | null,
  pushing: (() => void) | null,
): Promise<void> {
  const kept = images ? keepAll(engine, images) : null;
  kept?.catch(() => {});
  if (pushing) {
    pushing();
    await (kept ? engine.pushToKeep(kept) : engine.push());
  }
  await kept;
  // What comes for the image from here on need not wait for those that failed in the push either.
  if (images) giveUpFailed(engine, images);
}

/** A server that has nothing of the guest any more need not answer. */
function giveUpFailed(engine: SourceEngine, images: ImageSet): void {
  for (const [ordinal, { failed }] of engine.stats().servers.entries()) {
    if (failed !== null) images.giveUp(ordinal, failed);
  }
}

/** From here on no lease may end the image. Gives who would let it end, and has pages as far as the engine knows. */
async function keepAll(engine: SourceEngine, images: ImageSet): Promise<{ ordinal: number; why: string }[]> {
  const before = images.failures;
  const looking = setInterval(() => giveUpFailed(engine, images), lookMs);
  try {
    const failures = [...before, ...(await images.commit())];
    const { servers } = engine.stats();
    return failures
      .filter(({ ordinal }) => servers[ordinal]?.failed === null)
      .filter(({ error }) => error.facts.reason !== 'dissolve') // the destination has every page, and says so soon
      .map(({ ordinal, error }) => ({ ordinal, why: `it does not keep what it holds: ${error.message}` }));
  } finally {
    clearInterval(looking);
  }
}
