/**
 * The guest's side of a worker: takes requests one at a time, stands still at a safepoint when asked, and sets
 * an arriving guest up. Owner and thread: the worker. While it stands still the whole thread is blocked, so
 * that no timer, message or promise of the guest can run.
 */
import { deserialize, serialize } from 'node:v8';
import { receiveMessageOnPort } from 'node:worker_threads';

import { memferryError } from '../errors.js';
import type { GuestContext } from './define-guest.js';
import { busyError } from './errors.js';
import { type AnyDefinition, checkDefinition, layoutOf } from './guest-definition.js';
import type { HostHandles } from './host-handles.js';
import { HostFunctions } from './host-functions.js';
import {
  type BootData,
  type FromWorker,
  plainError,
  type ToWorker,
  Word,
  type WorkerBuild,
  type WorkerShape,
  type WorkerStateEnvelope,
} from './messages.js';
import { GIVEN_WHILE_HELD, type ProgramThreads } from './program-threads.js';
import { afterTurns, OpenResources } from './safepoint.js';
import { postUncounted } from './thread-rest.js';
import type { WasmRegistry } from './wasm-registry.js';
import { captureWasm, restoreWasm, unmovableError, type WasmState } from './wasm-state.js';
import { readTable } from './wasm-tables.js';
import { WorkerMemories } from './worker-memories.js';
import { collectGarbage, type Wrappers } from './wrappers.js';

/** A socket that was closed, a timer that fired, or garbage is gone only after a turn or two of the event loop. */
const CLOSING_TURNS = 3;
/** So often that V8 has compiled by then what it will: a compiler's thread that it wakes takes the CPU for milliseconds. */
const REHEARSALS = 12;
/** How long threads of the program get to come to rest: for a pause, and where they have just been built. */
const REST_MS = 500;
const BUILT_REST_MS = 5000;

export class GuestRuntime {
  readonly #boot: BootData;
  readonly #registry: WasmRegistry;
  readonly #wrappers: Wrappers;
  readonly #handles: HostHandles;
  readonly #threads: ProgramThreads;
  readonly #hostFunctions = new HostFunctions();
  readonly #memories: WorkerMemories;
  readonly #queue: { id: number; value: unknown }[] = [];
  readonly #context: GuestContext;
  #definition!: AnyDefinition;
  #app: unknown;
  #resources!: OpenResources;
  #handling = false;
  #attempt = 0;
  #shapeVersion = -1;
  #build: WorkerBuild = { functions: 0, references: '', layout: [], grown: [] };
  /** Asked for while a request was in progress. */
  readonly #checks: number[] = [];

