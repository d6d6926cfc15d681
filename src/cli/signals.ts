/** Ctrl-C and its relatives as an AbortSignal: the first asks, the second ends the process. */
import { lastingAbort } from '../protocol/bounded.js';
import { memferryError } from '../errors.js';

export interface Interruption {
  readonly signal: AbortSignal;
  [Symbol.dispose](): void;
}

const names = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** `hangup` false: SIGHUP has another meaning here. */
export function onInterrupt({ hangup = true }: { hangup?: boolean } = {}): Interruption {
  const controller = lastingAbort();
  const listener = (name: NodeJS.Signals) => {
    if (controller.signal.aborted) process.exit(130);
    controller.abort(new Error(`interrupted by ${name}`));
  };
  const taken = hangup ? names : names.filter((name) => name !== 'SIGHUP');
  for (const name of taken) process.on(name, listener);
  return {
    signal: controller.signal,
    [Symbol.dispose]() {
      for (const name of taken) process.removeListener(name, listener);
    },
  };
}

/** Rejects with CANCELLED when it comes, or has come. */
export function interrupted(signal: AbortSignal): Promise<never> {
  return new Promise((_, reject) => {
    const stop = () => reject(memferryError('CANCELLED', 'interrupted', { cause: signal.reason }));
    if (signal.aborted) stop();
    else signal.addEventListener('abort', stop, { once: true });
  });
}
