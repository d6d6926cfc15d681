/** What every guest that arrives comes to, whether a source sent it or it was parked: its report, its losses, its end. */
import { loadAddon } from '../addon.js';
import { markArrived } from '../departed.js';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest } from '../guest.js';
import type { NativeReceiverStats, NativeRun } from '../native.js';
import { within } from '../protocol/bounded.js';
import type { Region } from '../region.js';
import type { ArrivalReport } from '../report.js';
import { callOut, isPromise } from '../tell-listeners.js';

const runningTimeoutMs = 120_000;

export function arrivalReport(
  told: Pick<
    ArrivalReport,
    'migrationId' | 'guest' | 'notRunning' | 'verified' | 'prepareMs' | 'gatherMs' | 'intermediaries'
  > & { baseProblem?: string | null },
  regions: readonly Region[],
  stats: NativeReceiverStats,
): ArrivalReport {
  return {
    ...told,
    heapBytes: regions.reduce((sum, region) => sum + (region.closed ? 0 : region.lengthBytes), 0),
    bytesReceived: stats.bytesReceived,
    pagesReceived: stats.pagesReceived,
    pagesZero: stats.pagesZero,
    remoteFaults: stats.faults,
    extraMemoryBytes: stats.extraMemoryBytes,
    pagesGathered: stats.pagesGathered,
    pagesFromBase: stats.pagesFromBase,
    bytesFromBase: stats.pagesFromBase * loadAddon().pageSize,
    baseProblem: told.baseProblem ?? stats.baseProblem,
    pagesKnown: stats.pagesKnown,
  };
}

/**
 * Never runs here. Resolves in bounded time: that the owner cannot let go of it is a warning, and false, since nobody
 * knows then what becomes of it.
 */
export async function abandonGuest(guest: ArrivingGuest, name: string, boundMs: number): Promise<boolean> {
  try {
    const abandoned = Promise.resolve(guest.abandon());
    await within(abandoned, boundMs, 'PREPARE_TIMEOUT', `no end within ${boundMs} ms`);
    return true;
  } catch (error) {
    process.emitWarning(`guest '${name}' threw in abandon(): ${String(error)}`, {
      code: 'MEMFERRY_ABANDON_THREW',
    });
    return false;
  }
}

/** The guest runs here: whatever its own hook makes of it, the pages are poisoned next. */
export function tellLost(guest: ArrivingGuest, name: string, runs: NativeRun[]): void {
  callOut({ what: `lost() of guest '${name}'`, code: 'MEMFERRY_LOST_THREW' }, () => guest.lost?.(runs));
}

/**
 * resume() must not fail, and there is no way back: the guest belongs to this side. Gives why it does not run, or null;
 * of a guest that is run by somebody else once that is known.
 */
export function resumeHere(guest: ArrivingGuest, name: string): string | null | Promise<string | null> {
  markArrived(guest.regions);
  let resumed: unknown;
  try {
    // One that is asynchronous is what TypeScript takes for one that gives nothing.
    resumed = guest.resume();
  } catch (error) {
    process.emitWarning(`guest '${name}' threw in resume(): ${String(error)}`, {
      code: 'MEMFERRY_RESUME_THREW',
    });
    return String(error);
  }
  const resuming = isPromise(resumed) ? Promise.resolve(resumed) : undefined;
  const running = guest.running ?? resuming;
  if (running === undefined) return null;
  if (resuming && running !== resuming) {
    callOut({ what: `resume() of guest '${name}'`, code: 'MEMFERRY_RESUME_THREW' }, () => resuming);
  }
  return within(running, runningTimeoutMs, 'RESUME_FAILED', 'nobody says whether the guest runs').then(
    () => null,
    (error) => (error instanceof Error ? error.message : String(error)),
  );
}

export function pagesLost(name: string, runs: NativeRun[], why: string): MemferryError {
  const pages = runs.reduce((sum, run) => sum + run.count, 0);
  return new MemferryError(
    'PAGES_LOST',
    `${why}; ${pages} pages of '${name}' are lost, and reading one fails`,
    { facts: { runs, pages } },
  );
}
