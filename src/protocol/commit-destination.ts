/**
 * The destination's side of the commit, as a pure function. Rules for whoever drives it: commit.ts.
 *
 * READY says that nothing that can fail is left. From then on the destination may not simply go away: the
 * source may have committed. It waits for GRANT, through lost connections, up to a bound; then it refuses for
 * good. `abandoned` is that promise, whatever led to it: every later GRANT or QUERY is answered REFUSED.
 */
import { type Cause, type DestinationMessage, type SourceMessage, type Step, toldCause } from './commit.js';

export type DestinationState =
  /** Pages arrive; PREPARE has not. */
  | { readonly phase: 'receiving' }
  | { readonly phase: 'preparing'; readonly epoch: number }
  /** READY was or is about to be sent. `epoch` is the newest that the source has spoken with. */
  | { readonly phase: 'ready'; readonly epoch: number }
  /** The guest runs here. Final. */
  | { readonly phase: 'resumed'; readonly epoch: number }
  /** The guest has not run here and never will. Final. */
  | { readonly phase: 'abandoned'; readonly epoch: number; readonly cause: Cause };

/** From READY until this side refuses for good. */
export type DestinationTimer = 'grant';

export type DestinationEvent =
  | { readonly type: 'message'; readonly message: SourceMessage }
  /** `prepare` has done everything that can fail. */
  | { readonly type: 'prepared' }
  /** Any local failure up to READY (`prepare` threw or took too long, no memory), and the owner's close. */
  | { readonly type: 'fail'; readonly cause: Cause }
  /** The newest control connection is gone. */
  | { readonly type: 'connection-lost' }
  | { readonly type: 'timer'; readonly timer: DestinationTimer };

export type DestinationAction =
  /** Run `prepare(state)`; answer with `prepared` or `fail`. */
  | { readonly type: 'prepare' }
  /** Let the guest run: nothing in it can fail. */
  | { readonly type: 'resume' }
  /** Let everything of the guest go (after an outstanding `prepare` has ended). Never after `resume`. */
  | { readonly type: 'abandon' }
  /** To the newest connection; nothing happens when there is none. */
  | { readonly type: 'send'; readonly message: DestinationMessage }
  | { readonly type: 'start-timer'; readonly timer: DestinationTimer }
  | { readonly type: 'stop-timer'; readonly timer: DestinationTimer }
  | { readonly type: 'settle'; readonly outcome: 'resumed' }
  | { readonly type: 'settle'; readonly outcome: 'abandoned'; readonly cause: Cause };

export type DestinationStep = Step<DestinationState, DestinationAction>;

export function initialDestination(): DestinationState {
  return { phase: 'receiving' };
}

export function stepDestination(state: DestinationState, event: DestinationEvent): DestinationStep {
  switch (event.type) {
    case 'message':
      return onMessage(state, event.message);
    case 'prepared':
      if (state.phase !== 'preparing') return stay(state);
      return go(
        { phase: 'ready', epoch: state.epoch },
        // The bound first: were the send to fail, this side would still come to an end.
        { type: 'start-timer', timer: 'grant' },
        { type: 'send', message: { type: 'ready', epoch: state.epoch } },
      );
    case 'fail':
      return isFinal(state) ? stay(state) : abandon(state, event.cause);
    case 'connection-lost':
      // A source that loses its connection before GRANT runs on; one that had sent GRANT redials, and only a
      // READY destination can have been granted.
      if (state.phase !== 'receiving' && state.phase !== 'preparing') return stay(state);
      return abandon(state, {
        code: 'PEER_LOST',
        message: 'the connection to the source was lost before the guest was ready here',
      });
    case 'timer':
      if (state.phase !== 'ready') return stay(state);
      return abandon(state, {
        code: 'PEER_LOST',
        message: 'the destination was ready and heard nothing from the source; it will never run the guest',
      });
  }
}

/**
 * The answer to a GRANT or QUERY for a migration that this process has never heard of. It is not a refusal: an
 * earlier process at this address may have run the guest.
 */
export function answerUnknown(message: SourceMessage): DestinationMessage | null {
  return message.type === 'grant' || message.type === 'query'
    ? { type: 'unknown-migration', epoch: message.epoch }
    : null;
}

function onMessage(state: DestinationState, message: SourceMessage): DestinationStep {
  switch (message.type) {
    case 'prepare':
      if (state.phase !== 'receiving') return stay(state);
      return go({ phase: 'preparing', epoch: message.epoch }, { type: 'prepare' });
    case 'cancel':
      // A source that cancels has not granted and never will.
      if (isFinal(state)) return stay(state);
      return abandon(state, { code: message.code, message: message.message });
    case 'grant':
    case 'query': {
      const epoch = epochOf(state);
      // Older than what the source has said since: its connection is gone, nobody reads the answer.
      if (message.epoch < epoch) return stay(state);
      const now = withEpoch(state, message.epoch);
      switch (now.phase) {
        case 'receiving':
        case 'preparing':
          return abandon(now, {
            code: 'PROTOCOL_ERROR',
            message: `${message.type} for a guest that is not ready here`,
          });
        case 'ready':
          if (message.type === 'query') return go(now, send('ready', now.epoch));
          return go(
            { phase: 'resumed', epoch: now.epoch },
            { type: 'stop-timer', timer: 'grant' },
            { type: 'resume' },
            send('resumed', now.epoch),
            { type: 'settle', outcome: 'resumed' },
          );
        case 'resumed':
          return go(now, send('resumed', now.epoch));
        case 'abandoned':
          return go(now, refused(now.epoch, now.cause));
      }
    }
  }
}

function abandon(state: DestinationState, cause: Cause): DestinationStep {
  const epoch = epochOf(state);
  const actions: DestinationAction[] = [];
  if (state.phase === 'ready') actions.push({ type: 'stop-timer', timer: 'grant' });
  // Told before it is torn down: the source's guest may be standing until it hears of it.
  actions.push(refused(epoch, cause), { type: 'abandon' }, { type: 'settle', outcome: 'abandoned', cause });
  return { state: { phase: 'abandoned', epoch, cause }, actions };
}

function isFinal(state: DestinationState): boolean {
  return state.phase === 'resumed' || state.phase === 'abandoned';
}

function epochOf(state: DestinationState): number {
  return state.phase === 'receiving' ? 0 : state.epoch;
}

function withEpoch(state: DestinationState, epoch: number): DestinationState {
  return state.phase === 'receiving' ? state : { ...state, epoch };
}

function send(type: 'ready' | 'resumed', epoch: number): DestinationAction {
  return { type: 'send', message: { type, epoch } };
}

function refused(epoch: number, cause: Cause): DestinationAction {
  return { type: 'send', message: { type: 'refused', epoch, ...toldCause(cause) } };
}

function stay(state: DestinationState): DestinationStep {
  return { state, actions: [] };
}

function go(state: DestinationState, ...actions: DestinationAction[]): DestinationStep {
  return { state, actions };
}
