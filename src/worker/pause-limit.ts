/** What ends the wait for a safepoint. */
import { memferryError } from '../errors.js';

/** One promise that rejects at the abort, at the timeout, or by `cancel`, whichever is first. */
export function pauseLimit(signal: AbortSignal | undefined, timeoutMs: number, timedOut: () => Error) {
  let cancel!: (error: unknown) => void;
  let reason: unknown = null;
  const cancelled = new Promise<never>((_, reject) => {
    cancel = (error) => {
      reason ??= error;
      reject(reason);
    };
  });
  cancelled.catch(() => undefined);
  const aborted = () =>
    cancel(
      memferryError('CANCELLED', 'the pause was cancelled', {
        cause: signal?.reason,
      }),
    );
  const timer = setTimeout(() => cancel(timedOut()), timeoutMs);
  signal?.addEventListener('abort', aborted, { once: true });
  if (signal?.aborted) aborted();
  const done = () => {
    clearTimeout(timer);
    signal?.removeEventListener('abort', aborted);
  };
  return { cancelled, cancel, done, reason: () => reason };
}
