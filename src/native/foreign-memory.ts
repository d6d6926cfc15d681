/** What serves the missing pages of another process's memory. */

export interface NativeSourcePagerEvent {
  kind: 'done' | 'lost' | 'failed';
  code: string;
  message: string;
  /** The pages that are lost. */
  lost: { first: number; count: number }[];
}

export interface NativeSourcePagerStats {
  pages: number;
  pagesSettled: number;
  pagesFound: number;
  pagesLost: number;
  faults: number;
  faultP50Us: number;
  faultP99Us: number;
}

export interface NativeSourcePager {
  stats(): NativeSourcePagerStats;
  /** Stops; whoever touches what is missing waits for a successor. Twice is fine. */
  leave(): void;
  /** Stops, and what is missing fails to be read. */
  end(): void;
}

export interface NativeRestoreStats {
  pages: number;
  pagesInstalled: number;
  pagesRemoved: number;
  /** Brought before anyone waited for them. */
  pagesAhead: number;
  pagesLost: number;
  faults: number;
  faultsZero: number;
  /** Whose pages had to come from a disk. */
  faultsSlow: number;
  triedAgain: number;
  removeEvents: number;
  /** From the reading of a fault until its page is there. */
  p50Us: number;
  p99Us: number;
  maxUs: number;
  tracksWrites: boolean;
}

export interface NativeRestore {
  /** A region that was on its way is all there. */
  sourceComplete(): void;
  acknowledgeLoss(): void;
  /** Also after close. */
  stats(): NativeRestoreStats;
  /** What is missing is poisoned, and who waits for it woken. Twice is fine. */
  close(): void;
}
