/** Memory that can move, as C++ knows it. */

/** Pages [first, first + count) of region `region` (its index in the migration's region table). */
export interface NativeRun {
  region: number;
  first: number;
  count: number;
}

/** A handle to memory that can move. Handles of one region can exist in several environments. */
export interface NativeRegion {
  /** Unguessable within the process; `openRegion(id)` gives another handle, in a worker or in the main thread. */
  readonly id: string;
  readonly pageSize: number;
  readonly capacityPages: number;
  pages(): number;
  /** The memory has grown in place (a WebAssembly memory). Throws RangeError beyond the capacity. */
  grow(pages: number): void;
  /**
   * Pages that are mapped readable and writable from the region's start on, by /proc/self/maps, never more
   * than the capacity: how far a WebAssembly memory of another thread has grown.
   */
  mappedPages(): number;
  retired(): boolean;
  /** Stops every native user of the memory; for memory that is found to have gone. */
  retire(): void;
  /** Memory of our own: external ArrayBuffers of at most 4 GiB over it, in this environment; [] when adopted. */
  buffers(): ArrayBuffer[];
  /** Whether `view` starts where the region does. */
  startsAt(view: Uint8Array): boolean;
  /** Null: this process's memory. Else how it is attached. */
  attached(): { pid: number; alive: boolean; paged: boolean; writeTracked: boolean; shared: boolean } | null;
  claimed(): boolean;
  /** One migration at a time: true when nobody else has it. */
  claim(): boolean;
  release(): void;
  /** XXH3_128 over the page hashes, as 32 hex digits. On a thread of the pool. */
  digest(): Promise<string>;
  /**
   * Reads the file from `offsetBytes` on into pages [first, first + count), as far as it goes; gives the bytes. On a
   * thread of the pool, as the next two.
   */
  fill(path: string, offsetBytes: number, first: number, count: number): Promise<number>;
  /** The same from the pages with the same numbers of another region. */
  fillFrom(from: NativeRegion, first: number, count: number): Promise<number>;
  /** Writes these pages to where they belong in an existing file; pages of zeros are left out. */
  save(path: string, first: number, count: number): Promise<void>;
  /** Drops this handle. Memory of our own goes when the last handle, view and engine have let go. Twice is fine. */
  close(): void;
}

/** A piece of another process's memory; `offset` is where it lies in the memory's file. */
export interface NativeMapping {
  address: bigint;
  lengthBytes: number;
  offset: number;
}
