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

import { fileName } from './host-handles.js';
import { REST_KEY, type RestAnswer, type RestChannel, type RestQuestion, RestWord } from './thread-rest.js';

const PRELOAD = new URL('./thread-preload.js', import.meta.url).href;
/** Threads that have answered a moment ago answer again within microseconds; the guest is blocked meanwhile. */
const HOLD_MS = 1000;
/** Every question gets as long at least, so that one asked at the end tells what stands in the way. */
const FAIR_MS = 100;
const POLL_MS = 2;
/** What a thread sent before its answer has been dealt with after so many turns of the event loop. */
const TURNS = 2;

export class ProgramThreads {
  readonly #threads = new Map<threads.Worker, { id: number; name: string }>();
  readonly #words = new Int32Array(new SharedArrayBuffer(4 * RestWord.length));
  readonly #channel: BroadcastChannel;
  /** By question, then by thread: what it has open. Questions that are still waited for. */
  readonly #answers = new Map<number, Map<number, string[]>>();
  #lastQuestion = 0;
  /** Goes up with every thread that is started, and with every message to one. */
  #given = 0;

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
    const given = (): void => void this.#given++;
    Worker.prototype.postMessage = function (...args: Parameters<typeof postMessage>): void {
      given();
      Reflect.apply(postMessage, this, args);
    };
    threads.Worker = new Proxy(Worker, {
      construct: (target, args: unknown[], newTarget): object => {
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
        given();
        const label = options?.name ? `${options.name}, ${fileName(file)}` : fileName(file);
        this.#threads.set(worker, { id: worker.threadId, name: label });
        worker.once('exit', () => this.#threads.delete(worker));
        return worker;
      },
    });
    syncBuiltinESMExports();
  }

  /** All of them, resting or not. */
  names(): string[] {
    return [...this.#threads.values()].map(({ name }) => `a thread of its own (${name})`);
  }

  /**
   * Waits until every thread has come to rest: has ended, or is back in its event loop where it `mayRest`. Gives those
   * that have not after `limitMs`. What they sent before has been dealt with then.
   */
  async settle(mayRest: boolean, limitMs: number): Promise<string[]> {
    const end = performance.now() + limitMs;
    for (;;) {
      const given = this.#given;
      const names = mayRest ? await this.#ask(Math.max(end, performance.now() + FAIR_MS)) : this.names();
      if (names.length === 0 && given === this.#given) return [];
      if (performance.now() >= end) return names.length > 0 ? names : this.names();
      await later(POLL_MS);
    }
  }

  /**
   * All threads stand still, or those are named that do not. Blocks, so that nobody gives them anything to do
   * meanwhile. To be called when they have just settled.
   */
  hold(): string[] {
    if (this.#threads.size === 0) return [];
    const question = this.#begin();
    Atomics.store(this.#words, RestWord.held, question);
    this.#post({ question, hold: true });
    const end = performance.now() + HOLD_MS;
    for (;;) {
      const seen = Atomics.load(this.#words, RestWord.answers);
      const left = end - performance.now();
      // The event loop, which would bring the answers, stands still here.
      for (let next = this.#received(); next; next = this.#received()) this.#take(next.message);
      if (this.#answered(question) || left <= 0) break;
      Atomics.wait(this.#words, RestWord.answers, seen, left);
    }
    const names = this.#obstacles(question);
    if (names.length > 0) this.release();
    return names;
  }

  /** They run again. */
  release(): void {
    Atomics.store(this.#words, RestWord.held, 0);
    Atomics.notify(this.#words, RestWord.held);
  }

  /** Asks where they are, without holding them. */
  async #ask(end: number): Promise<string[]> {
    if (this.#threads.size === 0) return [];
    const question = this.#begin();
    this.#post({ question, hold: false });
    while (!this.#answered(question) && performance.now() < end) await later(POLL_MS);
    const names = this.#obstacles(question);
    for (let turn = 0; turn < TURNS; turn++) await new Promise(setImmediate);
    return names;
  }

  #begin(): number {
    const question = ++this.#lastQuestion;
    this.#answers.set(question, new Map());
    return question;
  }

  #post(question: RestQuestion): void {
    this.#channel.postMessage(question);
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
