/**
 * Who owns a guest whose memory lies in the VMD: one image at one server, as a pure function. The image's home
 * server (ordinal 0) decides; the others only keep pages, and refuse to be asked.
 *
 *     migrating ── commit ──> committed            the guest runs at its destination
 *         │ prepared, then park                    the commit protocol, with the server as destination
 *     parking ──> parked <── release, lease ── claimed ── grant ──> resumed
 *                    └──────── claim ────────────^  └── rollback of a resumed one ──┘
 *
 * One claim at a time, each with the next epoch; whatever names an older one is refused. A claim is exclusive but
 * costs nothing: it goes back when it is released, or when its claimant's connection has been gone for the lease.
 * GRANT is the commit. It is answered alike as often as its claimant asks, and from then on only `rollback` (the
 * caller's word that this very owner is dead and stays so) leads to another claim. Pages go by dissolve, drop
 * or time to live; by a lease only while nothing was committed, and the guest is its source's.
 *
 * Whoever drives it keeps the rules of commit.ts: store the state, then carry out the actions in order; every event
 * goes in. A request's event gives exactly one `answer`.
 */
import type { ImageKind } from './stage-messages.js';

/** What never changes about an image. */
export interface ClaimsFacts {
  readonly kind: ImageKind;
  /** This server grants claims. */
  readonly home: boolean;
  /** A parked image that nobody has open goes after a while. */
  readonly mortal: boolean;
}

export type DissolveCause = 'dissolve' | 'drop' | 'lease' | 'ttl' | 'abandoned';

type Resting =
  /** Its guest runs at its destination, or (not home) was claimed at the home server. */
  | { readonly phase: 'committed'; readonly epoch: number }
  | { readonly phase: 'parked'; readonly epoch: number }
  /** Granted with epoch `granted`; a later claim by rollback was given back when `epoch` is newer. */
  | {
      readonly phase: 'resumed';
      readonly epoch: number;
      readonly granted: number;
      readonly claimant: string;
    };

export type ClaimsPhase =
  /** Uncommitted: the guest is its source's. */
  | { readonly phase: 'migrating' }
  /** READY was said to the source of a park. */
  | { readonly phase: 'parking' }
  | Resting
  | {
      readonly phase: 'claimed';
      readonly epoch: number;
      readonly claimant: string;
      /** A connection of the claimant's is there. */
      readonly held: boolean;
      /** Where it goes back to. */
      readonly from: Resting;
    }
  /** Nothing is left of it. Final. */
  | { readonly phase: 'dissolved'; readonly cause: DissolveCause };

/** `open`: a control connection has the image open. */
export type ClaimsState = { readonly facts: ClaimsFacts; readonly open: boolean } & ClaimsPhase;

/** `lease`: of an uncommitted image; `claim`: of a claim that was not granted; `ttl`: of a parked image. */
export type ClaimsTimer = 'lease' | 'claim' | 'ttl';

export type ClaimsEvent =
  /** A control connection has opened it; `claim` when that shows who its claimant is. */
  | { readonly type: 'opened'; readonly claim: { claimant: string; epoch: number } | null }
  /** The last connection that had it open is gone. */
  | { readonly type: 'connection-lost' }
  /** The last connection of the claim with this epoch is gone. */
  | { readonly type: 'claimant-lost'; readonly epoch: number }
  | { readonly type: 'lease-over' }
  | { readonly type: 'claim-over' }
  | { readonly type: 'ttl-over' }
  /** The park's commit: READY is about to be said; GRANT came; it will never be parked. */
  | { readonly type: 'prepared' }
  | { readonly type: 'park' }
  | { readonly type: 'abandon' }
  | ClaimsRequest;

export type ClaimsRequest =
  | { readonly type: 'commit' }
  | { readonly type: 'hold' }
  | {
      readonly type: 'claim';
      readonly claimant: string;
      /**
       * The caller's word that the guest's owner is dead and stays so: which one, as `ownerOf` tells it. A word that
       * comes late cannot be about a later owner. Null: no such word.
       */
      readonly rollback: number | null;
      /** Every page and the execution state lie at VMD servers, none of them at a destination only. */
      readonly whole: boolean;
    }
  | { readonly type: 'grant'; readonly claimant: string; readonly epoch: number }
  | { readonly type: 'release'; readonly claimant: string; readonly epoch: number }
  | { readonly type: 'dissolve'; readonly epoch: number }
  | { readonly type: 'drop' };

