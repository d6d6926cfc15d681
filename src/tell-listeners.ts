/** Code that is not ours, called for what it is to be told: listeners and callbacks of callers. JavaScript thread. */
import type { EventEmitter } from 'node:events';

/** Whose code it is, for the warning. */
export interface Outside {
  /** As a sentence begins: `onGuest`, `a listener of 'state'`. */
  what: string;
  /** Of the warning. */
  code: string;
  /** What else is to be done when it fails. */
  failed?: () => void;
}

/**
 * Calls what somebody else has given, where there is something. That it throws, or gives a promise that rejects, ends
 * nothing here: it is told as a warning.
 */
export function callOut<Args extends unknown[]>(
  { what, code, failed }: Outside,
  fn: ((...args: Args) => unknown) | null | undefined,
  ...args: Args
): void {
  const hear = (how: string, error: unknown) => {
    warn(`${what} ${how}`, error, code);
    failed?.();
  };
  try {
    const given = fn?.(...args);
    // One that is asynchronous is what TypeScript takes for one that gives nothing.
    if (isPromise(given)) Promise.resolve(given).catch((error) => hear('rejected', error));
  } catch (error) {
    hear('threw', error);
  }
}

/**
 * As emit(), but what a listener throws, or rejects with, ends nothing here, nor what the listeners behind it hear: it is
 * told as a warning, MEMFERRY_LISTENER.
 */
export function tellListeners(
  emitter: Pick<EventEmitter, 'rawListeners'>,
  event: string,
  ...args: unknown[]
): void {
  const whose = { what: `a listener of '${event}'`, code: 'MEMFERRY_LISTENER' };
  for (const listener of emitter.rawListeners(event)) {
    callOut(whose, () => Reflect.apply(listener, emitter, args));
  }
}

/** What went wrong in code that is not ours, and must neither pass unseen nor end anything. */
export function warn(what: string, error: unknown, code: string): void {
  process.emitWarning(`${what}: ${said(error)}`, { code });
}

export function isPromise(value: unknown): value is PromiseLike<unknown> {
  return typeof (Object(value) as { then?: unknown }).then === 'function';
}

/** What was thrown may be anything, also what has no text. */
function said(error: unknown): string {
  if (error instanceof Error) return error.message;
  try {
    return String(error);
  } catch {
    return 'something without a text';
  }
}
