/** What a worker would refuse a pause for, asked while it runs: bounded, and patient with what is just closing. */
import { setTimeout as sleep } from 'node:timers/promises';

import { memferryError } from '../errors.js';
import type { WorkerLink } from './worker-link.js';

/** How long `check` waits for what is open, and for requests in progress; a switchover waits for them afresh. */
const CHECK_MS = 500;
const CHECK_PAUSE_MS = 20;

/**
 * One worker's look. A request in progress may keep its thread for as long as it likes, which is the pause's concern;
 * a thread that has nothing to do and does not answer reaches no safepoint either.
 *
 * It is not waited for until its end: a guest that always has a request in progress would begin each migration later by
 * the pause's whole limit, for a look that comes to nothing. The rounds are what that time is for. What is found in the
 * pause instead costs the rounds, never the guest, which runs on.
 */
export async function checkWorker(link: WorkerLink, limitMs: number, signal?: AbortSignal): Promise<void> {
  const end = performance.now() + CHECK_MS;
  for (;;) {
    const result = await withinBound(link, limitMs, signal);
    if (result === null) return;
    const busy = (result as { code?: unknown }).code === 'GUEST_BUSY';
    if (!busy || performance.now() >= end) throw result;
    await sleep(CHECK_PAUSE_MS);
  }
}

/** Null: nothing stands in the way, or it is not known because of a request in progress. */
async function withinBound(link: WorkerLink, limitMs: number, signal?: AbortSignal): Promise<unknown> {
  const looked = link.check().then(
    () => null,
    (error: unknown) => error ?? null,
  );
  const over = new AbortController();
  const late = (async () => {
    const began = performance.now();
    for (;;) {
      await sleep(CHECK_MS, undefined, { signal: over.signal });
      if (link.pendingRequests > 0 || signal?.aborted) return null;
      if (performance.now() - began < limitMs) continue;
      return memferryError('GUEST_BUSY', 'the guest reaches no safepoint: its thread does not answer', {
        facts: { names: ['a thread that does not answer'], pauseTimeoutMs: limitMs },
      });
    }
  })().catch(() => null);
  try {
    return await Promise.race([looked, late]);
  } finally {
    over.abort();
  }
}
