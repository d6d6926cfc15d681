/**
 * What a guest module exports. One file runs at both sides: in its first life `create` builds the program; at
 * the destination `receive` builds it again around empty memory, the pages and globals arrive underneath, and
 * `adopt` gives it back what only JavaScript knew.
 *
 *     export default defineGuest({
 *       create: () => new Counter(),
 *       save: (counter) => ({ count: counter.count }),
 *       adopt: (counter, state) => { counter.count = state.count; },
 *       handle: (counter, request) => counter.apply(request),
 *     });
 */
import type { HostFunctions } from './host-functions.js';

/** What a guest module is given by the worker that runs it. */
export interface GuestContext {
  /** The guest's name, the same at every host. */
  readonly name: string;
  /** Which of its workers this one is, from 0. */
  readonly worker: number;
  /** How many there are. */
  readonly workers: number;
  /** True at the destination: what `receive` writes to memory is discarded before the first page comes. */
  readonly arriving: boolean;
  /** What the host that started the guest gave it, as JSON. It moves with the guest. */
  readonly data: unknown;
  /**
   * Host functions and objects that WebAssembly may keep in tables and globals are known by name: register them while
   * the guest is built, at every host. What building puts into a table by itself needs no name.
   */
  readonly hostFunctions: HostFunctions;
  /** The shared WebAssembly.Memory that all workers of the guest import; null without `sharedMemory`. */
  readonly sharedMemory: unknown;
  /** Memory that all workers of the guest share; empty without `sharedHeapBytes`. */
  readonly sharedHeap: readonly Uint8Array[];
  /**
   * Memory of this worker's own that moves page by page, for guests without WebAssembly: page-aligned, zeros
   * at first. Call it in the same order with the same lengths in `create` and `receive`.
   */
  heap(lengthBytes: number): readonly Uint8Array[];
  /** To the host: a `message` event of the WorkerGuest. */
  send(value: unknown): void;
}

/**
 * What a guest module exports. `App` is what `create` builds; it is given to everything else. `State` is what
 * JavaScript alone knows and `save` gives; `Request` and `Reply` are what `handle` takes and gives. All but `App`
 * cross by structured clone.
 */
export interface GuestDefinition<App, State = unknown, Request = unknown, Reply = unknown> {
  /** The first life: builds the program, opens its database, loads its WebAssembly. */
  create(context: GuestContext): App | Promise<App>;
  /**
   * The destination, before the first page: makes the same WebAssembly instances in the same order, and the
   * JavaScript objects around them. Default: `create`.
   */
  receive?(context: GuestContext): App | Promise<App>;
  /** At the safepoint: what JavaScript alone knows, structured-clonable. Throwing refuses to pause. */
  save?(app: App): State;
  /** What is open that cannot move (statements, files), by name. Any name refuses to pause, with GUEST_BUSY. */
  busy?(app: App): readonly string[];
  /**
   * What JavaScript knows of the guest once it is built, and must know alike at every host: addresses that objects
   * keep, versions. Where it differs the destination declines before the first page. At most 64 short strings.
   */
  layout?(app: App): readonly string[];
  /**
   * True: `save` and `adopt` carry all objects with finalizers (wasm-bindgen's classes, proxies) that JavaScript made
   * after the guest was built. Otherwise such an object refuses to pause, with GUEST_UNMOVABLE.
   */
  carriesWrappers?: boolean;
  /**
   * True: a thread that the program has started itself (Emscripten's pthreads) keeps nothing of its own once it is back
   * in its event loop, in JavaScript as in WebAssembly: whatever counts lies in the shared memory. Such threads stand
   * still with the guest, from the safepoint (`busy` and `save` too) until it runs again; those of the destination are the ones that `receive`
   * has started, and that are started later. One that runs refuses to pause, with GUEST_BUSY. Otherwise any thread does.
   */
  statelessThreads?: boolean;
  /**
   * The destination: memory, globals and tables are the source's. Takes the JavaScript state back. Threads of the program
   * stand still meanwhile: to start one, or to send one a message, throws, and the destination declines. It is awaited, and
   * may give another `App` in the place of `app`.
   */
  // biome-ignore lint/suspicious/noConfusingVoidType: one that gives nothing may be written as such
  adopt?(app: App, state: State, context: GuestContext): App | void | Promise<App | void>;
  /** One request at a time; between two of them lies the safepoint. */
  handle(app: App, request: Request, context: GuestContext): Reply | Promise<Reply>;
  /**
   * The destination, before `adopt`: a memory grew outside the guest's code, so views of it are detached.
   * Emscripten's glue is known and renewed by itself.
   */
  memoryGrown?(app: App): void;
}

/** Gives the definition back, typed. */
export function defineGuest<App, State = unknown, Request = unknown, Reply = unknown>(
  definition: GuestDefinition<App, State, Request, Reply>,
): GuestDefinition<App, State, Request, Reply> {
  return definition;
}
