/**
 * Whether a migration waits for the destination's base, and compares itself with it, or sends its pages plainly: pure
 * functions of rates that were measured in this migration. A comparison may never lengthen it.
 */

export interface WaitInput {
  /** Since the destination began to lay its base out. */
  elapsedMs: number;
  /** Since its last word. */
  sinceToldMs: number;
  /** How much of that is done, by the destination's last word; 0 while it has said nothing. */
  fraction: number;
  /** What the destination expects to need after that (a log that is applied); null: nobody knows. */
  expectedMs: number | null;
  /** What sending everything takes at the measured rate. */
  plainMs: number;
  /** How long it may still take: what a sample says that the base saves; null: there was none yet. */
  worthMs: number | null;
}

/** A wait that costs less than this part of the migration is not worth a decision. */
const GRACE_PART = 0.02;
const GRACE_LEAST_MS = 50;
/** Of a replay: the guest has to be started as it was, before there is a pace. */
const REPLAY_GRACE_PART = 0.05;
/** Of what may be won, where nothing says how much will be: the other half is what it was waited for. */
const WAIT_PART = 0.5;

/** Asked again with each word of the destination. */
export function decideWait(input: WaitInput): 'wait' | 'give-up' {
  const { elapsedMs, sinceToldMs, fraction, expectedMs, plainMs, worthMs } = input;
  const graceMs = Math.max(GRACE_LEAST_MS, GRACE_PART * plainMs);
  if (elapsedMs < graceMs) return 'wait';
  // Everything would have been sent by now.
  if (elapsedMs > graceMs + plainMs) return 'give-up';
  if (fraction <= 0 || expectedMs === null) return 'give-up';
  const promisedMs = ((elapsedMs - sinceToldMs) * (1 - fraction)) / fraction + expectedMs;
  // It may take twice as long as it said; then its word is worth nothing.
  if (sinceToldMs > 2 * promisedMs + graceMs) return 'give-up';
  // What was waited for already is spent in any case; only what is left is compared with what it may save.
  return promisedMs - sinceToldMs <= (worthMs ?? WAIT_PART * plainMs) ? 'wait' : 'give-up';
}

export interface ReplayInput {
  /** Since all of the base is there, and only the log is applied. */
  elapsedMs: number;
  /** Since the destination's last word. */
  sinceToldMs: number;
  /** What is left of it by its own pace, or as its owner said beforehand; null: neither is known. */
  expectedMs: number | null;
  /** What the rest takes without it, in the better way: everything is sent, or compared with the base as it is. */
  otherwiseMs: number;
  /** The same should the log leave nothing that differs: a comparison of everything. */
  bestMs: number;
}

/** Asked again with each word of the destination. What a replay makes equal is known only when it is over. */
export function decideReplay(input: ReplayInput): 'wait' | 'skip' {
  const { elapsedMs, sinceToldMs, expectedMs, otherwiseMs, bestMs } = input;
  const graceMs = Math.max(GRACE_LEAST_MS, REPLAY_GRACE_PART * otherwiseMs);
  if (elapsedMs < graceMs) return 'wait';
  if (expectedMs === null || sinceToldMs > 2 * expectedMs + graceMs) return 'skip';
  // Whatever it says: what has gone into it is no more than what it could have won.
  if (elapsedMs > graceMs + otherwiseMs - bestMs) return 'skip';
  return expectedMs - sinceToldMs <= WAIT_PART * (otherwiseMs - bestMs) ? 'wait' : 'skip';
}

/** `estimate`: of the base without the log; null where there was none. */
export function replayBounds(
  plainMs: number,
  estimate: CompareDecision | null,
): Pick<ReplayInput, 'otherwiseMs' | 'bestMs'> {
  const otherwiseMs = estimate?.action === 'compare' ? estimate.compareMs : plainMs;
  return { otherwiseMs, bestMs: estimate?.hashMs ?? 0 };
}

/** A base to which a log is to be applied, while it is laid out: worth its time as it is, or with the log. */
export function decideWaitWithReplay(
  input: Omit<WaitInput, 'worthMs'>,
  estimate: CompareDecision | null,
): 'wait' | 'give-up' {
  const asItIs = decideWait({ ...input, expectedMs: 0, worthMs: estimate?.worthMs ?? null });
  if (asItIs === 'wait') return 'wait';
  const { otherwiseMs, bestMs } = replayBounds(input.plainMs, estimate);
  // A log that nobody knows how long it takes has to show that when its time has come.
  const expectedMs = input.expectedMs ?? 0;
  return decideWait({ ...input, expectedMs, worthMs: WAIT_PART * (otherwiseMs - bestMs) });
}

export interface CompareInput {
  /** Everything that would be sent or compared. */
  bytes: number;
  pageSize: number;
  linkBytesPerSecond: number;
  /** The sample: pages that both sides hashed, those of them that are equal, and how long that took in all. */
  sampledPages: number;
  samePages: number;
  sampleMs: number;
}

export interface CompareDecision {
  action: 'compare' | 'plain';
  reason: 'saves' | 'nothing-matches' | 'link-is-faster';
  /** How long the base may still take to be ready, and be worth it all the same. */
  worthMs: number;
  plainMs: number;
  compareMs: number;
  /** The comparison alone, should everything be equal. */
  hashMs: number;
}

/** Of each page that is compared: its hash. */
const HASH_BYTES = 16;
/** The prediction has to be this much better: rates that were measured for some milliseconds are no oracle. */
const WORTH = 0.9;
/** Below this part of equal pages nothing is to be had. */
const LEAST_SAME = 0.01;

export function decideCompare(input: CompareInput): CompareDecision {
  const { bytes, pageSize, linkBytesPerSecond, sampledPages, samePages, sampleMs } = input;
  const plainMs = (bytes * 1000) / linkBytesPerSecond;
  const same = sampledPages > 0 ? samePages / sampledPages : 0;
  // The sample's round trip is counted as if the rest had as many of them: on the safe side.
  const hashingMs =
    sampledPages > 0 ? (sampleMs * bytes) / (sampledPages * pageSize) : Number.POSITIVE_INFINITY;
  const hashMs = hashingMs + ((bytes / pageSize) * HASH_BYTES * 1000) / linkBytesPerSecond;
  const compareMs = hashMs + (1 - same) * plainMs;
  const times = { plainMs, compareMs, hashMs };
  const worthMs = Math.max(0, WORTH * plainMs - compareMs);
  if (same < LEAST_SAME) return { action: 'plain', reason: 'nothing-matches', worthMs: 0, ...times };
  return compareMs <= WORTH * plainMs
    ? { action: 'compare', reason: 'saves', worthMs, ...times }
    : { action: 'plain', reason: 'link-is-faster', worthMs, ...times };
}

/** How many bytes a probe of the link takes: a small part of what is to be sent, and enough to fill its pipe. */
export function probeBytes(bytes: number): number {
  return Math.min(4 * 2 ** 20, Math.max(64 * 2 ** 10, Math.round(bytes / 256)));
}
