/**
 * What a destination remembers of migrations that are over: a late GRANT or QUERY must get the answer that was
 * given before, never a new decision. Owned by one listener; JavaScript thread.
 *
 * Bounded: beyond `limit` the oldest is forgotten. A source that asks for a forgotten one gets
 * UNKNOWN-MIGRATION, on which it runs nothing, so forgetting can cost an answer but never the law. A source
 * asks for as long as its in-doubt bound, so at the default limit a listener forgets too early only if it
 * ended more than a thousand migrations within that time.
 */
import type { DestinationMessage, SourceMessage } from './commit.js';
import { answerUnknown, type DestinationState, stepDestination } from './commit-destination.js';

type Final = Extract<DestinationState, { phase: 'resumed' | 'abandoned' }>;

export class Tombstones {
  readonly #ended = new Map<string, Final>();
  readonly #limit: number;

  constructor(limit = 1024) {
    this.#limit = limit;
  }

  get size(): number {
    return this.#ended.size;
  }

  has(migration: string): boolean {
    return this.#ended.has(migration);
  }

  /** Throws when the state is not final, or when another end was recorded: an outcome never changes. */
  record(migration: string, state: DestinationState): void {
    if (state.phase !== 'resumed' && state.phase !== 'abandoned') {
      throw new Error(`a migration in phase ${state.phase} is not over`);
    }
    const before = this.#ended.get(migration);
    if (before && before.phase !== state.phase) {
      throw new Error(`migration ${migration} ended ${before.phase} and cannot end ${state.phase}`);
    }
    this.#ended.set(migration, state);
    if (this.#ended.size > this.#limit) {
      const oldest = this.#ended.keys().next();
      if (!oldest.done) this.#ended.delete(oldest.value);
    }
  }

  /** The answer to a message for a migration that is over or unknown; null when it needs none. */
  answer(migration: string, message: SourceMessage): DestinationMessage | null {
    const ended = this.#ended.get(migration);
    if (!ended) return answerUnknown(message);
    // By nobody's epoch but the question's: whoever asks need not be the source, and silences it with no later one.
    const { actions } = stepDestination({ ...ended, epoch: 0 }, { type: 'message', message });
    for (const action of actions) if (action.type === 'send') return action.message;
    return null;
  }
}
