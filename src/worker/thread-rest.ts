/**
 * What a guest's worker and the threads that its program starts say to each other, so that they can stand still
 * together: questions and answers over a BroadcastChannel, and two shared words.
 */

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
  length: 2,
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
