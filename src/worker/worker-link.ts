/**
 * One worker of a guest, as the main thread sees it: its start, its requests and its pauses. Requests that the
 * worker has not begun when it pauses come back and wait here. Every wait ends with the worker at the latest.
 */
import { MessageChannel, type MessagePort, Worker } from 'node:worker_threads';

import { GuestMovedError, memferryError } from '../errors.js';
import { fromWorker, guestMoved, guestRequestFailed, notStarted } from './errors.js';
import {
  type BootData,
  type FromWorker,
  NOT_ARRIVED,
  type PlainError,
  type ToWorker,
  Word,
  type WorkerShape,
} from './messages.js';

export interface Paused {
  /** The worker's last instruction, by the clock of `process.hrtime`. */
  sinceNs: bigint;
  state: Uint8Array;
  /** Of the regions, in the order of `shape.regions`. */
  lengths: number[];
}

interface Pending<T> {
  resolve: (value: T) => void;
  reject: (error: unknown) => void;
}

interface Request extends Pending<unknown> {
  value: unknown;
}

export interface LinkEvents {
  message(value: unknown): void;
  shape(): void;
  /** A request failed in WebAssembly itself: what a poisoned page does. Gives the error when it is fatal. */
  trapped(error: PlainError): Error | null;
  /** The worker ended without being told to. */
  ended(error: Error): void;
}

/** For a worker that is to end while it loads its modules. */
const loadingMs = 2000;

export type LinkBoot = Omit<BootData, 'port' | 'control'>;

export class WorkerLink {
  shape: WorkerShape = {
    regions: [],
    instances: [],
    unmovable: [],
    build: { functions: 0, references: '', layout: [], grown: [] },
    hostFunctions: [],
  };
  readonly #worker: Worker;
  readonly #port: MessagePort;
  readonly #control = new Int32Array(new SharedArrayBuffer(4 * Word.length));
  readonly #events: LinkEvents;
  readonly #name: string;
  /** The guest's module, where the guest begins with it; null for one that arrives. */
  readonly #firstLifeOf: string | null;
  /** Posted to the worker and not answered yet, in order. */
  readonly #inFlight = new Map<number, Request>();
  /** Not posted yet: the guest stands still. */
  #waiting: [number, Request][] = [];
  readonly #checks = new Map<number, Pending<void>>();
  #lastId = 0;
  #attempt = 0;
  #holding = false;
  #pausing: (Pending<Paused> & { attempt: number }) | null = null;
  #grown: Pending<number> | null = null;
  #stage: Pending<void> | null = null;
  #end: Error | null = null;
  #stopping: Promise<unknown> | null = null;
  readonly #exited: Promise<void>;

