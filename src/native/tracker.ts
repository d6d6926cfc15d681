/** Which pages were written. */

export interface NativeTrackerProbe {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}

export interface NativeTracker {
  readonly name: string;
  arm(): void;
  /** The pages written since `arm` or the last `collect`, as pairs [first, count, first, count, ...]. */
  collect(): Float64Array;
  disarm(): void;
  close(): void;
}

export interface NativeWriteMarks {
  /** The bits, 64 pages a word. */
  words(): ArrayBuffer;
  mark(first: number, count: number): void;
}

/** Something that the kernel or this process may have, or lack. */
export interface NativeFeature {
  /** As `memferry doctor` names it. */
  name: string;
  /** Tried out just now. */
  available: boolean;
  /** Why not; empty when available. */
  reason: string;
  /** How to grant it; empty when available, or when there is no way. */
  remedy: string;
}
