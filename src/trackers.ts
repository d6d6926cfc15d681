/**
 * Dirty tracking: which pages has the owner of a region written? Public for microbenchmarks and glue; a
 * migration uses the same objects.
 */
import { loadAddon } from './addon.js';
import { checkOptions, checkRegion } from './check-options.js';
import { memferryError, native } from './errors.js';
import { checkKvmLog, type KvmLog, slotTriples } from './kvm-log.js';
import type { NativeTracker } from './native.js';
import type { Region } from './region.js';

export const trackerNames = ['uffd-wp-async', 'soft-dirty', 'uffd-wp', 'hash-diff'] as const;
/** Those that need nothing but the region. */
export type TrackerName = (typeof trackerNames)[number];
/** `kvm-log`: KVM's own, of a region that names its VM (`KvmLog`). */
export const trackerChoices = [...trackerNames, 'kvm-log'] as const;

export const writersChoices = ['anywhere', 'tracked-mapping'] as const;
/**
 * Where writes to shared memory come from: through the tracked addresses alone (the caller's word), or from `anywhere`,
 * which only comparing content sees. Memory that is not shared is always tracked completely.
 */
export type Writers = (typeof writersChoices)[number];

/** What `DirtyTracker.create` may be told. */
export interface TrackerOptions {
  /** Default `anywhere`. */
  writers?: Writers;
  /**
   * Of the pages that were written only those count that hold something else than a migration that has this tracker last
   * sent. With reserved huge pages one write makes all 512 pages of 4 KiB count otherwise. Costs reading what was written.
   * By XXH3: not where processes of the guest distrust each other (docs/security.md). Default false.
   */
  splitHugePages?: boolean;
  /** The memory is a KVM guest's: taken unless another tracker is asked for by name. */
  kvmLog?: KvmLog | undefined;
}

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

/** One at a time, so that nothing is tried out after the first that will do. */
function* probed(wanted?: string): Iterable<TrackerProbe> {
  for (const name of trackerNames.filter((known) => wanted === undefined || known === wanted))
    yield native(() => loadAddon().probeTracker(name)) as TrackerProbe;
}

/**
 * The tracker to use: the one asked for, or the first that works.
 * @param refusal why a tracker that works here may not watch the memory in question, null when it may
 * @throws TRACKER_UNAVAILABLE, with the reason and the remedy of each that was considered
 */
export function chooseTracker(
  wanted?: string,
  probes: Iterable<TrackerProbe> = probed(wanted),
  refusal: (name: TrackerName) => string | null = () => null,
): TrackerName {
  const considered: TrackerProbe[] = [];
  for (const probe of probes) {
    if (wanted !== undefined && probe.name !== wanted) continue;
    const refused = probe.available ? refusal(probe.name) : null;
    if (probe.available && refused === null) return probe.name;
    considered.push(refused === null ? probe : { ...probe, available: false, reason: refused, remedy: '' });
  }
  const why = considered.map(({ name, reason, remedy }) => `${name}: ${reason}${remedy && ` (${remedy})`}`);
  if (why.length === 0)
    why.push(`there is no tracker named '${wanted}'; there are ${trackerNames.join(', ')}`);
  throw memferryError('TRACKER_UNAVAILABLE', `no dirty tracking: ${why.join('; ')}`, {
    facts: { wanted: wanted ?? null, considered },
  });
}

/**
 * Watches one region. A write after `arm`, or after the last `collect`, is reported by the next `collect`; one
 * that races with it may be reported twice, never lost.
 */
export class DirtyTracker {
  /** Which tracker it is. */
  readonly name: TrackerName | 'kvm-log';
  /** What it watches. */
  readonly region: Region;
  /** The addon's handle; for the parts of memferry that drive engines. */
  readonly native: NativeTracker;

  private constructor(region: Region, name: TrackerName | 'kvm-log', handle: NativeTracker) {
    this.region = region;
    this.name = name;
    this.native = handle;
  }

  /**
   * A tracker over `region`, not armed yet.
   * @param name which one; default the first that works here and may watch this memory
   * @throws INVALID_ARGUMENT, TRACKER_UNAVAILABLE, REGION_CLOSED, REGION_GONE
   */
  static create(region: Region, name?: TrackerName | 'kvm-log', options: TrackerOptions = {}): DirtyTracker {
    checkRegion(region, 'DirtyTracker.create');
    if (name !== undefined) oneOf(trackerChoices, name, 'DirtyTracker.create: name');
    checkOptions(options, 'DirtyTracker.create', ['writers', 'splitHugePages', 'kvmLog']);
    const { writers = 'anywhere', splitHugePages = false } = options;
    oneOf(writersChoices, writers, 'DirtyTracker.create: writers');
    if (typeof splitHugePages !== 'boolean') {
      throw memferryError('INVALID_ARGUMENT', 'DirtyTracker.create: splitHugePages: a boolean');
    }
    const refusal = (candidate: TrackerName) =>
      native(() => loadAddon().trackerRefusal(candidate, region.native, writers));
    const { kvmLog } = options;
    if (kvmLog !== undefined && (name === undefined || name === 'kvm-log')) {
      checkKvmLog(kvmLog);
      const { vmFd, marks, others, manualProtect = true } = kvmLog;
      if (others !== undefined) oneOf(trackerNames, others, 'kvm-log: others');
      const slots = slotTriples(region, kvmLog);
      const second = marks === undefined ? chooseTracker(others, undefined, refusal) : null;
      const handle = native(() =>
        loadAddon().makeKvmLog(
          region.native,
          vmFd,
          slots,
          marks?.native ?? null,
          second,
          writers,
          manualProtect,
          splitHugePages,
        ),
      );
      return new DirtyTracker(region, 'kvm-log', handle);
    }
    if (name === 'kvm-log') {
      throw memferryError(
        'TRACKER_UNAVAILABLE',
        "kvm-log needs the VM's descriptor: name it at the guest's region",
      );
    }
    const chosen = chooseTracker(name, undefined, refusal);
    return new DirtyTracker(
      region,
      chosen,
      native(() => loadAddon().makeTracker(chosen, region.native, writers, splitHugePages)),
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

function oneOf(choices: readonly string[], value: string, what: string): void {
  if (choices.includes(value)) return;
  throw memferryError('INVALID_ARGUMENT', `${what}: one of ${choices.join(', ')}, not '${value}'`);
}

/** Runs out of the pairs [first, count, ...] in which they cross the boundary. */
export function runsOf(pairs: Float64Array): PageRun[] {
  const runs: PageRun[] = [];
  for (let i = 0; i + 1 < pairs.length; i += 2) {
    runs.push({ first: pairs[i] as number, count: pairs[i + 1] as number });
  }
  return runs;
}
