/**
 * Runs in every thread that a guest's program starts, before the program's own code: answers whether the thread is at
 * rest, and stands still on demand. See program-threads.ts.
 */
import { BroadcastChannel, getEnvironmentData, parentPort, threadId } from 'node:worker_threads';

import { interceptHostHandles } from './host-handles.js';
import { ProgramThreads } from './program-threads.js';
import { afterTurns, OpenResources } from './safepoint.js';
import {
  interceptPosts,
  postUncounted,
  REST_KEY,
  type RestAnswer,
  type RestChannel,
  type RestQuestion,
  RestWord,
} from './thread-rest.js';
import { hideOurExports } from './wasm-exports.js';

/** What came before the question, in whatever way, is handled within so many turns of the event loop. */
const TURNS = 2;

const { name, words } = getEnvironmentData(REST_KEY) as RestChannel;
hideOurExports();
const handles = interceptHostHandles();
const threads = new ProgramThreads();
threads.intercept();
interceptPosts(words);
// The one port that a thread listens to as long as it lives.
const resources = new OpenResources(new Map([['MessagePort', 1]]));

const channel = new BroadcastChannel(name);
channel.onmessage = (event: unknown) => {
  const { question, hold } = (event as { data: Partial<RestQuestion> }).data;
  if (question !== undefined) afterTurns(TURNS, () => answer(question, hold === true));
};
channel.unref();

function answer(question: number, hold: boolean): void {
  const held = (): boolean => Atomics.load(words, RestWord.held) === question;
  if (hold && !held()) return;
  const open = openNow();
  postUncounted(channel, { answers: question, thread: threadId, open } satisfies RestAnswer);
  Atomics.add(words, RestWord.answers, 1);
  Atomics.notify(words, RestWord.answers);
  if (hold && open.length === 0) while (held()) Atomics.wait(words, RestWord.held, question);
}

function openNow(): string[] {
  // Its program is still loading: what it was given to do lies in the port.
  if ((parentPort?.listenerCount('message') ?? 0) === 0) return ['its first messages'];
  return [...resources.names(), ...handles.names(), ...threads.names()];
}
