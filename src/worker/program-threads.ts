/**
 * The threads that a guest's program starts itself (Emscripten's pthreads). One that runs refuses a pause. One that is
 * back in its event loop can stand still with the guest: only a thread that has no frame of WebAssembly or JavaScript
 * on its stack gets to read a question, and from its answer on it is blocked, so nothing of the program runs in it.
 * That it keeps nothing between its tasks, the guest has to say (`statelessThreads`).
 * Installed before the guest's module is loaded; lives in the guest's worker.
 */
import { randomUUID } from 'node:crypto';
import { syncBuiltinESMExports } from 'node:module';
import { performance } from 'node:perf_hooks';
import threads, { BroadcastChannel, receiveMessageOnPort, setEnvironmentData } from 'node:worker_threads';

import { busyError } from './errors.js';
import { fileName } from './host-handles.js';
import { afterTurns } from './safepoint.js';
import {
  interceptPosts,
  postUncounted,
  REST_KEY,
  type RestAnswer,
  type RestChannel,
  type RestQuestion,
  RestWord,
} from './thread-rest.js';

const PRELOAD = new URL('./thread-preload.js', import.meta.url).href;
/**
 * The guest is blocked meanwhile. Threads that have answered a moment ago answer again within microseconds, unless they
 * were given work: then they settle once more.
 */
const HOLD_MS = 50;
/** In so many waits: where the whole process stood still in one, its threads did not run either. */
const HOLD_WAITS = 10;
/** Every question gets as long at least, so that one asked at the end tells what stands in the way. */
const FAIR_MS = 100;
const POLL_MS = 2;
/** A look that comes later than that counts as no more: this thread did not run, nor did those that it asks. */
const LATE_MS = 10;
/** What a thread sent before its answer has been dealt with after so many turns of the event loop. */
const TURNS = 2;
const ON_ITS_WAY = 'a message to or of a thread of its own that is on its way';
export const GIVEN_WHILE_HELD = 'a thread of its own that gets work while the guest stands still';

export class ProgramThreads {
  readonly #threads = new Map<threads.Worker, { id: number; name: string }>();
  readonly #words = new Int32Array(new SharedArrayBuffer(4 * RestWord.length));
  readonly #channel: BroadcastChannel;
  /** By question, then by thread: what it has open. Questions that are still waited for. */
  readonly #answers = new Map<number, Map<number, string[]>>();
  #lastQuestion = 0;
  /** Goes up with every thread that is started, and with every message to one. */
  #given = 0;
  /** What #given was when all stood still; null: they run. */
  #givenBefore: number | null = null;

