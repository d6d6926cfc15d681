/**
 * The source's side of the commit, as a pure function. Rules for whoever drives it: commit.ts.
 *
 * Until GRANT is sent, whatever fails ends in `reclaimed`: the guest runs here as if nothing had happened.
 * From then on three things alone lead back here: the destination's own REFUSED, or the caller's proof that
 * the destination is dead. No answer is no proof, and neither is a restarted destination that knows nothing.
 */
import { type Cause, type DestinationMessage, type SourceMessage, type Step, toldCause } from './commit.js';

export type SourceState =
  /** The guest runs; pre-copy rounds, or nothing yet. */
  | { readonly phase: 'running' }
  /** `pause` was called and has not answered: the guest may still run. */
  | { readonly phase: 'pausing' }
  /** The guest stands; what must arrive before `prepare` is on its way. */
  | { readonly phase: 'transferring' }
  /** PREPARE was sent. */
  | { readonly phase: 'preparing' }
  /**
   * GRANT was or is about to be sent, unanswered. `epoch` is the newest connection's, `redials` how many were tried,
   * `waits` how often `retry` is started again before the next redial.
   */
  | {
      readonly phase: 'granted';
      readonly epoch: number;
      readonly redials: number;
      readonly waits: number;
      readonly link: Link;
    }
  /** The bound has passed without an answer. Settled, every page kept; the caller can still resolve it. */
  | { readonly phase: 'in-doubt'; readonly epoch: number }
  /** A destination that knows nothing of the migration: it was restarted, with or without having run the guest. */
  | { readonly phase: 'lost'; readonly epoch: number }
  /** The guest runs at the destination. Final. */
  | { readonly phase: 'departed' }
  /** The guest runs here, for good. Final. `pauseOutstanding`: a pause may still succeed late and is then undone. */
  | { readonly phase: 'reclaimed'; readonly pauseOutstanding: boolean; readonly cause: Cause }
  /** The caller let go of a guest whose fate is not known. Final, and it never runs here. */
  | { readonly phase: 'released' };

type Link = 'up' | 'dialling' | 'down';

export type SourceTimer =
  /** How long `pause` may take. */
  | 'pause'
  /** From PREPARE to READY. */
  | 'ready'
  /** How long to wait for an answer (see `ask`), or after a failed redial, before the next redial. */
  | 'retry'
  /** From GRANT until the source says MIGRATION_IN_DOUBT. */
  | 'doubt';

export type SourceEvent =
  /** The decision to switch over. */
  | { readonly type: 'switch' }
  | { readonly type: 'paused' }
  /** `pause` rejected: the guest runs on. */
  | { readonly type: 'pause-failed'; readonly cause: Cause }
  /** What must be at the destination before it prepares is there, or on its way and waited for there. */
  | { readonly type: 'transferred' }
  /** Any local failure, and the caller's cancel (CANCELLED). Ignored from GRANT on. */
  | { readonly type: 'fail'; readonly cause: Cause }
  | { readonly type: 'message'; readonly message: DestinationMessage }
  /** The current control connection is gone. */
  | { readonly type: 'connection-lost' }
  /** The redial asked for by the last `redial` action succeeded, or did not. */
  | { readonly type: 'redialled'; readonly epoch: number }
  | { readonly type: 'redial-failed'; readonly epoch: number }
  | { readonly type: 'timer'; readonly timer: SourceTimer }
  /** In doubt or lost: the caller has proof that the destination's process is dead and stays so. */
  | { readonly type: 'fence' }
  /** In doubt: the caller wants the destination asked again. */
  | { readonly type: 'ask-again' }
  /** The caller gives up on the guest's fate (or closes everything). Before GRANT: the same as `fail`. */
  | { readonly type: 'release' };

