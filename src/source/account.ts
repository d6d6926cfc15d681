/** The destination's account of a migration, which ends it: asked for when nothing is left here that anyone needs. */
import { MemferryError } from '../errors.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import type { DestinationMessage } from '../protocol/messages.js';
import type { SourceSession } from './session.js';

export type Summary = Extract<DestinationMessage, { type: 'summary' }>;

export class DestinationAccount {
  readonly #summary: Deferred<Summary> = deferred();
  readonly #over: Deferred<never> = deferred();

  constructor() {
    this.#over.promise.catch(() => {});
  }

  /** Rejects when the destination says that nothing it is sent is of any use. */
  get over(): Promise<never> {
    return this.#over.promise;
  }

  /** Tells the destination that all is sent, and takes its account; dials again when the connection is cut. */
  async ask(session: SourceSession, digests: string[] | null, boundMs: number): Promise<Summary> {
    const summary = Promise.race([this.#summary.promise, this.#over.promise]);
    await session.keepTelling({ type: 'evicted', digests }, summary, boundMs);
    return summary;
  }

  onMessage(message: Summary | Extract<DestinationMessage, { type: 'lost' | 'over' }>): void {
    switch (message.type) {
      case 'summary':
        this.#summary.resolve(message);
        break;
      case 'lost':
        if (message.runs.length === 0) {
          const why = 'the guest was committed to the destination, which can take in nothing more';
          this.#over.reject(new MemferryError('GUEST_LOST', why));
        }
        this.#summary.reject(
          new MemferryError('PAGES_LOST', 'the destination lacks pages for good', {
            facts: { runs: message.runs },
          }),
        );
        break;
      case 'over':
        this.#summary.reject(
          new MemferryError(
            'PEER_LOST',
            'every page had left, but the destination was restarted since, or has let go of the guest: how it fares is not known',
          ),
        );
        break;
    }
  }

  /** Nobody waits for it any more. */
  abandon(error: MemferryError): void {
    this.#summary.reject(error);
  }
}