  constructor(
    boot: BootData,
    registry: WasmRegistry,
    wrappers: Wrappers,
    handles: HostHandles,
    threads: ProgramThreads,
  ) {
    this.#boot = boot;
    this.#registry = registry;
    this.#wrappers = wrappers;
    this.#handles = handles;
    this.#threads = threads;
    this.#memories = new WorkerMemories(registry, boot.plan);
    this.#context = {
      name: boot.name,
      worker: boot.worker,
      workers: boot.workers,
      arriving: boot.plan !== null,
      data: boot.data,
      hostFunctions: this.#hostFunctions,
      sharedHeap: boot.sharedHeap,
      sharedMemory: boot.sharedMemory,
      heap: (lengthBytes) => this.#memories.heap(lengthBytes),
      send: (value) => this.#post({ type: 'message', value }),
    };
  }

  /** Loads the guest and runs it, or waits for it to arrive. Reports `failed` and gives up otherwise. */
  async run(): Promise<void> {
    const { plan } = this.#boot;
    try {
      // The port is the one thing that this runtime itself keeps open.
      this.#boot.port.ref();
      this.#resources = new OpenResources();
      const loaded = (await import(this.#boot.url)) as { default?: unknown };
      this.#definition = checkDefinition(loaded.default, this.#boot.url);
      const build = plan ? (this.#definition.receive ?? this.#definition.create) : this.#definition.create;
      this.#app = await build.call(this.#definition, this.#context);
      this.#sayLoaded();
      this.#memories.adopt();
      this.#built();
      if (plan) {
        this.#rehearse();
        await this.#holdBuiltThreads();
      }
      this.#post({ type: 'ready', shape: this.#shape() });
      if (plan) await this.#arrive();
    } catch (error) {
      this.#sayLoaded();
      this.#post({ type: 'failed', error: plainError(error) });
      return;
    }
    this.#boot.port.on('message', (message: ToWorker) => this.#receive(message));
  }

  /** Nothing of its modules is being read any more; see WorkerLink.stop(). */
  #sayLoaded(): void {
    Atomics.store(this.#boot.control, Word.loaded, 1);
    Atomics.notify(this.#boot.control, Word.loaded);
  }

  /** What stands now, every host has made alike. */
  #built(): void {
    this.#build = {
      functions: this.#registry.trampolines.length,
      references: this.#registry.hostReferences.built(this.#registry),
      layout: layoutOf(this.#definition, this.#app),
      grown: this.#registry.memories.flatMap(({ memory, madeBytes }, number) =>
        memory.buffer.byteLength > madeBytes ? [number] : [],
      ),
    };
    this.#wrappers.built();
    // Read once now, so that a pause has only to look at what was written since.
    for (const record of this.#registry.tables) {
      if (record.type === 'funcref') readTable(this.#registry, record);
    }
  }

  /**
   * Gives the guest that was just built its own state back, so that nothing of that runs for the first time while
   * nobody runs the guest. What cannot move yet changes with what comes.
   */
  #rehearse(): void {
    try {
      for (let round = 0; round < REHEARSALS; round++) {
        const state = deserialize(serialize({ wasm: this.#captureWasm(), app: null })) as WorkerStateEnvelope;
        restoreWasm(this.#registry, state.wasm as WasmState, this.#hostFunctions);
      }
    } catch {
      // The state that comes may well fit.
    }
  }

  #post(message: FromWorker, transfer: ArrayBuffer[] = []): void {
    postUncounted(this.#boot.port, message, transfer);
  }

  #shape(): WorkerShape {
    this.#shapeVersion = this.#version;
    return {
      regions: this.#memories.regions(),
      instances: this.#registry.instances.map((instance) => instance.sha256.slice(0, 16)),
      unmovable: [...this.#registry.unmovable],
      build: this.#build,
      hostFunctions: this.#hostFunctions.registered,
    };
  }

  /** Goes up with everything that the shape tells. */
  get #version(): number {
    return this.#registry.version + this.#hostFunctions.registered.length;
  }

  #receive(message: ToWorker): void {
    if (message.type === 'request') {
      this.#queue.push({ id: message.id, value: message.value });
      this.#next();
    } else if (message.type === 'pause') {
      this.#attempt = message.attempt;
      if (!this.#handling) this.#safepoint();
      this.#next();
    } else if (message.type === 'check') {
      if (this.#handling) this.#checks.push(message.id);
      else this.#check(message.id, CLOSING_TURNS);
    }
  }

  /** Answers with what a pause would refuse now. */
  #check(id: number, turns: number): void {
    if (turns > 0 && this.#mayClose()) {
      afterTurns(1, () => this.#check(id, turns - 1));
      return;
    }
    void this.#threads.settle(...this.#rest, (running) => {
      if (this.#handling) {
        this.#checks.push(id);
        return;
      }
      let error = null;
      try {
        this.#refuseIfBusy(running);
        this.#tellShape();
        // All of it, as a pause does: then nothing of it runs for the first time in the pause.
        this.#capture();
      } catch (thrown) {
        error = plainError(thrown);
      }
      this.#post({ type: 'checked', id, error });
    });
  }

  /** May threads of the program stand still, and how long do they get. */
  get #rest(): [mayRest: boolean, limitMs: number] {
    return this.#definition.statelessThreads ? [true, REST_MS] : [false, 0];
  }

  /** No thread of the program that was just built touches the memory that comes. */
  async #holdBuiltThreads(): Promise<void> {
    const { statelessThreads = false } = this.#definition;
    await this.#threads.hold(statelessThreads, BUILT_REST_MS, (names) => {
      if (names.length > 0) throw busyError(names);
    });
  }

  /** Something is open that another turn of the event loop may close. */
  #mayClose(): boolean {
    if (this.#resources.names().length > 0) return true;
    if (this.#wrappers.names().length === 0 || this.#definition.carriesWrappers) return false;
    collectGarbage();
    return true;
  }

  /** `running`: threads. */
  #refuseIfBusy(running: string[]): void {
    const open = [
      ...running,
      ...this.#resources.names(),
      ...(this.#definition.busy?.(this.#app) ?? []),
      ...this.#handles.names(),
    ];
    if (open.length > 0) throw busyError(open);
    const held = this.#definition.carriesWrappers ? [] : this.#wrappers.names();
    if (held.length > 0) throw unmovableError(held);
  }

  #captureWasm(): WasmState {
    return captureWasm(this.#registry, this.#hostFunctions, this.#build);
  }

  /** Begins the next request, unless one is being handled or a pause is asked for. */
  #next(): void {
    while (!this.#handling && this.#queue.length > 0) {
      if (Atomics.load(this.#boot.control, Word.pause) !== 0) return;
      const request = this.#queue.shift() as { id: number; value: unknown };
      let result: unknown;
      try {
        result = this.#definition.handle(this.#app, request.value, this.#context);
      } catch (error) {
        this.#threw(request.id, error);
        continue;
      }
      if (!isThenable(result)) {
        this.#reply(request.id, result);
        continue;
      }
      this.#handling = true;
      Promise.resolve(result)
        .then(
          (value) => this.#reply(request.id, value),
          (error: unknown) => this.#threw(request.id, error),
        )
        .finally(() => {
          this.#handling = false;
          for (const id of this.#checks.splice(0)) this.#check(id, CLOSING_TURNS);
          if (this.#attempt !== 0) this.#safepoint();
          this.#next();
        });
    }
  }

  #reply(id: number, value: unknown): void {
    this.#tellShape();
    try {
      this.#post({ type: 'reply', id, value });
    } catch (error) {
      // A reply that cannot be cloned is the guest's mistake, and must not leave the asker waiting.
      this.#post({ type: 'threw', id, error: plainError(error) });
    }
  }

  #threw(id: number, error: unknown): void {
    this.#tellShape();
    this.#post({ type: 'threw', id, error: plainError(error) });
  }

  /** New memories and instances are told before the reply of the request that made them. */
  #tellShape(): void {
    const known = this.#memories.adopted;
    try {
      this.#memories.adopt();
    } catch (error) {
      this.#registry.unmovable.push(`a memory: ${plainError(error).message}`);
    }
    if (known === this.#memories.adopted && this.#shapeVersion === this.#version) return;
    this.#post({ type: 'shape', shape: this.#shape() });
  }

  /** No request, and so no WebAssembly frame, is in progress, and none begins while the pause is asked for. */
  #safepoint(): void {
    const attempt = this.#attempt;
    this.#attempt = 0;
    this.#standStill(attempt, CLOSING_TURNS);
  }

  #standStill(attempt: number, turns: number): void {
    const { control } = this.#boot;
    if (Atomics.load(control, Word.pause) !== attempt) {
      this.#next();
      return;
    }
    if (turns > 0 && this.#mayClose()) {
      afterTurns(1, () => this.#standStill(attempt, turns - 1));
      return;
    }
    void this.#threads.hold(...this.#rest, (running, sinceNs) => this.#stop(attempt, running, sinceNs));
  }

  /** Nothing of the guest runs from here on, until it is told to. */
  #stop(attempt: number, running: string[], sinceNs: bigint): void {
    const { control } = this.#boot;
    if (Atomics.load(control, Word.pause) !== attempt) {
      this.#threads.release();
      this.#next();
      return;
    }
    let state: Uint8Array;
    let lengths: number[];
    try {
      this.#refuseIfBusy(running);
      this.#tellShape();
      state = this.#capture();
      lengths = this.#shape().regions.map((region) => region.lengthBytes);
      if (this.#threads.givenWhileHeld) throw busyError([GIVEN_WHILE_HELD]);
    } catch (error) {
      this.#threads.release();
      Atomics.compareExchange(control, Word.pause, attempt, 0);
      this.#post({ type: 'refused', attempt, error: plainError(error) });
      this.#next();
      return;
    }
    if (Atomics.compareExchange(control, Word.pause, attempt, -attempt) !== attempt) {
      this.#threads.release();
      this.#next();
      return;
    }
    const returned = this.#queue.splice(0).map((request) => request.id);
    this.#post({ type: 'paused', attempt, sinceNs, state, returned, lengths }, [state.buffer as ArrayBuffer]);
    while (Atomics.load(control, Word.pause) === -attempt) Atomics.wait(control, Word.pause, -attempt);
    this.#threads.release();
  }

  #capture(): Uint8Array {
    const envelope: WorkerStateEnvelope = {
      wasm: this.#captureWasm(),
      app: this.#definition.save?.(this.#app),
    };
    try {
      // Copied: Node's serializer may hand out a slice of a pool, which cannot be transferred.
      return Uint8Array.from(serialize(envelope));
    } catch (cause) {
      throw memferryError(
        'GUEST_UNMOVABLE',
        `the guest's state is not structured-clonable: ${String(cause)}`,
        {
          cause,
          facts: { names: ['the value that save() gave'] },
        },
      );
    }
  }

  /**
   * Stands still until the guest's state has come, then prepares it and stands still again until it is
   * resumed. Growing memory is all that happens before.
   */
  async #arrive(): Promise<void> {
    const { control, port } = this.#boot;
    const still = Atomics.load(control, Word.pause);
    let state: Uint8Array | null = null;
    while (state === null) {
      const seen = Atomics.load(control, Word.wake);
      const received = receiveMessageOnPort(port) as { message: ToWorker } | undefined;
      if (received === undefined) Atomics.wait(control, Word.wake, seen);
      else if (received.message.type === 'prepare') state = received.message.state;
      else if (received.message.type === 'grow') this.#grow(received.message);
    }
    const envelope = deserialize(state) as WorkerStateEnvelope | null;
    // What finalizers of objects made so far would free is the source's from here on.
    this.#wrappers.forget();
    restoreWasm(this.#registry, Object(envelope).wasm as WasmState, this.#hostFunctions);
    if (this.#definition.adopt) {
      const app = await this.#definition.adopt(this.#app, Object(envelope).app, this.#context);
      if (app !== undefined) this.#app = app;
    }
    if (this.#threads.givenWhileHeld) throw busyError([GIVEN_WHILE_HELD]);
    this.#wrappers.built();
    this.#post({ type: 'prepared' });
    while (Atomics.load(control, Word.pause) === still) Atomics.wait(control, Word.pause, still);
    this.#threads.release();
  }

  #grow(message: ToWorker & { type: 'grow' }): void {
    const { kind, index } = message;
    const lengthBytes = this.#memories.grow(kind, index, message.lengthBytes, () =>
      this.#definition.memoryGrown?.(this.#app),
    );
    this.#post({ type: 'grown', lengthBytes });
  }
}

function isThenable(value: unknown): boolean {
  return typeof (Object(value) as { then?: unknown }).then === 'function';
}
