/**
 * What a guest's worker and the threads that its program starts say to each other, so that they can stand still
 * together: questions and answers over a BroadcastChannel, and shared words.
 */
import { BroadcastChannel, MessagePort } from 'node:worker_threads';

/** Under which a thread finds its RestChannel, with `getEnvironmentData`. */
export const REST_KEY = 'memferry:threads';

export interface RestChannel {
  name: string;
  words: Int32Array;
}

export const RestWord = {
  /** The number of the question on which threads stand still; 0: they run. */
  held: 0,
  /** Goes up with every answer. */
  answers: 1,
  /** Goes up with every message that the guest or one of its threads posts, before it goes. */
  sent: 2,
  length: 3,
} as const;

export interface RestQuestion {
  question: number;
  /** To stand still with the answer, until the word says otherwise. */
  hold: boolean;
}

export interface RestAnswer {
  answers: number;
  thread: number;
  /** What the thread has open, by name; then it does not stand still. */
  open: string[];
}

let uncounted = false;

/** Counts what the program posts from this thread, to whomever. */
export function interceptPosts(words: Int32Array): void {
  for (const prototype of [MessagePort.prototype, BroadcastChannel.prototype] as Posting[]) {
    const { postMessage } = prototype;
    prototype.postMessage = function (...args) {
      if (!uncounted) Atomics.add(words, RestWord.sent, 1);
      return Reflect.apply(postMessage, this, args);
    };
  }
}

/** Posts what is not the program's, or goes to none of its threads. */
export function postUncounted(to: Posting, ...args: unknown[]): void {
  uncounted = true;
  try {
    to.postMessage(...args);
  } finally {
    uncounted = false;
  }
}

interface Posting {
  postMessage(...args: unknown[]): void;
}