export type SourceAction =
  | { readonly type: 'pause' }
  /** Abort the outstanding `pause`; its outcome must still be reported by `paused` or `pause-failed`. */
  | { readonly type: 'abort-pause' }
  /** Undo the pause: the guest runs here. */
  | { readonly type: 'run-here' }
  | { readonly type: 'send'; readonly message: SourceMessage }
  /** Drop the current control connection, if any, and dial a new one with this epoch. */
  | { readonly type: 'redial'; readonly epoch: number }
  /** (Re)start, or stop, a timer; the driver knows the durations. */
  | { readonly type: 'start-timer'; readonly timer: SourceTimer }
  | { readonly type: 'stop-timer'; readonly timer: SourceTimer }
  /** The migration's promise. A second one, after `in-doubt` or `lost`, is for the promise of `resolve`. */
  | { readonly type: 'settle'; readonly outcome: 'departed' }
  | { readonly type: 'settle'; readonly outcome: 'reclaimed' | 'in-doubt' | 'lost'; readonly cause: Cause };

export type SourceStep = Step<SourceState, SourceAction>;

export function initialSource(): SourceState {
  return { phase: 'running' };
}

/** Whether the guest may be let run here in this state (it may also be standing, in `transferring` and `preparing`). */
export function isCommitted(state: SourceState): boolean {
  switch (state.phase) {
    case 'granted':
    case 'in-doubt':
    case 'lost':
    case 'departed':
    case 'released':
      return true;
    default:
      return false;
  }
}

/** A wait for an answer is at most this many times `retry`. */
const longestWait = 16;

const fenced: Cause = {
  code: 'PEER_LOST',
  message: 'the caller declared the destination dead; the guest runs at the source',
};

export function stepSource(state: SourceState, event: SourceEvent): SourceStep {
  switch (state.phase) {
    case 'running':
    case 'pausing':
    case 'transferring':
    case 'preparing':
      return stepBeforeGrant(state, event);
    case 'granted':
      return stepGranted(state, event);
    case 'in-doubt':
    case 'lost':
      return stepUnresolved(state, event);
    case 'reclaimed':
      return stepReclaimed(state, event);
    case 'departed':
    case 'released':
      return stay(state);
  }
}

type BeforeGrant = Extract<SourceState, { phase: 'running' | 'pausing' | 'transferring' | 'preparing' }>;
type Granted = Extract<SourceState, { phase: 'granted' }>;
type Unresolved = Extract<SourceState, { phase: 'in-doubt' | 'lost' }>;
type Reclaimed = Extract<SourceState, { phase: 'reclaimed' }>;

function stepBeforeGrant(state: BeforeGrant, event: SourceEvent): SourceStep {
  switch (event.type) {
    case 'switch':
      if (state.phase !== 'running') return stay(state);
      return go({ phase: 'pausing' }, { type: 'pause' }, { type: 'start-timer', timer: 'pause' });
    case 'paused':
      if (state.phase !== 'pausing') return stay(state);
      return go({ phase: 'transferring' }, { type: 'stop-timer', timer: 'pause' });
    case 'pause-failed':
      if (state.phase !== 'pausing') return stay(state);
      return reclaim(state, event.cause, { pauseAnswered: true });
    case 'transferred':
      if (state.phase !== 'transferring') return stay(state);
      return go(
        { phase: 'preparing' },
        { type: 'send', message: { type: 'prepare', epoch: 0 } },
        { type: 'start-timer', timer: 'ready' },
      );
    case 'fail':
      return reclaim(state, event.cause);
    case 'release':
      return reclaim(state, { code: 'CANCELLED', message: 'the migration was closed before the commit' });
    case 'connection-lost':
      return reclaim(state, {
        code: 'PEER_LOST',
        message: 'the connection to the destination was lost before the commit; the guest runs on here',
      });
    case 'timer':
      if (event.timer === 'pause' && state.phase === 'pausing') {
        return reclaim(state, { code: 'PAUSE_TIMEOUT', message: 'the guest did not pause in time' });
      }
      if (event.timer === 'ready' && state.phase === 'preparing') {
        return reclaim(state, { code: 'PREPARE_TIMEOUT', message: 'the destination was not ready in time' });
      }
      return stay(state);
    case 'message':
      switch (event.message.type) {
        case 'ready':
          if (state.phase !== 'preparing' || event.message.epoch !== 0) return stay(state);
          return go(
            { phase: 'granted', epoch: 0, redials: 0, waits: 0, link: 'up' },
            { type: 'stop-timer', timer: 'ready' },
            // The bound first: were anything to fail between the two, an unanswered GRANT would still end.
            { type: 'start-timer', timer: 'doubt' },
            { type: 'start-timer', timer: 'retry' },
            { type: 'send', message: { type: 'grant', epoch: 0 } },
          );
        case 'refused':
          return reclaim(state, { code: event.message.code, message: event.message.message });
        case 'unknown-migration':
          return reclaim(state, {
            code: 'PEER_LOST',
            message: 'the destination no longer knows the migration; the guest runs on here',
          });
        case 'resumed':
          // Without a GRANT no destination that keeps the protocol says so; one that lies is not believed.
          return reclaim(state, {
            code: 'PROTOCOL_ERROR',
            message: 'the destination claimed to have resumed a guest that it was not granted',
          });
      }
      return stay(state);
    default:
      return stay(state);
  }
}

