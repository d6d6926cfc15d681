/**
 * The commit of a park, with the image's home server as the destination: the source's machine and driver are the
 * same as for a migration. `prepare` is that every page and the execution state are at the servers, `resume` that
 * the home server owns the guest. Owned by one image; JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { Cause, DestinationMessage, SourceMessage } from '../protocol/commit.js';
import {
  type DestinationAction,
  type DestinationEvent,
  type DestinationState,
  initialDestination,
  stepDestination,
} from '../protocol/commit-destination.js';
import { InTurn } from '../protocol/in-turn.js';
import { NamedTimers } from '../protocol/timers.js';

/** A control connection, as far as a commit cares. */
export interface CommitLink {
  send(message: DestinationMessage): void;
}

export interface ParkCommitConfig {
  grantTimeoutMs: number;
  /** Throws why the guest cannot be parked; when it returns, nothing that can fail is left. */
  prepare(): void;
  /** The guest is the home server's. Must not fail. */
  park(): void;
  /** The guest is its source's again, and never this server's. */
  abandon(cause: Cause): void;
  /** The commit has an outcome: remember it. */
  decided(state: DestinationState): void;
}

export class ParkCommit {
  #state: DestinationState = initialDestination();
  #link: CommitLink | null = null;
  readonly #events = new InTurn<DestinationEvent>((event) => {
    const { state, actions } = stepDestination(this.#state, event);
    const decided =
      state.phase !== this.#state.phase && (state.phase === 'resumed' || state.phase === 'abandoned');
    this.#state = state;
    if (decided) this.config.decided(state);
    for (const action of actions) this.#carryOut(action);
  });
  readonly #timers: NamedTimers<'grant'>;

  constructor(private readonly config: ParkCommitConfig) {
    this.#timers = new NamedTimers({ grant: config.grantTimeoutMs }, (timer) =>
      this.#dispatch({ type: 'timer', timer }),
    );
  }

  /** Answers go to the connection that spoke last. */
  message(link: CommitLink, message: SourceMessage): void {
    this.#link = link;
    this.#dispatch({ type: 'message', message });
  }

  /**
   * The connection is gone. One that has said nothing of the commit yet can be taken up again: until PREPARE it is
   * the image's lease that ends what its source has left.
   */
  detached(link: CommitLink): void {
    if (this.#link !== link) return;
    this.#link = null;
    this.#dispatch({ type: 'connection-lost' });
  }

  /** The image goes, for whatever reason. Nothing happens once the guest is parked. */
  fail(cause: Cause): void {
    this.#dispatch({ type: 'fail', cause });
  }

  #dispatch(event: DestinationEvent): void {
    this.#events.dispatch(event);
  }

  #carryOut(action: DestinationAction): void {
    switch (action.type) {
      case 'prepare':
        try {
          this.config.prepare();
        } catch (error) {
          const { code, message } =
            error instanceof MemferryError ? error : { code: 'PREPARE_FAILED', message: String(error) };
          this.#dispatch({ type: 'fail', cause: { code, message } });
          return;
        }
        this.#dispatch({ type: 'prepared' });
        break;
      case 'resume':
        this.config.park();
        break;
      case 'abandon':
        this.config.abandon(this.#state.phase === 'abandoned' ? this.#state.cause : abandoned);
        break;
      case 'send':
        this.#link?.send(action.message);
        break;
      case 'start-timer':
        this.#timers.start(action.timer);
        break;
      case 'stop-timer':
        this.#timers.stop(action.timer);
        break;
      case 'settle':
        break;
    }
  }
}

const abandoned: Cause = { code: 'CANCELLED', message: 'the park was abandoned' };