export type RefusalReason =
  | 'not-home'
  | 'not-parked'
  | 'uncommitted'
  | 'parking'
  | 'claimed'
  | 'resumed'
  | 'stale'
  | 'incomplete'
  | 'gone';

export type ClaimsAnswer =
  | { readonly type: 'committed' | 'held' | 'granted' | 'released' | 'dissolved' | 'dropped' }
  | { readonly type: 'claimed'; readonly epoch: number }
  | { readonly type: 'declined'; readonly reason: RefusalReason; readonly message: string };

export type ClaimsAction =
  | { readonly type: 'answer'; readonly answer: ClaimsAnswer }
  | { readonly type: 'start-timer'; readonly timer: ClaimsTimer }
  | { readonly type: 'stop-timer'; readonly timer: ClaimsTimer }
  /** Let everything of the image go. */
  | { readonly type: 'drop'; readonly cause: DissolveCause };

export interface ClaimsStep {
  readonly state: ClaimsState;
  readonly actions: readonly ClaimsAction[];
}

export function initialClaims(facts: ClaimsFacts): ClaimsState {
  return { facts, open: true, phase: 'migrating' };
}

/** The newest claim's epoch, 0 when there was none. */
export function epochOf(state: ClaimsState): number {
  return 'epoch' in state ? state.epoch : 0;
}

/** Who has the guest: 0, a migration's destination; else the epoch of the claim that was granted; null, nobody. */
export function ownerOf(state: ClaimsState): number | null {
  const resting = state.phase === 'claimed' ? state.from : state;
  if (resting.phase === 'resumed') return resting.granted;
  return resting.phase === 'committed' && state.facts.kind === 'migration' ? 0 : null;
}

export function stepClaims(state: ClaimsState, event: ClaimsEvent): ClaimsStep {
  if (state.phase === 'dissolved') {
    return isRequest(event) ? decline(state, 'gone', `the image is gone (${state.cause})`) : stay(state);
  }
  switch (event.type) {
    case 'opened':
      return onOpened({ ...state, open: true }, event.claim);
    case 'connection-lost':
      return onConnectionLost({ ...state, open: false });
    case 'claimant-lost':
      if (state.phase !== 'claimed' || event.epoch !== state.epoch || !state.held) return stay(state);
      return go({ ...state, held: false }, { type: 'start-timer', timer: 'claim' });
    case 'lease-over':
      // Fired just before somebody opened it again: nothing has happened.
      return state.phase === 'migrating' && !state.open ? dissolve(state, 'lease') : stay(state);
    case 'claim-over':
      return state.phase === 'claimed' && !state.held ? giveBack(state) : stay(state);
    case 'ttl-over':
      return state.phase === 'parked' && !state.open ? dissolve(state, 'ttl') : stay(state);
    case 'prepared':
      if (state.phase !== 'migrating' || !parksHere(state)) return stay(state);
      return go(to(state, { phase: 'parking' }), { type: 'stop-timer', timer: 'lease' });
    case 'park':
      return state.phase === 'parking' ? rest(state, { phase: 'parked', epoch: 0 }) : stay(state);
    case 'abandon':
      // Only before GRANT: the guest is its source's again.
      return state.phase === 'migrating' || state.phase === 'parking'
        ? dissolve(state, 'abandoned')
        : stay(state);
    case 'commit':
      return onCommit(state);
    case 'hold':
      return onHold(state);
    case 'claim':
      return onClaim(state, event);
    case 'grant':
      return onGrant(state, event);
    case 'release':
      return onRelease(state, event);
    case 'dissolve':
      return onDissolve(state, event.epoch);
    case 'drop':
      return dissolve(state, 'drop', { type: 'dropped' });
  }
}

