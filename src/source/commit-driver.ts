/**
 * Carries out what the source's commit machine decides: pauses and unpauses the guest, sends, redials, runs
 * the timers. The rules it keeps are listed in protocol/commit.ts. JavaScript thread.
 */
import { markDeparted, markHere } from '../departed.js';
import { type ErrorCode, fromNative, MemferryError } from '../errors.js';
import type { Guest, PausedGuest } from '../guest.js';
import type { Cause, DestinationMessage, SourceMessage } from '../protocol/commit.js';
import {
  initialSource,
  isCommitted,
  type SourceAction,
  type SourceEvent,
  type SourceState,
  type SourceTimer,
  stepSource,
} from '../protocol/commit-source.js';
import { within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { InTurn } from '../protocol/in-turn.js';
import { fromPeer } from '../protocol/peer-error.js';
import { NamedTimers } from '../protocol/timers.js';
import type { Region } from '../region.js';
import { warn } from '../tell-listeners.js';

const unpauseTimeoutMs = 15_000;

/**
 * A pause that was given up may succeed late, when it is not its migration's any more to let the guest run: another one
 * stands on a pause of its own, or has taken the guest away since.
 */
interface Standing {
  /** Who asked last for a pause, until it is known that the guest runs on here. */
  holder: CommitDriver | null;
  /** A pause of somebody else's has succeeded meanwhile: if the holder gives the guest up, it has to be let run. */
  owed: boolean;
  /** Never rejects. */
  unpausing: Promise<void> | null;
}
/** By the guest's memory: each call may bring another object for the same guest. */
const standings = new WeakMap<Region | Guest, Standing>();

function standingOf(guest: Guest): Standing {
  const key = guest.regions[0]?.region ?? guest;
  const known = standings.get(key) ?? { holder: null, owed: false, unpausing: null };
  standings.set(key, known);
  return known;
}

export type Settlement =
  | { outcome: 'departed' }
  | { outcome: 'reclaimed' | 'in-doubt' | 'lost'; error: MemferryError };

export interface CommitDriverConfig {
  timeoutsMs: Record<SourceTimer, number>;
  /** To the newest connection; throwing counts as its loss. */
  send(message: SourceMessage): void;
  /** Dials anew; resolves when the destination has taken the connection up. */
  redial(): Promise<void>;
}

export class CommitDriver {
  #state: SourceState = initialSource();
  readonly #events = new InTurn<SourceEvent>((event) => {
    const { state, actions } = stepSource(this.#state, event);
    this.#state = state;
    for (const action of actions) this.#carryOut(action);
  });
  readonly #standing: Standing;
  #settled = deferred<Settlement>();
  #late: Settlement | null = null;
  #paused: Deferred<PausedGuest> = deferred();
  #stillPaused: PausedGuest['stillPaused'];
  #pauseAbort = new AbortController();
  /** The error behind a cause, so that the caller gets the original with its facts. */
  #error: MemferryError | null = null;
  readonly #timers: NamedTimers<SourceTimer>;
  /** Never rejects. */
  #unpausing: Promise<void> = Promise.resolve();

  constructor(
    private readonly guest: Guest,
    private readonly config: CommitDriverConfig,
  ) {
    this.#standing = standingOf(guest);
    this.#timers = new NamedTimers(config.timeoutsMs, (timer) => this.#dispatch({ type: 'timer', timer }));
  }

  /** GRANT was sent: the guest is not this side's any more, as far as anyone here knows. */
  get committed(): boolean {
    return isCommitted(this.#state);
  }

  /** Never rejects. A new promise after `resolve`. */
  get settled(): Promise<Settlement> {
    return this.#settled.promise;
  }

  /** Whoever lets go of the guest waits for this: it runs again, or has failed to, or takes too long. Never rejects. */
  async unpaused(): Promise<void> {
    await within(this.#unpausing, unpauseTimeoutMs, 'SYSTEM', 'unpause() takes its time').catch(() => {});
  }

  /** Pauses the guest; rejects when it cannot be paused, or the migration is over before that. */
  pause(): Promise<PausedGuest> {
    this.#dispatch({ type: 'switch' });
    return this.#paused.promise;
  }

  /** PREPARE may be sent; from here on the machine goes on by itself. */
  transferred(): void {
    this.#dispatch({ type: 'transferred' });
  }

  message(message: DestinationMessage): void {
    this.#dispatch({ type: 'message', message });
  }

  /** READY. Nothing comes between the guest's word that it still stands and GRANT. */
  ready(message: Extract<DestinationMessage, { type: 'ready' }>): void {
    if (this.committed || !this.#stillPaused) {
      this.message(message);
      return;
    }
    this.#stillPaused().then(
      () => this.message(message),
      (error) => this.fail(error),
    );
  }

  connectionLost(error: MemferryError): void {
    if (!this.committed) this.#error ??= error;
    this.#dispatch({ type: 'connection-lost' });
  }

  fail(error: unknown): void {
    if (this.committed) return;
    // What the addon throws says what it is; what somebody's own code throws does not.
    const known = error instanceof MemferryError || typeof Object(error).code === 'string';
    this.#error ??= known
      ? fromNative(error)
      : new MemferryError('SYSTEM', error instanceof Error ? error.message : String(error), { cause: error });
    this.#dispatch({ type: 'fail', cause: { code: this.#error.code, message: this.#error.message } });
  }

  /** In doubt or lost: by the caller's proof, or by asking the destination once more. */
  resolve(how: 'fence' | 'ask-again'): Promise<Settlement> {
    const { phase } = this.#state;
    if (this.#late) {
      const late = Promise.resolve(this.#late);
      this.#late = null;
      return late;
    }
    if (phase !== 'in-doubt' && phase !== 'lost') {
      return Promise.reject(
        new MemferryError('INVALID_ARGUMENT', 'there is nothing to resolve: the migration is not in doubt'),
      );
    }
    this.#settled = deferred();
    const { promise } = this.#settled;
    this.#dispatch({ type: how });
    if (how === 'ask-again' && this.#state.phase === 'lost') this.#settle('lost', lostForGood);
    return promise;
  }

  release(): void {
    if (this.committed) markDeparted(this.guest);
    this.#dispatch({ type: 'release' });
    this.#timers.stopAll();
  }

  #dispatch(event: SourceEvent): void {
    this.#events.dispatch(event);
  }

  #carryOut(action: SourceAction): void {
    switch (action.type) {
      case 'pause':
        this.#standing.holder = this;
        void this.#pause();
        break;
      case 'abort-pause':
        this.#pauseAbort.abort(new MemferryError('CANCELLED', 'the migration is over'));
        break;
      case 'run-here':
        if ((this.#standing.holder ?? this) === this) this.#letRun();
        else this.#standing.owed = true;
        break;
      case 'send':
        try {
          this.config.send(action.message);
        } catch (error) {
          // The connection's own end is reported by its reader; a message that could not leave is a lost one. But before
          // the first word of a commit nobody reads for it.
          if (action.message.type === 'prepare') this.connectionLost(error as MemferryError);
        }
        break;
      case 'redial':
        this.config.redial().then(
          () => this.#dispatch({ type: 'redialled', epoch: action.epoch }),
          () => this.#dispatch({ type: 'redial-failed', epoch: action.epoch }),
        );
        break;
      case 'start-timer':
        this.#timers.start(action.timer);
        break;
      case 'stop-timer':
        this.#timers.stop(action.timer);
        break;
      case 'settle':
        if (action.outcome === 'reclaimed') markHere(this.guest);
        else markDeparted(this.guest);
        if (action.outcome === 'reclaimed' && this.#standing.holder === this) {
          this.#standing.holder = null;
          if (this.#standing.owed) this.#letRun();
        }
        if (action.outcome === 'departed') this.#conclude({ outcome: 'departed' });
        else this.#settle(action.outcome, action.cause);
        break;
    }
  }

  #settle(outcome: 'reclaimed' | 'in-doubt' | 'lost', cause: Cause): void {
    const known = this.#error;
    const error =
      known && known.code === cause.code
        ? known
        : cause.code === 'PEER_LOST' && known
          ? new MemferryError('PEER_LOST', cause.message, { cause: known })
          : fromPeer(cause.code, cause.message);
    this.#conclude({ outcome, error });
    this.#paused.reject(error);
  }

  /** An answer that comes when nobody asks any more (it is in doubt) is what `resolve` finds. */
  #conclude(settlement: Settlement): void {
    if (this.#settled.settled) this.#late = settlement;
    else this.#settled.resolve(settlement);
  }

  #letRun(): void {
    this.#unpausing = this.#unpause();
    this.#standing.owed = false;
    this.#standing.unpausing = this.#unpausing;
  }

  async #pause(): Promise<void> {
    try {
      // Of a migration before this one.
      const { unpausing } = this.#standing;
      if (unpausing) {
        // Whatever that one comes to, it is over: from then on this migration alone says who runs.
        const over = unpausing.catch(() => {});
        await within(over, unpauseTimeoutMs, 'GUEST_BUSY', 'unpause() of the last migration goes on');
        this.#pauseAbort.signal.throwIfAborted();
      }
      const result = await this.guest.pause({ signal: this.#pauseAbort.signal });
      const paused = result instanceof Uint8Array ? bareState(this.guest, result) : result;
      if (!(paused?.state instanceof Uint8Array)) {
        // The guest stands, whatever it gave: it must be let run again.
        await this.#unpause();
        throw new MemferryError('PAUSE_FAILED', 'pause() must give the execution state as a Uint8Array');
      }
      this.#stillPaused = paused.stillPaused;
      this.#dispatch({ type: 'paused' });
      this.#paused.resolve(paused);
    } catch (error) {
      const code: ErrorCode =
        error instanceof MemferryError &&
        ['GUEST_BUSY', 'GUEST_UNMOVABLE', 'PAUSE_TIMEOUT'].includes(error.code)
          ? error.code
          : 'PAUSE_FAILED';
      const known =
        error instanceof MemferryError && error.code === code
          ? error
          : new MemferryError(
              code,
              `pause failed: ${error instanceof Error ? error.message : String(error)}`,
              {
                cause: error,
              },
            );
      this.#error ??= known;
      this.#dispatch({ type: 'pause-failed', cause: { code: known.code, message: known.message } });
    }
  }

  async #unpause(): Promise<void> {
    try {
      await this.guest.unpause();
    } catch (error) {
      // The guest is this side's, but does not run: that must not pass unseen.
      const what = `guest '${this.guest.name}' could not be unpaused after its migration failed`;
      warn(what, error, 'MEMFERRY_UNPAUSE_FAILED');
    }
  }
}

const lostForGood: Cause = {
  code: 'GUEST_LOST',
  message:
    'the destination was restarted and knows nothing of the guest; only a fence can bring it back here',
};

function bareState({ pausedAtNs }: Guest, state: Uint8Array): PausedGuest {
  return pausedAtNs === undefined ? { state } : { state, pausedAtNs };
}
