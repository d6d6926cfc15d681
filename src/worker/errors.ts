/** Errors of live workers beside those of the whole package. */
import { isErrorCode, type MemferryError, memferryError } from '../errors.js';
import type { PlainError } from './messages.js';

/**
 * The guest is leaving or has left this host, and the request was not begun: whoever asked may ask again at
 * the destination.
 */
export class GuestMovedError extends Error {
  /** For code that tells errors apart by it. */
  readonly code = 'GUEST_MOVED';
  /** `guest`: its name. */
  constructor(guest: string) {
    super(`guest "${guest}" has moved to another host; the request was not begun here`);
    this.name = 'GuestMovedError';
  }
}

/** What a guest's `handle` threw: the guest runs on. `message` is that of the error, and so is the `stack`. */
export class GuestRequestError extends Error {
  /** For code that tells errors apart by it. */
  readonly code = 'GUEST_REQUEST_FAILED';
  /** Of an error that was thrown in a worker. */
  constructor(
    /** That error's `name`. */
    readonly guestErrorName: string,
    /** That error's `code`, where it has one. */
    readonly guestErrorCode: string | null,
    message: string,
    stack: string | null,
  ) {
    super(message);
    this.name = 'GuestRequestError';
    if (stack !== null) this.stack = `${this.name}: in the guest: ${stack}`;
  }
}

export function busyError(names: string[]): MemferryError {
  return memferryError('GUEST_BUSY', `the guest cannot pause: ${names.join(', ')} open`, {
    facts: { names },
  });
}

/** An error that a worker reported, as an error here; those without a code of ours are `otherwise`. */
export function fromWorker(error: PlainError, otherwise: 'PAUSE_FAILED' | 'PREPARE_FAILED'): MemferryError {
  const code = isErrorCode(error.code) ? error.code : otherwise;
  return memferryError(code, error.message, {
    facts: {
      names: error.names,
      guestError: error.name,
      guestStack: error.stack,
    },
  });
}