function onOpened(state: ClaimsState, claim: { claimant: string; epoch: number } | null): ClaimsStep {
  if (state.phase === 'migrating') return go(state, { type: 'stop-timer', timer: 'lease' });
  if (state.phase === 'parked') return go(state, { type: 'stop-timer', timer: 'ttl' });
  if (state.phase === 'claimed' && claim && isClaim(state, claim)) {
    return go({ ...state, held: true }, { type: 'stop-timer', timer: 'claim' });
  }
  return stay(state);
}

function onConnectionLost(state: ClaimsState): ClaimsStep {
  if (state.phase === 'migrating') return go(state, { type: 'start-timer', timer: 'lease' });
  if (state.phase === 'parked' && state.facts.mortal) return go(state, { type: 'start-timer', timer: 'ttl' });
  return stay(state);
}

function onCommit(state: ClaimsState): ClaimsStep {
  if (state.facts.kind === 'park') {
    if (state.facts.home) {
      // Granted, it is as committed as it can be; before that, only its own commit parks it.
      return state.phase === 'resumed'
        ? answer(state, { type: 'committed' })
        : decline(state, 'not-parked', 'a parked image is committed by its claim at the home server');
    }
    if (state.phase === 'migrating') {
      return decline(state, 'uncommitted', 'the park was not committed: this server was not told to hold it');
    }
  }
  switch (state.phase) {
    case 'migrating':
    case 'parked':
      return go(
        to(state, { phase: 'committed', epoch: 0 }),
        { type: 'stop-timer', timer: state.phase === 'migrating' ? 'lease' : 'ttl' },
        { type: 'answer', answer: { type: 'committed' } },
      );
    default:
      return answer(state, { type: 'committed' });
  }
}

function onHold(state: ClaimsState): ClaimsStep {
  if (state.facts.kind !== 'park' || state.facts.home) {
    return decline(state, 'not-parked', 'only a server that is not the home server holds a park');
  }
  if (state.phase !== 'migrating') return answer(state, { type: 'held' });
  const step = rest(state, { phase: 'parked', epoch: 0 });
  return {
    state: step.state,
    actions: [...step.actions, { type: 'answer', answer: { type: 'held' } }],
  };
}

function onClaim(state: ClaimsState, claim: Extract<ClaimsRequest, { type: 'claim' }>): ClaimsStep {
  if (!state.facts.home) return decline(state, 'not-home', 'claims are granted by the home server alone');
  switch (state.phase) {
    case 'migrating':
    case 'parking':
      return decline(state, 'uncommitted', "the guest is still its source's");
    case 'claimed':
      if (state.claimant !== claim.claimant) {
        return decline(state, 'claimed', `somebody else has the claim (epoch ${state.epoch})`);
      }
      // Its answer was lost: the same one again.
      return go(
        { ...state, held: true },
        { type: 'stop-timer', timer: 'claim' },
        { type: 'answer', answer: { type: 'claimed', epoch: state.epoch } },
      );
    case 'committed':
    case 'resumed': {
      const owner = ownerOf(state);
      if (claim.rollback === owner) break;
      const whose = owner === 0 ? 'runs at its destination' : `was granted to somebody (epoch ${owner})`;
      return decline(state, 'resumed', `the guest ${whose}; only a rollback of that takes it back`);
    }
    case 'parked':
      break;
    case 'dissolved':
      return stay(state);
  }
  if (!claim.whole) {
    return decline(state, 'incomplete', 'pages or state of the guest are not at the servers');
  }
  const epoch = state.epoch + 1;
  const { facts: _facts, open: _open, ...from } = state;
  const actions: ClaimsAction[] = state.phase === 'parked' ? [{ type: 'stop-timer', timer: 'ttl' }] : [];
  return go(to(state, { phase: 'claimed', epoch, claimant: claim.claimant, held: true, from }), ...actions, {
    type: 'answer',
    answer: { type: 'claimed', epoch },
  });
}

function onGrant(state: ClaimsState, asked: { claimant: string; epoch: number }): ClaimsStep {
  if (state.phase === 'claimed' && isClaim(state, asked)) {
    const { epoch, claimant } = state;
    return go(
      to(state, { phase: 'resumed', epoch, granted: epoch, claimant }),
      { type: 'stop-timer', timer: 'claim' },
      { type: 'answer', answer: { type: 'granted' } },
    );
  }
  if (state.phase === 'resumed' && state.granted === state.epoch && isClaim(state, asked)) {
    return answer(state, { type: 'granted' });
  }
  return decline(
    state,
    'stale',
    `the claim with epoch ${asked.epoch} is over; the newest is ${epochOf(state)}`,
  );
}

