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

export interface NativeFeature {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}
