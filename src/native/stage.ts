/** A VMD server's memory and data path. */

export interface NativeImageStats {
  /** With content, here. */
  pagesHeld: number;
  /** Of these: taken over by a reference instead of being sent. */
  pagesShared: number;
  pagesZero: number;
  /** In the map, wherever they are. */
  pagesKnown: number;
  /** Of the server's memory: content, index and execution state. */
  bytes: number;
  bytesIn: number;
  bytesOut: number;
  sealed: boolean;
}

export interface NativeStageStats {
  /** The cap. */
  memoryBytes: number;
  /** What of it can hold pages, their index and execution states. */
  slabBytes: number;
  freeBytes: number;
  images: number;
  connections: number;
  bytesIn: number;
  bytesOut: number;
  /** Over all images, see `NativeImageStats.pagesShared`. */
  sharedPages: number;
  /** Of the memory: what is known of contents by their names. */
  hintBytes: number;
  members: number;
  popularNames: number;
  /** Their room counts as free. */
  popularPages: number;
}

export interface NativeStageConfig {
  /** At least 16 MiB. */
  memoryBytes: number;
  /** Bytes a second in each direction over all images, 0 for none. */
  bandwidth: number;
  /** One in so many slots may hold popular pages, 8 without it; 0: none. */
  popularShare?: number;
  popularPeriodMs?: number;
}

/**
 * Memory of a stage for an execution state. It counts as used until it is released here and no image has it. Throws (code
 * INVALID_ARGUMENT) beyond its bytes, and where it was released or is not to be written.
 */
export interface NativeHeldState {
  size(): number;
  write(at: number, bytes: Uint8Array): void;
  read(at: number, length: number): Uint8Array;
  /** Twice is fine. */
  release(): void;
}

/**
 * A VMD server's memory and data path; see native/stage/stage.h. Images are 16 bytes. Where a call gives false or
 * null there is no such image (or, where it says so, no room). Throws (code INVALID_ARGUMENT) where a bound is
 * exceeded or something is there already, and with code CLOSED after `close()`, but for `stats()`.
 */
export interface NativeStage {
  /** Takes all memory from the system and keeps it; before the first image. Rejects with SYSTEM: there is not so much. */
  preallocate(): Promise<void>;
  /** Takes at most so many bytes more from the system from now on, beside what it gives back. Not when preallocated. */
  limitFresh(bytes: number): void;
  /** Another one with every stage, 16 hex digits. */
  identity(): string;
  /**
   * `regionPages` are capacities; false: no room for their index. `domainKey` (32 bytes): images with the same one
   * share content; null: it shares nothing.
   */
  createImage(
    image: Uint8Array,
    regionPages: number[],
    ordinal: number,
    domainKey: Uint8Array | null,
  ): boolean;
  /** A membership of a domain (32 bytes), with sessions as an image; false: too many domains. `guest`: 16 bytes. */
  join(member: Uint8Array, domainKey: Uint8Array, guest: Uint8Array | null): boolean;
  /** `roles`: bit n for StageRole n. `tokens`: [attempt * 6 + role], 32 bytes each, at most 64 attempts. */
  addSession(image: Uint8Array, session: number, roles: number, tokens: Uint8Array): boolean;
  /** Ends its connections too. */
  removeSession(image: Uint8Array, session: number): boolean;
  /** Where the server with this ordinal is (a numeric address), and our tokens for it, one an attempt. */
  setChain(image: Uint8Array, ordinal: number, host: string, port: number, tokens: Uint8Array): boolean;
  /** Memory for an execution state of so many bytes, to be written; null: there is no room. */
  makeState(bytes: number): NativeHeldState | null;
  /** Replaces the former one. It is final from now on. */
  putState(image: Uint8Array, state: NativeHeldState): boolean;
  /** null too when there is none. */
  state(image: Uint8Array): NativeHeldState | null;
  seal(image: Uint8Array): boolean;
  /** Ends its connections and gives its memory back to the system. */
  /** Gone for everybody at once; resolves when its memory is given back too. Null: it was not there. */
  drop(image: Uint8Array): Promise<void> | null;
  image(image: Uint8Array): NativeImageStats | null;
  /** Whether each of these pages is zero or held by some server, as the map has it. */
  whole(image: Uint8Array, regionPages: number[]): boolean | null;
  stats(): NativeStageStats;
  /** Twice is fine. */
  close(): void;
}
