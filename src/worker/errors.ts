/** Errors of live workers beside those of the whole package. */
import { fileURLToPath } from 'node:url';
import {
  type GuestMovedError,
  type GuestRequestError,
  isErrorCode,
  type MemferryError,
  memferryError,
} from '../errors.js';
import type { PlainError } from './messages.js';

/** `guest`: its name. */
export function guestMoved(guest: string): GuestMovedError {
  return memferryError(
    'GUEST_MOVED',
    `guest "${guest}" has moved to another host; the request was not begun here`,
    { facts: { guest } },
  );
}

/** Of an error that was thrown in a worker. */
export function guestRequestFailed({ name, code, message, stack }: PlainError): GuestRequestError {
  const error = memferryError('GUEST_REQUEST_FAILED', message, {
    facts: { guestErrorName: name, guestErrorCode: code },
  });
  if (stack !== null) error.stack = `${error.name}: in the guest: ${stack}`;
  return error;
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

/**
 * Why a guest could not begin its first life: its module is the caller's own. What the module itself said with a code
 * keeps that.
 */
export function notStarted(error: PlainError, url: string): MemferryError {
  const cause = Object.assign(new Error(error.message), { name: error.name });
  if (error.stack !== null) cause.stack = error.stack;
  const path = url.startsWith('file:') ? fileURLToPath(url) : url;
  const code = isErrorCode(error.code) ? error.code : 'INVALID_ARGUMENT';
  const said = isErrorCode(error.code) ? '' : `${error.name}: `;
  return memferryError(code, `the guest's module ${path} failed to start: ${said}${error.message}`, {
    cause,
    facts: { names: error.names, module: path, guestError: error.name, guestStack: error.stack },
  });
}
