/**
 * A parked guest and its execution state beside its pages, as one piece of bytes in the server's memory, where it counts
 * against the cap from its first byte: `u32 length | JSON of the guest | execution state`. It comes and goes
 * in pieces; nothing here has it whole.
 */
import type { BinarySink, BinarySource } from '../control/binary-part.js';
import { native } from '../errors.js';
import type { NativeHeldState } from '../native.js';
import type { ParkedGuest } from '../protocol/stage-messages.js';

const LENGTH_BYTES = 4;

/** A state on its way here. One for which there is no room is taken off the connection, and goes nowhere. */
export class ArrivingState implements BinarySink {
  #held: NativeHeldState | null;
  #at = 0;
  readonly #end: number;

  /** `make` gives memory for so many bytes; null: there is none. `bytes`: of the execution state alone. */
  constructor(
    readonly bytes: number,
    guest: ParkedGuest,
    make: (bytes: number) => NativeHeldState | null,
  ) {
    const json = Buffer.from(JSON.stringify(guest), 'utf8');
    const length = Buffer.alloc(LENGTH_BYTES);
    length.writeUInt32LE(json.length, 0);
    this.#end = LENGTH_BYTES + json.length + bytes;
    this.#held = make(this.#end);
    this.write(length);
    this.write(json);
  }

  /** null: there was no room for it, or it was discarded. */
  get held(): NativeHeldState | null {
    return this.#held;
  }

  get isWhole(): boolean {
    return this.#at === this.#end;
  }

  write(chunk: Uint8Array): void {
    native(() => this.#held?.write(this.#at, chunk));
    this.#at += chunk.length;
  }

  /** An image that has it keeps it. */
  discard(): void {
    this.#held?.release();
    this.#held = null;
  }
}

/** Of what came as an `ArrivingState`, whose guest the schema has checked. Takes `held` over: `state` lets go of it. */
export function readParked(held: NativeHeldState): { guest: ParkedGuest; state: BinarySource } {
  const read = (at: number, length: number): Uint8Array => native(() => held.read(at, length));
  const jsonBytes = Buffer.from(read(0, LENGTH_BYTES)).readUInt32LE(0);
  const start = LENGTH_BYTES + jsonBytes;
  return {
    guest: JSON.parse(Buffer.from(read(LENGTH_BYTES, jsonBytes)).toString('utf8')) as ParkedGuest,
    state: {
      length: held.size() - start,
      read: (at, length) => read(start + at, length),
      done: () => held.release(),
    },
  };
}
