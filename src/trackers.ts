/**
 * Dirty tracking: which pages has the owner of a region written? Public for microbenchmarks and glue; a
 * migration uses the same objects.
 */
import { loadAddon } from './addon.js';
import { memferryError, native } from './errors.js';
import type { NativeTracker } from './native.js';
import type { Region } from './region.js';

export const trackerNames = ['uffd-wp-async', 'hash-diff'] as const;
export type TrackerName = (typeof trackerNames)[number];

export interface TrackerProbe {
  name: TrackerName;
  available: boolean;
  /** Why not; empty when available. */
  reason: string;
  /** How to grant it; empty when available, or when there is no way. */
  remedy: string;
}

/** Pages [first, first + count) of a region. */
export interface PageRun {
  first: number;
  count: number;
}

/** Every tracker, best first, each tried out on this kernel just now. */
export function trackers(): TrackerProbe[] {
  return native(() => loadAddon().probeTrackers()) as TrackerProbe[];
}

/**
 * The tracker to use: the one asked for, or the first that works.
 * @throws TRACKER_UNAVAILABLE, with the reason and the remedy of each that was considered
 */
export function chooseTracker(wanted?: string, probes: readonly TrackerProbe[] = trackers()): TrackerName {
  const considered = wanted === undefined ? probes : probes.filter((probe) => probe.name === wanted);
  const chosen = considered.find((probe) => probe.available);
  if (chosen !== undefined) return chosen.name;
  const why = considered.map(({ name, reason, remedy }) => `${name}: ${reason}${remedy && ` (${remedy})`}`);
  if (why.length === 0)
    why.push(`there is no tracker named '${wanted}'; there are ${trackerNames.join(', ')}`);
  throw memferryError('TRACKER_UNAVAILABLE', `no dirty tracking: ${why.join('; ')}`, {
    facts: { wanted: wanted ?? null, considered },
  });
}

/**
 * Watches one region. A write after `arm`, or after the last `collect`, is reported by the next `collect`; one
 * that races with it may be reported twice, never lost. Not seen by any tracker: writes through another
 * mapping of the same memory.
 */
export class DirtyTracker {
  readonly name: TrackerName;
  readonly region: Region;
  /** The addon's handle; for the parts of memferry that drive engines. */
  readonly native: NativeTracker;

  private constructor(region: Region, name: TrackerName, handle: NativeTracker) {
    this.region = region;
    this.name = name;
    this.native = handle;
  }

  /**
   * A tracker over `region`, not armed yet.
   * @param name which one; default the first that works here
   * @throws TRACKER_UNAVAILABLE, REGION_CLOSED, REGION_GONE
   */
  static create(region: Region, name?: string): DirtyTracker {
    const attached = region.native.attached();
    // Write protection of another process's memory needs a userfaultfd of its own.
    const protects = attached === null || attached.writeTracked;
    const probes = trackers().filter((probe) => protects || probe.name !== 'uffd-wp-async');
    const chosen = chooseTracker(name, name === undefined ? probes : undefined);
    return new DirtyTracker(
      region,
      chosen,
      native(() => loadAddon().makeTracker(chosen, region.native)),
    );
  }

  /** From now on writes are seen. Arming again starts afresh. */
  arm(): void {
    native(() => this.native.arm());
  }

  /**
   * The pages written since `arm` or the last `collect`, as runs in order, armed again at once. Pages by which
   * the region has grown since count as written.
   * @throws REGION_GONE, SYSTEM when the memory is not what was armed any more, or was never armed
   */
  collect(): PageRun[] {
    return runsOf(native(() => this.native.collect()));
  }

  /** Lets go of the memory; it can be armed again. */
  disarm(): void {
    native(() => this.native.disarm());
  }

  /** Disarms for good. Twice is fine. */
  close(): void {
    native(() => this.native.close());
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/** Runs out of the pairs [first, count, ...] in which they cross the boundary. */
export function runsOf(pairs: Float64Array): PageRun[] {
  const runs: PageRun[] = [];
  for (let i = 0; i + 1 < pairs.length; i += 2) {
    runs.push({ first: pairs[i] as number, count: pairs[i + 1] as number });
  }
  return runs;
}
