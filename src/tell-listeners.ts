/** Events for whoever listens outside. JavaScript thread. */
import type { EventEmitter } from 'node:events';

/**
 * As emit(), but what a listener throws ends nothing here, nor what the listeners behind it hear: it is told as a
 * warning, MEMFERRY_LISTENER.
 */
export function tellListeners(
  emitter: Pick<EventEmitter, 'rawListeners'>,
  event: string,
  ...args: unknown[]
): void {
  for (const listener of emitter.rawListeners(event)) {
    try {
      Reflect.apply(listener, emitter, args);
    } catch (error) {
      warn(`a listener of '${event}' threw`, error, 'MEMFERRY_LISTENER');
    }
  }
}

/** What went wrong in code that is not ours, and must neither pass unseen nor end anything. */
export function warn(what: string, error: unknown, code: string): void {
  process.emitWarning(`${what}: ${error instanceof Error ? error.message : String(error)}`, { code });
}
