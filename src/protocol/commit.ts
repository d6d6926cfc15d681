/**
 * The commit protocol's words, shared by its two pure state machines: commit-source.ts and
 * commit-destination.ts. No I/O, no clock, no thread: `(state, event) -> { state, actions }`.
 *
 *     source                            destination
 *     running                           receiving
 *       | switch: pause the guest
 *     pausing -> transferring
 *       | transferred
 *     preparing ------- PREPARE ------>  preparing      (everything that can fail)
 *       |        <------ READY --------  ready          (nothing that can fail is left)
 *     granted  -------- GRANT ------->  resumed         (sending GRANT is the commit)
 *     departed <------- RESUMED ------
 *
 * Whoever drives a machine keeps three rules, and everything the explorer proves rests on them:
 *
 *  1. Store the new state first, then carry out the actions in order. So `granted` is recorded before GRANT
 *     can leave, and `abandoned` before REFUSED does.
 *  2. Every event goes in, whatever the state: a machine ignores what does not concern it.
 *  3. One machine is one migration id. The destination keeps it (or its outcome, see commit-tombstones.ts)
 *     after the end, because a late GRANT must be answered by what was decided, never decided again.
 *
 * Epochs number the source's control connections: 0 is the first, every redial takes the next one. A message
 * carries the epoch that it was sent for; an answer repeats the question's.
 */

/** Why a migration ended: `code` is an error code of the package. */
export interface Cause {
  readonly code: string;
  readonly message: string;
}

/** Source to destination. PREPARE travels with the execution state; QUERY opens every redialled connection. */
export type SourceMessage =
  | { readonly type: 'prepare'; readonly epoch: number }
  | { readonly type: 'grant'; readonly epoch: number }
  | { readonly type: 'query'; readonly epoch: number }
  | { readonly type: 'cancel'; readonly epoch: number; readonly code: string; readonly message: string };

/**
 * Destination to source. REFUSED is a promise for good: this destination has not run the guest and never will.
 * UNKNOWN-MIGRATION is no promise at all: a destination that was restarted may have run it before.
 */
export type DestinationMessage =
  | { readonly type: 'ready'; readonly epoch: number }
  | { readonly type: 'resumed'; readonly epoch: number }
  | { readonly type: 'refused'; readonly epoch: number; readonly code: string; readonly message: string }
  | { readonly type: 'unknown-migration'; readonly epoch: number };

export interface Step<State, Action> {
  readonly state: State;
  readonly actions: readonly Action[];
}

/** What a peer is told of a cause: the schemas bound both texts, and no local error may break that bound. */
export function toldCause(cause: Cause): Cause {
  return { code: cause.code.slice(0, 64) || 'SYSTEM', message: cause.message.slice(0, 4096) };
}
