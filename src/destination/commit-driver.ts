/**
 * Carries out what the destination's commit machine decides; the destination's twin of source/commit-driver.ts. The rules
 * it keeps are listed in protocol/commit.ts. JavaScript thread.
 */
import type { MemferryError } from '../errors.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import {
  type DestinationAction,
  type DestinationEvent,
  type DestinationState,
  type DestinationTimer,
  initialDestination,
  stepDestination,
} from '../protocol/commit-destination.js';
import { InTurn } from '../protocol/in-turn.js';
import { fromPeer } from '../protocol/peer-error.js';
import { NamedTimers } from '../protocol/timers.js';

export interface CommitListener {
  /** Everything that can fail; answered by `prepared` or `fail`. */
  prepare(): void;
  resume(): void;
  /** Lets everything of the guest go; null: it was not this side that failed. */
  abandon(error: MemferryError | null): void;
  /** To the newest connection, if there is one. */
  send(message: DestinationMessage): void;
  /** There is an outcome, before anyone hears of it. */
  decided(state: DestinationState): void;
  /** The guest never runs here. */
  abandoned(error: MemferryError): void;
}

export class DestinationCommit {
  #state: DestinationState = initialDestination();
  readonly #events = new InTurn<DestinationEvent>((event) => {
    const { state, actions } = stepDestination(this.#state, event);
    const decided =
      state.phase !== this.#state.phase && (state.phase === 'resumed' || state.phase === 'abandoned');
    this.#state = state;
    if (decided) this.listener.decided(state);
    for (const action of actions) this.#carryOut(action);
  });
  readonly #timers: NamedTimers<DestinationTimer>;
  /** The error behind a cause, so that the owner gets the original with its facts. */
  #error: MemferryError | null = null;

  constructor(
    timeoutsMs: Record<DestinationTimer, number>,
    private readonly listener: CommitListener,
  ) {
    this.#timers = new NamedTimers(timeoutsMs, (timer) => this.#events.dispatch({ type: 'timer', timer }));
  }

  get phase(): DestinationState['phase'] {
    return this.#state.phase;
  }

  message(message: SourceMessage): void {
    this.#events.dispatch({ type: 'message', message });
  }

  prepared(): void {
    this.#events.dispatch({ type: 'prepared' });
  }

  connectionLost(): void {
    this.#events.dispatch({ type: 'connection-lost' });
  }

  fail(error: MemferryError): void {
    this.#error ??= error;
    this.#events.dispatch({ type: 'fail', cause: { code: error.code, message: error.message } });
  }

  stopTimers(): void {
    this.#timers.stopAll();
  }

  #carryOut(action: DestinationAction): void {
    switch (action.type) {
      case 'prepare':
        this.listener.prepare();
        break;
      case 'resume':
        this.listener.resume();
        break;
      case 'abandon':
        this.listener.abandon(this.#error);
        break;
      case 'send':
        this.listener.send(action.message);
        break;
      case 'start-timer':
        this.#timers.start(action.timer);
        break;
      case 'stop-timer':
        this.#timers.stop(action.timer);
        break;
      case 'settle':
        if (action.outcome === 'abandoned') {
          this.listener.abandoned(this.#error ?? fromPeer(action.cause.code, action.cause.message));
        }
        break;
    }
  }
}