function onRelease(state: ClaimsState, asked: { claimant: string; epoch: number }): ClaimsStep {
  if (state.phase === 'claimed' && isClaim(state, asked)) {
    const back = giveBack(state);
    return {
      state: back.state,
      actions: [
        { type: 'stop-timer', timer: 'claim' },
        ...back.actions,
        { type: 'answer', answer: { type: 'released' } },
      ],
    };
  }
  if (state.phase === 'resumed' && isClaim(state, asked)) {
    return decline(state, 'resumed', 'the claim was granted: the guest is not given back');
  }
  return answer(state, { type: 'released' });
}

/** By whoever needs the pages no more: the migration's ends, a park's owner, or the claimant that resumed. */
function onDissolve(state: ClaimsState, epoch: number): ClaimsStep {
  switch (state.phase) {
    case 'parking':
      return decline(state, 'parking', "the park's commit is under way: cancel it first");
    case 'claimed':
      return decline(state, 'claimed', `somebody has the claim (epoch ${state.epoch})`);
    case 'resumed':
      if (epoch !== state.granted || epoch !== state.epoch) {
        return decline(state, 'stale', `it is the claim with epoch ${state.epoch} that may dissolve it`);
      }
      break;
    case 'parked':
      if (epoch !== 0 && state.facts.home) {
        return decline(state, 'stale', `the claim with epoch ${epoch} is over`);
      }
      break;
    case 'committed':
      if (state.facts.home && epoch !== state.epoch) {
        return decline(state, 'stale', `the image was claimed since (epoch ${state.epoch})`);
      }
      break;
    default:
      break;
  }
  return dissolve(state, 'dissolve', { type: 'dissolved' });
}

/** An ungranted claim is over; its epoch is used up. */
function giveBack(state: Extract<ClaimsState, { phase: 'claimed' }>): ClaimsStep {
  return rest(state, { ...state.from, epoch: state.epoch });
}

function rest(state: ClaimsState, resting: Resting): ClaimsStep {
  const actions: ClaimsAction[] = state.phase === 'migrating' ? [{ type: 'stop-timer', timer: 'lease' }] : [];
  if (resting.phase === 'parked' && state.facts.mortal && !state.open) {
    actions.push({ type: 'start-timer', timer: 'ttl' });
  }
  return go(to(state, resting), ...actions);
}

const timers: readonly ClaimsTimer[] = ['lease', 'claim', 'ttl'];

function dissolve(state: ClaimsState, cause: DissolveCause, said?: ClaimsAnswer): ClaimsStep {
  return go(
    to(state, { phase: 'dissolved', cause }),
    ...timers.map((timer): ClaimsAction => ({ type: 'stop-timer', timer })),
    { type: 'drop', cause },
    ...(said ? [{ type: 'answer', answer: said } as const] : []),
  );
}

function isClaim(
  state: { claimant: string; epoch: number },
  asked: { claimant: string; epoch: number },
): boolean {
  return state.claimant === asked.claimant && state.epoch === asked.epoch;
}

function parksHere({ facts }: ClaimsState): boolean {
  return facts.kind === 'park' && facts.home;
}

function isRequest(event: ClaimsEvent): event is ClaimsRequest {
  return ['commit', 'hold', 'claim', 'grant', 'release', 'dissolve', 'drop'].includes(event.type);
}

function to(state: ClaimsState, phase: ClaimsPhase): ClaimsState {
  return { facts: state.facts, open: state.open, ...phase };
}

function answer(state: ClaimsState, said: ClaimsAnswer): ClaimsStep {
  return go(state, { type: 'answer', answer: said });
}

function decline(state: ClaimsState, reason: RefusalReason, message: string): ClaimsStep {
  return answer(state, { type: 'declined', reason, message });
}

function stay(state: ClaimsState): ClaimsStep {
  return { state, actions: [] };
}

function go(state: ClaimsState, ...actions: ClaimsAction[]): ClaimsStep {
  return { state, actions };
}
