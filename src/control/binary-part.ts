/**
 * The binary part of a control message, in pieces: where one that comes goes, and what one that leaves is read from.
 * Owned by one channel; JavaScript thread.
 */
import { MemferryError } from '../errors.js';

/** Takes a binary part in pieces, in order. */
export interface BinarySink {
  write(chunk: Uint8Array): void;
  /** Nobody will take what has come. */
  discard(): void;
}

/** Gives a binary part in pieces. */
export interface BinarySource {
  readonly length: number;
  read(at: number, length: number): Uint8Array;
  /** Called once: it was sent, or never will be. */
  done(): void;
}

export interface Received<In> {
  readonly message: In;
  readonly binary: Uint8Array | null;
  /** Has the binary part, whole, where `sink` gave one for it. */
  readonly sink: BinarySink | null;
}

export function bytesAsSource(bytes: Uint8Array): BinarySource {
  return { length: bytes.length, read: (at, length) => bytes.subarray(at, at + length), done() {} };
}

/** One that was announced and has not come whole. */
export class ArrivingPart<In> {
  /** When something of it came last. */
  grownMs = performance.now();
  readonly #binary: Buffer | null;
  #offset = 0;

  /** Without a `sink` memory for all of it is taken here. */
  constructor(
    private readonly message: In,
    readonly total: number,
    private readonly sink: BinarySink | null,
  ) {
    this.#binary = sink ? null : Buffer.allocUnsafeSlow(total);
  }

  get isWhole(): boolean {
    return this.#offset === this.total;
  }

  /** With its message. */
  get received(): Received<In> {
    return { message: this.message, binary: this.#binary, sink: this.sink };
  }

  /** Throws PROTOCOL_ERROR: more than was announced. */
  take(chunk: Uint8Array): void {
    if (chunk.length > this.total - this.#offset)
      throw new MemferryError('PROTOCOL_ERROR', 'more bytes than were announced');
    this.sink?.write(chunk);
    this.#binary?.set(chunk, this.#offset);
    this.#offset += chunk.length;
    this.grownMs = performance.now();
  }

  discard(): void {
    this.sink?.discard();
  }
}
