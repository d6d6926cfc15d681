/**
 * `sampleGuest`: what a guest of this process keeps in its memory becomes known to its domain's directory servers, in
 * the background. JavaScript thread; the sampling is a native one.
 */
import { createHmac } from 'node:crypto';
import { loadAddon } from '../addon.js';
import { checkRegion } from '../check-options.js';
import { memferryError, native } from '../errors.js';
import type { Guest } from '../guest.js';
import { lineageOf } from '../lineage.js';
import type { NativeSampler } from '../native.js';
import { resolveSampleOptions, type SampleOptions } from '../options.js';
import { throwIfCancelled } from '../protocol/bounded.js';
import type { Region } from '../region.js';
import { Directories, type DirectoryStatus, directoryKeys } from './directories.js';

/** What a sampler has done so far. */
export interface SamplingStats {
  /** Over the whole of its memory. A page is reported once it had the same content in two. */
  passes: number;
  /** Each time again. */
  pagesHashed: number;
  /** Pages that were reported, each time again: what is reported no longer fades. */
  pagesReported: number;
  /** Whole pages that servers asked for, because others have them too, and that were sent. */
  pagesGiven: number;
  /** CPU time of the sampling thread, in ms. */
  cpuMs: number;
  /** What it takes beside the guest's memory. */
  memoryBytes: number;
  /** To and from the servers. */
  bytesOnWire: number;
  /** Each server of `via`. */
  directories: DirectoryStatus[];
}

/** A guest's sampler. */
export interface Sampling extends AsyncDisposable {
  /** As they are now. */
  stats(): SamplingStats;
  /** Ends it. Twice is fine. What was reported fades at the servers by itself. */
  close(): Promise<void>;
}

/**
 * Samples a guest until it is closed, within a share of one core, at the lowest priority. A migration is not disturbed:
 * while one has the regions, and while a guest is still arriving, the sampler looks away. Servers that do not answer are
 * no error; they are asked again, and `stats()` says what is wrong. A region that is closed, or that nobody
 * holds any more, is sampled no longer. Close the sampling when the guest has left: where it has arrived somebody samples it anew, as the same guest.
 * @throws INVALID_ARGUMENT, AUTH_FAILED (secret files), REGION_CLOSED
 */
export async function sampleGuest(
  guest: Pick<Guest, 'regions'> | readonly Region[],
  options: SampleOptions,
): Promise<Sampling> {
  const resolved = resolveSampleOptions(options);
  const regions = regionsOf(guest);
  const keys = await directoryKeys(resolved);
  throwIfCancelled(resolved.signal);
  const { cpuShare, passIntervalMs, maxPages, signal } = resolved;
  const sampler = native(() =>
    loadAddon().createSampler({
      regions: regions.map((region) => region.native),
      domainKey: keys.domainKey,
      cpuShare,
      passIntervalMs: Math.ceil(passIntervalMs),
      mostPages: maxPages,
    }),
  );
  return new GuestSampling(sampler, new Directories(resolved, keys, guestId(regions), sampler), signal);
}

/** @throws INVALID_ARGUMENT */
function regionsOf(guest: Pick<Guest, 'regions'> | readonly Region[]): readonly Region[] {
  const list: unknown = Array.isArray(guest) ? guest : (Object(guest) as Partial<Guest>).regions;
  if (!Array.isArray(list) || list.length === 0)
    throw memferryError('INVALID_ARGUMENT', 'sampleGuest: expected a guest, or a list of regions');
  return list.map((entry, index) => {
    const region = list === guest ? entry : Object(entry).region;
    checkRegion(region, `sampleGuest: region ${index}`);
    return region;
  });
}

/** The same wherever it runs, so that a guest that has moved does not count as two; and nothing of its lineage. */
function guestId(regions: readonly Region[]): string {
  const mac = createHmac('sha256', lineageOf(regions)).update('memferry sampled guest');
  return mac.digest('hex').slice(0, 32);
}

class GuestSampling implements Sampling {
  constructor(
    private readonly sampler: NativeSampler,
    private readonly directories: Directories,
    private readonly signal: AbortSignal | undefined,
  ) {
    signal?.addEventListener('abort', this.#onAbort, { once: true });
  }

  stats(): SamplingStats {
    const { passes, pagesHashed, pagesReported, pagesGiven, cpuMs, memoryBytes, bytesOnWire } =
      this.sampler.stats();
    return {
      passes,
      pagesHashed,
      pagesReported,
      pagesGiven,
      cpuMs,
      memoryBytes,
      bytesOnWire,
      directories: this.directories.status,
    };
  }

  async close(): Promise<void> {
    this.signal?.removeEventListener('abort', this.#onAbort);
    this.sampler.close();
    await this.directories.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  readonly #onAbort = (): void => void this.close();
}