function stepGranted(state: Granted, event: SourceEvent): SourceStep {
  switch (event.type) {
    case 'message':
      if (event.message.epoch > state.epoch) return stay(state);
      switch (event.message.type) {
        case 'resumed':
          return depart();
        case 'refused':
          return takeBack({ code: event.message.code, message: event.message.message });
        case 'ready':
          // The answer to QUERY: GRANT never arrived. An old READY was answered by a GRANT already.
          if (event.message.epoch !== state.epoch || state.epoch === 0 || state.link !== 'up')
            return stay(state);
          return ask(state, 'grant');
        case 'unknown-migration':
          if (event.message.epoch !== state.epoch) return stay(state);
          return go(
            { phase: 'lost', epoch: state.epoch },
            { type: 'stop-timer', timer: 'retry' },
            { type: 'stop-timer', timer: 'doubt' },
            {
              type: 'settle',
              outcome: 'lost',
              cause: {
                code: 'GUEST_LOST',
                message:
                  'the destination was granted the guest and has since been restarted; the source does not run it',
              },
            },
          );
      }
      return stay(state);
    case 'connection-lost':
      if (state.link !== 'up') return stay(state);
      // The first redial goes out at once; later ones wait for `retry`, so that a peer that accepts and
      // closes cannot make the source spin.
      return state.redials === 0
        ? redial(state)
        : go({ ...state, waits: 0, link: 'down' }, { type: 'start-timer', timer: 'retry' });
    case 'redialled':
      if (state.link !== 'dialling' || event.epoch !== state.epoch) return stay(state);
      return ask({ ...state, link: 'up' }, 'query');
    case 'redial-failed':
      if (state.link !== 'dialling' || event.epoch !== state.epoch) return stay(state);
      return go({ ...state, link: 'down' }, { type: 'start-timer', timer: 'retry' });
    case 'timer':
      if (event.timer === 'retry') return state.link === 'dialling' ? stay(state) : retry(state);
      if (event.timer === 'doubt') return doubt(state);
      return stay(state);
    case 'fence':
      return takeBack(fenced);
    case 'release':
      // Before the bound the migration's promise is still open: it says what is known, which is nothing.
      return then(doubt(state), { phase: 'released' });
    default:
      return stay(state);
  }
}

function stepUnresolved(state: Unresolved, event: SourceEvent): SourceStep {
  switch (event.type) {
    case 'message':
      if (event.message.epoch > state.epoch) return stay(state);
      if (event.message.type === 'resumed') return depart();
      if (event.message.type === 'refused') {
        return takeBack({ code: event.message.code, message: event.message.message });
      }
      return stay(state);
    case 'fence':
      return takeBack(fenced);
    case 'ask-again': {
      if (state.phase === 'lost') return stay(state);
      const again = redial({ phase: 'granted', epoch: state.epoch, redials: 0, waits: 0, link: 'down' });
      return { state: again.state, actions: [{ type: 'start-timer', timer: 'doubt' }, ...again.actions] };
    }
    case 'release':
      return go({ phase: 'released' });
    default:
      return stay(state);
  }
}

