/**
 * What moves. A guest is named regions plus an execution state (opaque bytes). These two interfaces are all
 * that the engine knows of it; `memferry/worker` implements both for live worker_threads guests, hypervisor
 * glue implements them for its own.
 */
import type { KvmLog } from './kvm-log.js';
import type { Region } from './region.js';

/** Code that a destination may be asked to run for a guest: a name on its list, and the SHA-256 of the file. */
export interface GuestModule {
  /** As destinations list it. */
  name: string;
  /** 64 hex digits. */
  sha256: string;
}

/** One piece of a guest's memory. */
export interface GuestRegion {
  /** Unique within the guest, at most 64 characters. */
  name: string;
  /** Its memory. */
  region: Region;
  /** The RAM of a KVM guest: KVM's own log finds its writes, unless the migration asks for another tracker by name. */
  tracker?: KvmLog;
}

/** What `pause` may give beside the state. */
export interface PausedGuest {
  /** The execution state: opaque bytes, given to `prepare` at the destination as they are. */
  state: Uint8Array;
  /** `process.hrtime.bigint()` at the guest's last instruction, where the guest knows it: downtime starts there. */
  pausedAtNs?: bigint;
  /**
   * For a guest that others can let run too: asked last before GRANT. Rejects when the guest does not stand any more,
   * or has not stood all the time; the migration then fails and the guest stays here.
   */
  stillPaused?(): Promise<void>;
}

/** The source's side of a guest. */
export interface Guest {
  /** Shown in reports and errors, at most 64 characters. */
  readonly name: string;
  /** Its memory: 1 to 64 regions, named differently. The destination makes them in this order. */
  readonly regions: readonly GuestRegion[];
  /** The module that runs it, or null for a guest that is memory alone. */
  readonly module: GuestModule | null;
  /** Plain JSON facts that the destination needs before the first page (at most 192 KiB): heap sizes, globals' names. */
  readonly description?: unknown;
  /**
   * Before anything of a migration begins: rejects with the names of what cannot move (GUEST_BUSY, GUEST_UNMOVABLE).
   * It is no promise: `pause` looks again, at what may have changed. With `rounds` pages are sent while the guest runs,
   * and what it writes afterwards has to be seen by a dirty tracker; one that is refused with them may be asked without,
   * and the other way round, and the last that was not refused holds.
   */
  check?(options: { signal: AbortSignal; rounds: boolean }): Promise<void>;
  /** After a pause that gave a bare state: as `PausedGuest.pausedAtNs`. */
  readonly pausedAtNs?: bigint | undefined;
  /**
   * Stops the guest at a safepoint: when this resolves, nothing writes the regions any more. Gives the
   * execution state. Rejects (GUEST_BUSY, with names) and leaves the guest running when it cannot pause.
   */
  pause(options: { signal: AbortSignal }): Promise<Uint8Array | PausedGuest>;
  /** Takes a successful pause back: the migration failed before the commit and the guest runs on here. */
  unpause(): Promise<void> | void;
  /**
   * The guest belongs to the destination now. Its memory here stays until `evicted`; then `release` is called. What either
   * throws is a warning of the process (MEMFERRY_DEPARTED_FAILED, MEMFERRY_RELEASE_FAILED), and changes nothing.
   */
  departed?(): Promise<void> | void;
  /** Nothing of the guest is needed here any more; its regions can be closed once the migration's `done` has settled. */
  release?(): Promise<void> | void;
}

/** What a source says about a guest before the first page. Checked against the schema and the limits already. */
export interface GuestOffer {
  /** As `Guest.name`. */
  name: string;
  /** As `Guest.module`; null for a guest that is memory alone. */
  module: GuestModule | null;
  /** As `Guest.description`: whatever JSON the source sends. Check it before use. */
  description: unknown;
  /** The regions in order: `lengthBytes` now, `capacityBytes` as far as each may grow, both multiples of `pageSize`. */
  regions: { name: string; lengthBytes: number; capacityBytes: number; pageSize: number }[];
  /** The source's `replayLog`: operations since the base, as the guest's owner wrote them. As untrusted as the guest. */
  replayLog?: Uint8Array;
  /** A secret that goes with the guest: it shows `readBase` that a base is of this very guest. Not to be logged. */
  lineage?: Uint8Array;
}

/**
 * What a region starts from, so that only what differs has to come: a raw image file (its byte n is the region's byte
 * n), another region of this process, the region's own content (a guest that comes back to memory that it left), or
 * whatever a function of the owner's writes into it. It need not be right, nor as long as the region: every page is
 * confirmed by hash, and what is not confirmed is never read. `unpark` takes image files alone.
 */
export type RegionBase =
  | {
      /** Of the image file. */
      path: string;
      /** Where the region begins in it. Default 0. */
      offsetBytes?: number;
    }
  | {
      /** It is read, not changed, and may have any length. */
      region: Region;
    }
  | {
      /** What the region itself has. */
      inPlace: true;
    }
  | {
      /** `progress`: how much of it is done, 0 to 1; a source waits for what makes headway. */
      fill(
        region: Region,
        options: { signal: AbortSignal; progress: (fraction: number) => void },
      ): Promise<void>;
    };

/** The destination's side of a guest. */
export interface ArrivingGuest {
  /** In the order of the offer, each as long as offered (`capacityBytes` may be more). Their content is discarded. */
  readonly regions: readonly Region[];
  /** What the regions start from, in their order; null or absent: from nothing. */
  readonly bases?: readonly (RegionBase | null | undefined)[];
  /**
   * Applies the source's log to the bases, while the guest still runs there. What comes of it need not be exact: the
   * comparison makes it so. When `signal` aborts nobody waits for it any more, and it must stop writing the regions.
   * `progress`: how much of it is done, 0 to 1, from when it has begun in earnest (0) on; what is left is reckoned by its
   * pace, and the source waits as long as that promises to be worth it. When it settles nothing writes the regions any
   * more: what is confirmed after that is not looked at again.
   */
  readonly replay?:
    | {
        apply(
          log: Uint8Array,
          options: { signal: AbortSignal; progress: (fraction: number) => void },
        ): Promise<void>;
        /**
         * How long that takes, in ms, where the owner knows it beforehand; counts until there is a pace. Without either
         * nobody waits for long, unless `base: 'always'` says so.
         */
        expectedMs?: number;
        /** What it takes besides the regions while it lasts: counts against `maxBytes`, one such replay at a time. */
        memoryBytes?: number;
      }
    | undefined;
  /** The source's region grew before the switchover: make ours as long. */
  grow?(index: number, lengthBytes: number): Promise<void>;
  /** Everything that can fail. May touch the regions. */
  prepare(state: Uint8Array, options: { signal: AbortSignal }): Promise<void>;
  /** Nothing that can fail. The guest runs from here on. */
  resume(): void;
  /**
   * For a guest that is run by somebody else: settles after `resume`, within a bound. Rejects when it does not run; it
   * is this side's all the same, its memory is served, and the report says so.
   */
  readonly running?: Promise<void> | undefined;
  /**
   * For a guest that somebody else can spoil: resolves, with the reason, when it must not be resumed here any more. The
   * migration fails then, if it is not granted yet.
   */
  readonly broken?: Promise<Error> | undefined;
  /** The migration failed before the commit: let everything go. Never called after `resume`. */
  abandon(): Promise<void> | void;
  /** Pages that cannot be had any more, reported before they are poisoned. */
  lost?(pages: { region: number; first: number; count: number }[]): void;
}