  constructor() {
    const name = `memferry-${randomUUID()}`;
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = (event: unknown) => this.#take((event as { data: RestAnswer }).data);
    this.#channel.unref();
    setEnvironmentData(REST_KEY, { name, words: this.#words } satisfies RestChannel);
  }

  intercept(): void {
    const { Worker } = threads;
    const { postMessage } = Worker.prototype;
    const given = (): void => {
      this.#given++;
      // A thread that stands still would lose it with the move, and one of a destination may not run yet.
      if (this.#givenBefore !== null) throw busyError([GIVEN_WHILE_HELD]);
    };
    Worker.prototype.postMessage = function (...args: Parameters<typeof postMessage>): void {
      given();
      Reflect.apply(postMessage, this, args);
    };
    threads.Worker = new Proxy(Worker, {
      construct: (target, args: unknown[], newTarget): object => {
        given();
        const [file, options] = args as [string | URL, threads.WorkerOptions | undefined];
        const worker = withPreload(
          Object(options) as threads.WorkerOptions,
          (all) =>
            Reflect.construct(
              target,
              [file, all],
              newTarget === threads.Worker ? target : newTarget,
            ) as threads.Worker,
        );
        const label = options?.name ? `${options.name}, ${fileName(file)}` : fileName(file);
        this.#threads.set(worker, { id: worker.threadId, name: label });
        worker.once('exit', () => this.#threads.delete(worker));
        return worker;
      },
    });
    interceptPosts(this.#words);
    syncBuiltinESMExports();
  }

  /** All of them, resting or not. */
  names(): string[] {
    return [...this.#threads.values()].map(({ name }) => `a thread of its own (${name})`);
  }

  /**
   * Waits until every thread has come to rest: has ended, or is back in its event loop where it `mayRest`. `then` hears
   * of those that have not after `limitMs`. What they sent before has been dealt with then. At once without threads.
   */
  async settle(mayRest: boolean, limitMs: number, then: (names: string[]) => void): Promise<void> {
    if (this.#threads.size === 0) then([]);
    else then((await this.#settle(mayRest, new Patience(limitMs))).names);
  }

  /**
   * Lets them settle, then stops them: while `then` runs, and until their release, all stand still, or it hears of those
   * that do not. What one of them was given and has done behind our back meanwhile makes them settle again.
   * `sinceNs`: the guest has been blocked since, so that nobody gives them anything to do.
   */
  async hold(
    mayRest: boolean,
    limitMs: number,
    then: (names: string[], sinceNs: bigint) => void,
  ): Promise<void> {
    const patience = new Patience(limitMs);
    for (;;) {
      const { names, passed } =
        this.#threads.size === 0
          ? { names: [], passed: this.#passed() }
          : await this.#settle(mayRest, patience);
      const sinceNs = process.hrtime.bigint();
      const moving = names.length > 0 ? names : this.#stop(passed, patience);
      if (moving.length === 0 || patience.look() <= 0) {
        then(moving, sinceNs);
        return;
      }
      await later(POLL_MS);
    }
  }

  /** They run again. */
  release(): void {
    this.#givenBefore = null;
    Atomics.store(this.#words, RestWord.held, 0);
    Atomics.notify(this.#words, RestWord.held);
  }

  /** Something was, or would have been: `given` has thrown. */
  get givenWhileHeld(): boolean {
    return this.#givenBefore !== null && this.#given !== this.#givenBefore;
  }

  /** `passed`: so many messages have passed, and all of them have been dealt with. */
  async #settle(mayRest: boolean, patience: Patience): Promise<{ names: string[]; passed: number }> {
    for (;;) {
      const passed = this.#passed();
      const names = mayRest ? await this.#ask(patience) : this.names();
      const quiet = passed === this.#passed();
      if (names.length === 0 && quiet) return { names, passed };
      if (patience.look() <= 0) return { names: names.length > 0 ? names : [ON_ITS_WAY], passed };
      await later(POLL_MS);
    }
  }

  /** All stand still, or those are named that do not. */
  #stop(passed: number, patience: Patience): string[] {
    const names = this.#threads.size === 0 ? [] : this.#block(patience);
    if (names.length === 0 && passed !== this.#passed()) names.push(ON_ITS_WAY);
    if (names.length > 0) this.release();
    else this.#givenBefore = this.#given;
    return names;
  }

  #block(patience: Patience): string[] {
    const question = this.#begin();
    Atomics.store(this.#words, RestWord.held, question);
    this.#post({ question, hold: true });
    for (let waits = 0; ; ) {
      const seen = Atomics.load(this.#words, RestWord.answers);
      // The event loop, which would bring the answers, stands still here.
      for (let next = this.#received(); next; next = this.#received()) this.#take(next.message);
      if (this.#answered(question) || waits === HOLD_WAITS) break;
      if (Atomics.wait(this.#words, RestWord.answers, seen, HOLD_MS / HOLD_WAITS) === 'timed-out') waits++;
      patience.look();
    }
    return this.#obstacles(question);
  }

  /** Threads started, and messages to them and from them: unchanged where there was none meanwhile. */
  #passed(): number {
    return this.#given + Atomics.load(this.#words, RestWord.sent);
  }

  /** Asks where they are, without holding them. */
  async #ask(patience: Patience): Promise<string[]> {
    if (this.#threads.size === 0) return [];
    const question = this.#begin();
    this.#post({ question, hold: false });
    const fair = new Patience(FAIR_MS);
    while (!this.#answered(question) && Math.max(patience.look(), fair.look()) > 0) await later(POLL_MS);
    const names = this.#obstacles(question);
    await new Promise<void>((resolve) => afterTurns(TURNS, resolve));
    return names;
  }

  #begin(): number {
    const question = ++this.#lastQuestion;
    this.#answers.set(question, new Map());
    return question;
  }

  #post(question: RestQuestion): void {
    postUncounted(this.#channel, question);
  }

  #received(): { message: RestAnswer } | undefined {
    return receiveMessageOnPort(this.#channel as unknown as threads.MessagePort);
  }

  #take({ answers, thread, open }: RestAnswer): void {
    this.#answers.get(answers)?.set(thread, open);
  }

  /** By every thread. */
  #answered(question: number): boolean {
    const answered = this.#answers.get(question);
    return [...this.#threads.values()].every(({ id }) => answered?.has(id));
  }

  /** Ends the question. */
  #obstacles(question: number): string[] {
    const answered = this.#answers.get(question);
    this.#answers.delete(question);
    return [...this.#threads.values()].flatMap(({ id, name }) => {
      const open = answered?.get(id);
      if (open === undefined) return [`a running thread of its own (${name})`];
      return open.map((what) => `${what} of a thread of its own (${name})`);
    });
  }
}

/** So much time for others, as it passes for this thread. */
class Patience {
  #leftMs: number;
  #lookedMs = performance.now();

  constructor(limitMs: number) {
    this.#leftMs = limitMs;
  }

  /** What is left of it. Whoever waits has to look every LATE_MS. */
  look(): number {
    const nowMs = performance.now();
    this.#leftMs -= Math.min(nowMs - this.#lookedMs, LATE_MS);
    this.#lookedMs = nowMs;
    return this.#leftMs;
  }
}

/** Starts a thread that answers. Where that cannot be, as the program has asked: it will count as one that runs. */
function withPreload(
  options: threads.WorkerOptions,
  start: (options: threads.WorkerOptions) => threads.Worker,
): threads.Worker {
  let flags = options.execArgv ?? process.execArgv;
  for (let attempt = 0; attempt < 2; attempt++) {
    try {
      return start({ ...options, execArgv: [...flags, '--import', PRELOAD] });
    } catch (error) {
      const { code, message } = error as NodeJS.ErrnoException;
      if (code !== 'ERR_WORKER_INVALID_EXEC_ARGV') throw error;
      // Flags of V8 and of the process hold for every thread, and must not be given to one.
      flags = flags.filter((flag) => !message.includes(flag));
    }
  }
  return start(options);
}

function later(ms: number): Promise<void> {
  // Keeps nothing alive, and so counts as nothing that is open.
  return new Promise((resolve) => setTimeout(resolve, ms).unref());
}
