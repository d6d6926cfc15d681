/** The memory that a listener's guests together may take. Counts, and takes nothing itself. */
import { MemferryError } from '../errors.js';

export class MemoryBudget {
  readonly #bookings = new Set<Booking>();
  #replay: Booking | null = null;

  constructor(private readonly maxBytes: number) {}

  /** `what` needs the bytes, for the error. Throws NO_MEMORY. */
  book(bytes: number, what: string): Booking {
    this.mustFit(bytes, what);
    return this.#made(bytes);
  }

  /** Null where there is no room. */
  tryBook(bytes: number): Booking | null {
    return bytes <= this.#freeBytes() ? this.#made(bytes) : null;
  }

  /** For the second copy of a guest that a log is applied to. Null where there is no room, or one already. */
  tryBookReplay(bytes: number): Booking | null {
    if (this.#replay && this.#bookings.has(this.#replay)) return null;
    this.#replay = this.tryBook(bytes);
    return this.#replay;
  }

  /** Throws NO_MEMORY. */
  mustFit(bytes: number, what: string): void {
    const free = this.#freeBytes();
    if (bytes <= free) return;
    throw new MemferryError('NO_MEMORY', `${what}; ${free} of ${this.maxBytes} are free`, {
      facts: { bytes, free, limit: this.maxBytes },
    });
  }

  #made(bytes: number): Booking {
    const booking: Booking = new Booking(this, bytes, () => this.#bookings.delete(booking));
    this.#bookings.add(booking);
    return booking;
  }

  #freeBytes(): number {
    let free = this.maxBytes;
    for (const { bytes } of this.#bookings) free -= bytes;
    return free;
  }
}

/** What one guest takes of it. */
export class Booking {
  #bytes: number;

  constructor(
    private readonly budget: MemoryBudget,
    bytes: number,
    /** Gives it back. Twice is fine. */
    readonly release: () => void,
  ) {
    this.#bytes = bytes;
  }

  get bytes(): number {
    return this.#bytes;
  }

  /** Throws NO_MEMORY. */
  grow(bytes: number, what: string): void {
    this.budget.mustFit(bytes, what);
    this.#bytes += bytes;
  }
}
