/** Which dirty trackers a migration has: one for each region, or null where none is wanted. */
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { chooseTracker, DirtyTracker } from '../trackers.js';
import type { StartFromBase } from './start-from-base.js';

/**
 * For rounds, which arm them. Pushes each as it is made, so that whoever owns the list closes those before one that fails.
 * @throws TRACKER_UNAVAILABLE
 */
export function trackersForRounds(
  guest: Guest,
  { tracker, writers, splitHugePages }: ResolvedMigrateOptions,
  trackers: (DirtyTracker | null)[],
): void {
  for (const { region, tracker: kvmLog } of guest.regions) {
    trackers.push(DirtyTracker.create(region, tracker, { writers, splitHugePages, kvmLog }));
  }
}

/**
 * A mode without rounds needs trackers only to compare with a base while the guest runs: armed ones, or none, and then
 * it goes as usual.
 */
export function trackersForBase(
  guest: Guest,
  options: ResolvedMigrateOptions,
  base: StartFromBase,
): (DirtyTracker | null)[] {
  const made: DirtyTracker[] = [];
  try {
    // One that hashes all memory, now and once more in the pause, would cost such a mode more than a base saves.
    const wanted = options.tracker;
    const name = wanted === 'kvm-log' ? wanted : chooseTracker(wanted);
    if (name === 'hash-diff' && options.base !== 'always') return guest.regions.map(() => null);
    return guest.regions.map(({ region, tracker: kvmLog }, index) => {
      if (!base.pages[index]) return null;
      const tracker = DirtyTracker.create(region, name, { writers: options.writers, kvmLog });
      made.push(tracker);
      tracker.arm();
      return tracker;
    });
  } catch {
    for (const tracker of made) tracker.close();
    return guest.regions.map(() => null);
  }
}

/** Of each region; null when there is nothing to compare. What is written after it was compared must be known. */
export function comparablePages(
  base: StartFromBase | null,
  trackers: readonly (DirtyTracker | null)[],
): number[] | null {
  const pages = base?.pages.map((count, index) => (trackers[index] ? count : 0)) ?? [];
  return pages.some((count) => count > 0) ? pages : null;
}
