/**
 * Everything that can fail before READY: the guest's state has come, so have the pages that it must not be without, and
 * its owner's `prepare` succeeds. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { ArrivingGuest } from '../guest.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { toPeer } from '../protocol/peer-error.js';
import type { DestinationEngine } from './engine.js';

export class Preparation {
  /** The guest's opaque state. */
  readonly executionState: Deferred<Uint8Array> = deferred();
  readonly #abort = new AbortController();
  /** Said with the execution state: the switch to post-copy comes before `prepare`. */
  #awaitsSwitch = false;
  #tookMs = 0;

  constructor(
    private readonly guest: ArrivingGuest,
    private readonly engine: DestinationEngine,
    private readonly timeoutMs: number,
    /** Where the source has sent pages to servers: it says itself how long the guest may wait for them. */
    private readonly gatherTimeoutMs: number | null,
  ) {}

  /** How long it took when all was there, in ms. */
  get tookMs(): number {
    return this.#tookMs;
  }

  /** The source has paused the guest. */
  stateCame(state: Uint8Array, paging: boolean): void {
    this.#awaitsSwitch = paging;
    this.executionState.resolve(state);
  }

  /** Rejects with a MemferryError. */
  async run(): Promise<void> {
    try {
      await this.#prepare();
    } catch (error) {
      if (error instanceof MemferryError) throw error;
      const { message } = toPeer(error, 'PREPARE_FAILED');
      throw new MemferryError('PREPARE_FAILED', message, { cause: error });
    }
  }

  /** The migration is over: a `prepare` that goes on is told. */
  abort(reason: MemferryError | null): void {
    this.#abort.abort(reason ?? undefined);
  }

  async #prepare(): Promise<void> {
    const { guest, engine, timeoutMs, gatherTimeoutMs } = this;
    const { signal } = this.#abort;
    let started = performance.now();
    if (!this.executionState.settled) throw new MemferryError('PROTOCOL_ERROR', 'PREPARE without a state');
    if (this.#awaitsSwitch) {
      await within(
        untilAborted(engine.switched, signal),
        timeoutMs,
        'PREPARE_TIMEOUT',
        `the switch to post-copy did not come within ${timeoutMs} ms`,
      );
      started = performance.now();
    } else if (gatherTimeoutMs !== null) {
      // What the source sent to the servers is fetched first.
      await within(
        untilAborted(engine.filled(), signal),
        gatherTimeoutMs,
        'PREPARE_TIMEOUT',
        'the guest was not gathered in time',
      );
      started = performance.now();
    }
    if (!engine.receiver.seal()) {
      throw new MemferryError(
        'PROTOCOL_ERROR',
        'PREPARE although pages are missing that no pager could fetch',
      );
    }
    const state = await this.executionState.promise;
    await within(
      Promise.resolve(guest.prepare(state, { signal })),
      timeoutMs,
      'PREPARE_TIMEOUT',
      `prepare did not end within ${timeoutMs} ms`,
    );
    this.#tookMs = performance.now() - started;
  }
}