  private constructor(boot: LinkBoot, events: LinkEvents, resourceLimits: Worker['resourceLimits']) {
    this.#events = events;
    this.#name = boot.name;
    this.#firstLifeOf = boot.plan ? null : boot.url;
    if (boot.plan) {
      this.#control[Word.pause] = NOT_ARRIVED;
      this.#holding = true;
    }
    const { port1, port2 } = new MessageChannel();
    this.#port = port1;
    try {
      this.#worker = new Worker(new URL('./bootstrap.js', import.meta.url), {
        name: boot.name.slice(0, 15),
        workerData: {
          memferry: {
            ...boot,
            port: port2,
            control: this.#control,
          } satisfies BootData,
        },
        transferList: [port2],
        ...(resourceLimits ? { resourceLimits } : {}),
      });
    } catch (cause) {
      port1.close();
      throw uncloneable("the guest's data", cause);
    }
    this.#port.on('message', (message: FromWorker) => this.#receive(message));
    this.#worker.on('error', (error) => this.#ended(error));
    this.#worker.on('exit', (code) => this.#ended(new Error(`its worker ended with exit code ${code}`)));
    this.#exited = new Promise((resolve) => this.#worker.once('exit', () => resolve()));
  }

  /** Resolves when the guest's module is loaded and the program built. */
  static async start(
    boot: LinkBoot,
    events: LinkEvents,
    resourceLimits?: Worker['resourceLimits'],
    signal?: AbortSignal,
  ): Promise<WorkerLink> {
    const link = new WorkerLink(boot, events, resourceLimits);
    const stop = () => void link.stop(new Error('the start was cancelled'));
    signal?.addEventListener('abort', stop, { once: true });
    if (signal?.aborted) stop();
    try {
      await new Promise<void>((resolve, reject) => {
        link.#stage = { resolve, reject };
      });
      return link;
    } catch (error) {
      await link.stop(error as Error);
      throw error;
    } finally {
      signal?.removeEventListener('abort', stop);
    }
  }

  request(value: unknown): Promise<unknown> {
    return new Promise((resolve, reject) => {
      if (this.#end) {
        reject(this.#end);
        return;
      }
      const id = ++this.#lastId;
      const request = { value, resolve, reject };
      if (this.#holding) this.#waiting.push([id, request]);
      else this.#begin(id, request);
    });
  }

  get pendingRequests(): number {
    return this.#inFlight.size + this.#waiting.length;
  }

  /** At the next safepoint: rejects with what could not move if the guest paused there. */
  check(): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.#end) {
        reject(this.#end);
        return;
      }
      const id = ++this.#lastId;
      this.#checks.set(id, { resolve, reject });
      this.#post({ type: 'check', id });
    });
  }

  /**
   * Asks for a safepoint. Rejects and leaves the worker running when it refuses, or when `cancelled` rejects
   * first; then the worker is never left standing still.
   */
  async pause(cancelled: Promise<never>): Promise<Paused> {
    if (this.#end) throw this.#end;
    const attempt = ++this.#attempt;
    this.#holding = true;
    const paused = new Promise<Paused>((resolve, reject) => {
      this.#pausing = { attempt, resolve, reject };
    });
    Atomics.store(this.#control, Word.pause, attempt);
    this.#post({ type: 'pause', attempt });
    try {
      return await Promise.race([paused, cancelled]);
    } catch (error) {
      paused.catch(() => undefined);
      // Too late to cancel when the worker stands still already: its message is on the way.
      const standing = Atomics.compareExchange(this.#control, Word.pause, attempt, 0) === -attempt;
      if (standing && !this.#end) await paused.catch(() => undefined);
      this.unpause();
      throw error;
    } finally {
      this.#pausing = null;
    }
  }

  /** Lets the guest run, and posts what waited. Cannot fail. */
  unpause(): void {
    Atomics.store(this.#control, Word.pause, 0);
    Atomics.notify(this.#control, Word.pause);
    this.#holding = false;
    for (const [id, request] of this.#waiting.splice(0)) this.#begin(id, request);
  }

  /** The guest runs elsewhere: what it has not begun here is handed back to the askers. */
  departed(): void {
    this.#end ??= guestMoved(this.#name);
    for (const [, request] of this.#waiting.splice(0)) request.reject(this.#end);
  }

  /** For a worker whose guest has not arrived. Gives the memory's new length. */
  grow(kind: 'memory' | 'heap', index: number, lengthBytes: number): Promise<number> {
    return this.#arriving((pending) => {
      this.#grown = pending;
      return { type: 'grow', kind, index, lengthBytes };
    });
  }

  prepare(state: Uint8Array): Promise<void> {
    return this.#arriving((pending) => {
      this.#stage = pending;
      return { type: 'prepare', state };
    });
  }

  /** Ends the worker; everything pending rejects with `reason`. Twice is fine. */
  stop(reason: Error): Promise<unknown> {
    this.#ended(reason, false);
    this.#stopping ??= this.#loaded().then(() => this.#worker.terminate());
    return this.#stopping;
  }

  /**
   * Node leaves the files open that a worker is loading when it is terminated, for as long as the process lives. One that
   * does not get there has its time.
   */
  async #loaded(): Promise<void> {
    const { async, value } = Atomics.waitAsync(this.#control, Word.loaded, 0, loadingMs);
    if (async) await Promise.race([value, this.#exited]);
  }

  #arriving<T>(message: (pending: Pending<T>) => ToWorker): Promise<T> {
    return new Promise<T>((resolve, reject) => {
      if (this.#end) {
        reject(this.#end);
        return;
      }
      this.#post(message({ resolve, reject }));
      Atomics.add(this.#control, Word.wake, 1);
      Atomics.notify(this.#control, Word.wake);
    });
  }

  #post(message: ToWorker): void {
    this.#port.postMessage(message);
  }

  #begin(id: number, request: Request): void {
    try {
      this.#post({ type: 'request', id, value: request.value });
      this.#inFlight.set(id, request);
    } catch (cause) {
      request.reject(uncloneable('a request', cause));
    }
  }

  #receive(message: FromWorker): void {
    switch (message.type) {
      case 'ready':
      case 'shape':
        this.shape = message.shape;
        if (message.type === 'ready') this.#settleStage();
        else this.#events.shape();
        return;
      case 'prepared':
        this.#settleStage();
        return;
      case 'failed':
        this.#ended(this.#startFailed(message.error), false);
        return;
      case 'reply':
        this.#take(message.id)?.resolve(message.value);
        return;
      case 'threw':
        this.#threw(message.id, message.error);
        return;
      case 'checked': {
        const check = this.#checks.get(message.id);
        this.#checks.delete(message.id);
        if (message.error) check?.reject(fromWorker(message.error, 'PAUSE_FAILED'));
        else check?.resolve();
        return;
      }
      case 'paused':
        // In front of what came later, in the order in which they were asked.
        this.#waiting.unshift(
          ...message.returned.flatMap((id): [number, Request][] => {
            const request = this.#take(id);
            return request ? [[id, request]] : [];
          }),
        );
        if (this.#pausing?.attempt === message.attempt) this.#pausing.resolve(message);
        return;
      case 'refused':
        if (this.#pausing?.attempt === message.attempt) {
          this.#pausing.reject(fromWorker(message.error, 'PAUSE_FAILED'));
        }
        return;
      case 'grown':
        this.#grown?.resolve(message.lengthBytes);
        this.#grown = null;
        return;
      case 'message':
        this.#events.message(message.value);
    }
  }

  /** At the destination the module is on the host's own list, and the source hears of it: nothing of a path. */
  #startFailed(error: PlainError): Error {
    return this.#firstLifeOf === null
      ? fromWorker(error, 'PREPARE_FAILED')
      : notStarted(error, this.#firstLifeOf);
  }

  #settleStage(): void {
    this.#stage?.resolve();
    this.#stage = null;
  }

  #take(id: number): Request | undefined {
    const request = this.#inFlight.get(id);
    this.#inFlight.delete(id);
    return request;
  }

  #threw(id: number, error: PlainError): void {
    const fatal = error.name === 'RuntimeError' ? this.#events.trapped(error) : null;
    const request = this.#take(id);
    request?.reject(fatal ?? guestRequestFailed(error));
  }

  /** Settles everything that waits, once; nobody may hang on a worker that is gone. */
  #ended(cause: Error, unexpected = true): void {
    const first = this.#end === null || this.#end instanceof GuestMovedError;
    const error =
      unexpected && first && !this.#stopping
        ? memferryError('GUEST_LOST', `guest "${this.#name}" ended: ${cause.message}`, { cause, facts: {} })
        : cause;
    this.#end ??= error;
    const pending: Pending<never>[] = [...this.#inFlight.values(), ...this.#checks.values()];
    pending.push(...this.#waiting.map(([, request]) => request));
    for (const one of [this.#pausing, this.#grown, this.#stage]) if (one) pending.push(one as Pending<never>);
    this.#inFlight.clear();
    this.#checks.clear();
    this.#waiting = [];
    this.#grown = null;
    this.#stage = null;
    for (const { reject } of pending) reject(this.#end);
    this.#port.close();
    if (unexpected && first && !this.#stopping) this.#events.ended(error);
  }
}

/** Other errors pass unchanged. */
function uncloneable(what: string, cause: unknown): unknown {
  if (Object(cause).name !== 'DataCloneError') return cause;
  return memferryError(
    'INVALID_ARGUMENT',
    `${what} goes to the worker as a structured clone, and this cannot: ${(cause as Error).message}`,
    { cause },
  );
}
