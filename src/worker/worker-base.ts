/**
 * Worker guests that start from a base in files (base-files.ts), and the replay of a log on it. The replay runs the
 * guest as it was then, in workers of its own, gives it the log, and copies the memory that comes of it over the base
 * of the guest that arrives. So it takes that memory once more while it lasts. Main thread.
 */
import { type BaseFiles, readBase } from '../base-files.js';
import { memferryError, nativeAsync } from '../errors.js';
import type { ArrivingGuest, GuestOffer, RegionBase } from '../guest.js';
import { untilAborted } from '../protocol/bounded.js';
import type { Region } from '../region.js';
import type { ArrivingWorkerGuest, WorkerGuestsOptions } from './worker-arrival.js';
import type { WorkerGuest } from './worker-guest.js';

/** What arriving worker guests start from, see `WorkerGuestsOptions.base`. */
export interface WorkerBaseOptions {
  /** Where bases lie: what `keepStaleCopy` and `saveBase` have written. */
  directory: string;
  /** For guests that were started anew elsewhere, too: any host with the shared secret can have the base then. */
  anySource?: boolean;
  /**
   * Applies a source's log to the guest as it was: requests, in most cases. Without it logs are ignored. `progress`: how
   * much of the log is applied, 0 to 1; a source waits no longer than that pace promises to be worth.
   */
  replay?: (
    guest: WorkerGuest,
    log: Uint8Array,
    options: { signal: AbortSignal; progress: (fraction: number) => void },
  ) => Promise<void>;
  /** How long a replay takes, in ms, where it is known beforehand. */
  replayMs?: number;
}

export interface WorkerBase {
  bases: readonly (RegionBase | null)[];
  replay?: NonNullable<ArrivingGuest['replay']>;
}

type Start = (
  offer: GuestOffer,
  options: WorkerGuestsOptions,
  signal?: AbortSignal,
) => Promise<ArrivingWorkerGuest>;

/** Null when there is no base for this guest. `regions`: the arriving guest's. */
export async function workerBase(
  offer: GuestOffer,
  regions: readonly Region[],
  options: WorkerGuestsOptions,
  start: Start,
): Promise<WorkerBase | null> {
  const { base } = options;
  const files = base ? await readBase(base.directory, offer, base) : null;
  if (!base || !files) return null;
  const bases = regions.map((_, index) => files.bases[index] ?? null);
  const { replay, replayMs } = base;
  if (!replay || !offer.replayLog) return { bases };
  const apply: NonNullable<WorkerBase['replay']>['apply'] = async (log, { signal, progress }) => {
    const former = await start(files.offer, { ...options, base: undefined, onGuest: undefined }, signal);
    // Whatever is asked of it rejects then; and should the replay wait for something else, nobody waits for that.
    const end = () => void former.guest.terminate().catch(() => {});
    signal.addEventListener('abort', end, { once: true });
    try {
      signal.throwIfAborted();
      const filling = performance.now();
      await untilAborted(run(former, files, signal), signal);
      const replaying = performance.now();
      // What comes of it is copied at about the speed of what was read.
      const copyMs = replaying - filling;
      const ofLog = (fraction: number) => {
        const elapsedMs = performance.now() - replaying;
        if (fraction > 0 && fraction <= 1) progress(elapsedMs / (elapsedMs / fraction + copyMs));
      };
      progress(0);
      await untilAborted(replay(former.guest, log, { signal, progress: ofLog }), signal);
      await former.guest.pause({ signal });
      for (const [index, region] of regions.entries()) {
        const replayed = former.guest.regions[index]?.region;
        if (replayed && !signal.aborted) await copy(replayed, region, signal);
      }
    } finally {
      signal.removeEventListener('abort', end);
      await former.guest.terminate();
    }
  };
  const memoryBytes = files.offer.regions.reduce((sum, { lengthBytes }) => sum + lengthBytes, 0);
  return {
    bases,
    replay: { apply, memoryBytes, ...(replayMs === undefined ? {} : { expectedMs: replayMs }) },
  };
}

/** The guest as it was, from its files. */
async function run(former: ArrivingWorkerGuest, files: BaseFiles, signal: AbortSignal): Promise<void> {
  for (const [index, region] of former.regions.entries()) {
    const base = files.bases[index] as { path: string };
    const bytes = await inPieces(region, signal, (first, count) =>
      region.native.fill(base.path, first * region.pageSize, first, count),
    );
    // A guest that begins in the middle of its memory is none.
    if (bytes < (files.offer.regions[index]?.lengthBytes ?? 0)) {
      throw memferryError('PREPARE_FAILED', `the base of region ${index} is not whole`);
    }
  }
  await former.prepare(files.state, { signal });
  former.resume();
}

function copy(from: Region, to: Region, signal: AbortSignal): Promise<number> {
  return inPieces(to, signal, (first, count) => to.native.fillFrom(from.native, first, count));
}

/** Some ms each, so that it can be called off in between. */
const piecePages = 2048;

async function inPieces(
  region: Region,
  signal: AbortSignal,
  piece: (first: number, count: number) => Promise<number>,
): Promise<number> {
  let bytes = 0;
  for (let first = 0; first < region.pages && !signal.aborted; first += piecePages) {
    bytes += await nativeAsync(() => piece(first, Math.min(piecePages, region.pages - first)));
  }
  return bytes;
}