function stepReclaimed(state: Reclaimed, event: SourceEvent): SourceStep {
  if (!state.pauseOutstanding) return stay(state);
  // A pause that succeeds after the migration has given up would leave the guest standing for ever.
  if (event.type === 'paused') return go({ ...state, pauseOutstanding: false }, { type: 'run-here' });
  if (event.type === 'pause-failed') return go({ ...state, pauseOutstanding: false });
  return stay(state);
}

/** Before GRANT: the guest runs on, the destination is told, and can never have been granted. */
function reclaim(state: BeforeGrant, cause: Cause, { pauseAnswered = false } = {}): SourceStep {
  const actions: SourceAction[] = [];
  const pauseOutstanding = state.phase === 'pausing' && !pauseAnswered;
  if (state.phase === 'pausing') actions.push({ type: 'stop-timer', timer: 'pause' });
  if (state.phase === 'preparing') actions.push({ type: 'stop-timer', timer: 'ready' });
  if (pauseOutstanding) actions.push({ type: 'abort-pause' });
  // Running comes before telling: the guest must not stand while a slow connection takes the message.
  if (state.phase === 'transferring' || state.phase === 'preparing') actions.push({ type: 'run-here' });
  actions.push({ type: 'send', message: { type: 'cancel', epoch: 0, ...toldCause(cause) } });
  actions.push({ type: 'settle', outcome: 'reclaimed', cause });
  return { state: { phase: 'reclaimed', pauseOutstanding, cause }, actions };
}

/** After GRANT, by the destination's refusal or the caller's fence alone. */
function takeBack(cause: Cause): SourceStep {
  return go(
    { phase: 'reclaimed', pauseOutstanding: false, cause },
    { type: 'stop-timer', timer: 'retry' },
    { type: 'stop-timer', timer: 'doubt' },
    { type: 'run-here' },
    { type: 'settle', outcome: 'reclaimed', cause },
  );
}

function depart(): SourceStep {
  return go(
    { phase: 'departed' },
    { type: 'stop-timer', timer: 'retry' },
    { type: 'stop-timer', timer: 'doubt' },
    { type: 'settle', outcome: 'departed' },
  );
}

function doubt(state: Granted): SourceStep {
  return go(
    { phase: 'in-doubt', epoch: state.epoch },
    { type: 'stop-timer', timer: 'retry' },
    { type: 'stop-timer', timer: 'doubt' },
    {
      type: 'settle',
      outcome: 'in-doubt',
      cause: {
        code: 'MIGRATION_IN_DOUBT',
        message:
          'the destination was granted the guest and has not answered; the source keeps its pages and does not run it',
      },
    },
  );
}

/**
 * Twice as long after each redial: a network whose round trip is longer than the wait would have every connection
 * dropped before its answer is there. One that is known to be down is dialled without waiting longer.
 */
function ask(state: Granted, type: 'grant' | 'query'): SourceStep {
  return go(
    { ...state, waits: Math.min(2 ** state.redials, longestWait) - 1 },
    { type: 'start-timer', timer: 'retry' },
    { type: 'send', message: { type, epoch: state.epoch } },
  );
}

function retry(state: Granted): SourceStep {
  if (state.waits === 0) return redial(state);
  return go({ ...state, waits: state.waits - 1 }, { type: 'start-timer', timer: 'retry' });
}

function redial(state: Granted): SourceStep {
  const epoch = state.epoch + 1;
  return go(
    { phase: 'granted', epoch, redials: state.redials + 1, waits: 0, link: 'dialling' },
    { type: 'stop-timer', timer: 'retry' },
    { type: 'redial', epoch },
  );
}

function stay(state: SourceState): SourceStep {
  return { state, actions: [] };
}

function go(state: SourceState, ...actions: SourceAction[]): SourceStep {
  return { state, actions };
}

function then(step: SourceStep, state: SourceState): SourceStep {
  return { state, actions: step.actions };
}
