/** The native receiver with its events as promises and callbacks; the destination's twin of source/engine.ts. */
import { loadAddon } from '../addon.js';
import { fromNativeEvent, type MemferryError, native } from '../errors.js';
import type { NativeEvent, NativeReceiver, NativeReceiverConfig, NativeRun } from '../native.js';
import { deferred } from '../protocol/deferred.js';

export interface ReceiverListener {
  paused(): void;
  recovered(): void;
  lost(runs: NativeRun[], why: string): void;
  /** After a loss: what is not lost is here. */
  restHere(): void;
  failed(error: MemferryError): void;
}

export class DestinationEngine {
  readonly receiver: NativeReceiver;
  readonly #complete = deferred<void>();
  readonly #switched = deferred<void>();
  readonly #filled = deferred<void>();
  #closed = false;

  constructor(config: Omit<NativeReceiverConfig, 'onEvent'>, listener: ReceiverListener) {
    this.receiver = native(() =>
      loadAddon().createReceiver({ ...config, onEvent: (event) => this.#onEvent(event, listener) }),
    );
  }

  /** Every page is there and the pager has let go. */
  get complete(): Promise<void> {
    return this.#complete.promise;
  }

  /** Post-copy: everything that is not here is registered, and faults are served. */
  get switched(): Promise<void> {
    return this.#switched.promise;
  }

  /** Before the switch: every page is here, gathered ones too. */
  filled(): Promise<void> {
    this.receiver.awaitFilled();
    return this.#filled.promise;
  }

  /** Poisons what is missing when pages are still away, wakes who waits for them, joins every thread. */
  close(reason: MemferryError): void {
    if (this.#closed) return;
    this.#closed = true;
    this.receiver.close();
    this.#reject(reason);
  }

  #reject(error: MemferryError): void {
    this.#complete.reject(error);
    this.#switched.reject(error);
    this.#filled.reject(error);
  }

  #onEvent(event: NativeEvent, listener: ReceiverListener): void {
    if (this.#closed) return;
    switch (event.kind) {
      case 'complete':
        this.#complete.resolve();
        break;
      case 'switched':
        this.#switched.resolve();
        break;
      case 'filled':
        this.#filled.resolve();
        break;
      case 'paused':
        listener.paused();
        break;
      case 'recovered':
        listener.recovered();
        break;
      case 'lost':
        listener.lost(event.lost, event.message);
        break;
      case 'rest-here':
        listener.restHere();
        break;
      case 'failed': {
        const error = fromNativeEvent(event);
        this.#reject(error);
        listener.failed(error);
        break;
      }
    }
  }
}
