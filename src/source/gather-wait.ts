/**
 * Before a destination takes over in `scatter-pre-copy` it has to have every page, and pages that went as references it
 * gathers from servers at its own pace. So after a round of such pages the source waits, while the guest runs, until
 * they are there: otherwise the guest would stand still for it. As long as it asks, the destination knows that the link
 * is the gather's. A few references are no reason to: they are hardly more to gather than there is without, and waiting
 * lengthens the eviction. JavaScript thread.
 */
import { untilAborted } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import type { SourceMessage } from '../protocol/messages.js';

const askEveryMs = 20;
const answerMs = 5_000;
/** Without progress: what is missing is not to be had, since a server has failed, and goes again in the next round. */
const standstillMs = 2_000;

/** References that are fewer than this part of the pages sent are not waited for. */
const leastShare = 1 / 8;

/** Whether so many pages that went as references are waited for, of those that went so far. Pure. */
export function worthWaitingFor(pagesReferred: number, pagesSent: number): boolean {
  return pagesReferred > 0 && pagesReferred >= pagesSent * leastShare;
}

export interface GatherProgress {
  missingPages: number;
  /** Of them so many may be suspect: they go again in the next round. */
  suspectPages: number;
  /** The fewest so far, and how long ago they became that few. */
  leastPages: number;
  sinceProgressMs: number;
}

/** Whether to go on waiting. Pure. */
export function stillGathering(progress: GatherProgress): boolean {
  const { missingPages, suspectPages, leastPages, sinceProgressMs } = progress;
  return missingPages > suspectPages && (missingPages < leastPages || sinceProgressMs < standstillMs);
}

export class GatherWait {
  #answer: Deferred<number> | null = null;
  #asked = 0;

  constructor(
    private readonly send: (message: SourceMessage) => void,
    private readonly signal: AbortSignal,
  ) {}

  /** An answer that comes late is none to the next question. */
  onMissing(pages: number, question: number): void {
    if (question === this.#asked) this.#answer?.resolve(pages);
  }

  /** The connection is gone. */
  fail(error: Error): void {
    this.#answer?.reject(error);
  }

  /** `enough`: somebody does not want to wait any longer. Rejects with CANCELLED, or what fail() was given. */
  async untilGathered(suspectPages: number, enough: () => boolean, boundMs: number): Promise<void> {
    const began = performance.now();
    let leastPages = Number.POSITIVE_INFINITY;
    let progressAt = began;
    while (!enough() && performance.now() - began < boundMs) {
      const missingPages = await this.#ask();
      const now = performance.now();
      const sinceProgressMs = now - progressAt;
      if (!stillGathering({ missingPages, suspectPages, leastPages, sinceProgressMs })) return;
      if (missingPages < leastPages) {
        leastPages = missingPages;
        progressAt = now;
      }
      await new Promise((resolve) => setTimeout(resolve, askEveryMs));
    }
  }

  async #ask(): Promise<number> {
    const answer = deferred<number>();
    this.#answer = answer;
    this.send({ type: 'ask-missing', question: ++this.#asked });
    // One that does not answer has none missing, as far as waiting goes.
    const late = setTimeout(() => answer.resolve(0), answerMs);
    try {
      return await untilAborted(answer.promise, this.signal);
    } finally {
      clearTimeout(late);
      this.#answer = null;
    }
  }
}
