/** Waits with a bound: every promise that depends on a peer or on a guest's code is awaited through these. */
import { setMaxListeners } from 'node:events';
import { MemferryError, type ErrorCode } from '../errors.js';
import { Alarm } from './timers.js';

/** Rejects with CANCELLED (or the signal's own MemferryError) when `signal` aborts first. */
export function untilAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  if (signal.aborted) {
    promise.catch(() => {});
    return Promise.reject(abortError(signal));
  }
  return new Promise<T>((resolve, reject) => {
    const onAbort = () => reject(abortError(signal));
    signal.addEventListener('abort', onAbort, { once: true });
    promise.then(resolve, reject).finally(() => signal.removeEventListener('abort', onAbort));
  });
}

/** For whatever lasts: as many may wait for its end at once as there are connections and calls, and it is no leak. */
export function lastingAbort(): AbortController {
  const controller = new AbortController();
  setMaxListeners(0, controller.signal);
  return controller;
}

export function abortError(signal: AbortSignal): MemferryError {
  return signal.reason instanceof MemferryError
    ? signal.reason
    : new MemferryError('CANCELLED', 'cancelled by its signal', { cause: signal.reason });
}

/** Of a caller's own signal, where a call begins. Throws as `untilAborted` rejects. */
export function throwIfCancelled(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw abortError(signal);
}

/** Rejects with `code` when `promise` has not settled within `timeoutMs`. */
export function within<T>(
  promise: Promise<T>,
  timeoutMs: number,
  code: ErrorCode,
  message: string,
): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const alarm = new Alarm(timeoutMs, () => reject(new MemferryError(code, message)));
    promise.then(resolve, reject).finally(() => alarm.stop());
  });
}

/** `signal` ends what `open` does, and nothing of what it has made: connections may be needed to let go of that. */
export async function whileOpening<T>(
  signal: AbortSignal,
  open: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  if (signal.aborted) throw abortError(signal);
  const opening = lastingAbort();
  const stop = () => opening.abort(signal.reason);
  signal.addEventListener('abort', stop, { once: true });
  try {
    return await open(opening.signal);
  } finally {
    signal.removeEventListener('abort', stop);
  }
}
