/**
 * A guest of one or more workers, at the host where it runs: the source's side of a migration. Lives in the
 * main thread, which never touches the guest's memory.
 */
import { EventEmitter } from 'node:events';
import { serialize } from 'node:v8';
import type { ResourceLimits } from 'node:worker_threads';

import { checkOptions } from '../check-options.js';
import { memferryError } from '../errors.js';
import { moduleUrl, resolveWorkerGuestOptions } from '../options/worker.js';
import type { Guest, GuestModule, GuestRegion } from '../guest.js';
import { Region } from '../region.js';
import { tellListeners } from '../tell-listeners.js';
import { checkWorker } from './check-worker.js';
import { describeGuest } from './description.js';
import { guestMoved } from './errors.js';
import { sha256OfModule } from './module-file.js';
import { SharedMemory, type SharedMemoryOptions } from './shared-memory.js';
import { pauseLimit } from './pause-limit.js';
import { unmovableError } from './wasm-state.js';
import { GuestWiring } from './guest-wiring.js';
import { type Paused, WorkerLink } from './worker-link.js';

/** What `WorkerGuest.start` takes. */
export interface WorkerGuestOptions {
  /** Shown in reports, at most 64 characters. Default: the module's name. */
  name?: string;
  /** The file that runs the guest, and the name under which destinations list it. */
  module: { name: string; url: URL | string };
  /** JSON for `context.data`; it moves with the guest. */
  data?: unknown;
  /** Workers that run the module side by side and pause together, 1 to 64. Default 1. */
  workers?: number;
  /** Memory that all workers share, as `context.sharedHeap`, in bytes. Default none. */
  sharedHeapBytes?: number;
  /** A WebAssembly memory that all workers import, as `context.sharedMemory`: threads of one program. Default none. */
  sharedMemory?: SharedMemoryOptions;
  /** How long a pause waits for requests in progress, in ms. Default 5000. */
  pauseTimeoutMs?: number;
  /** Passed to the workers. */
  resourceLimits?: ResourceLimits;
}

/** Ending a worker takes milliseconds unless it is blocked in a page fault. */
const TERMINATE_MS = 10_000;

/** `departed`: it runs at another host. `lost`: it ended by itself, or by a lost page. `terminated`: by `terminate`. */
export type WorkerGuestStatus = 'running' | 'pausing' | 'paused' | 'departed' | 'lost' | 'terminated';

/** Its events, with what a listener is given. What a listener throws is a warning of the process. */
export interface WorkerGuestEvents {
  /** What the guest sent with `context.send`, and which worker did. */
  message: [value: unknown, worker: number];
  /** Pages that cannot be had any more; the guest ends when it touches one. */
  'pages-lost': [pages: { region: number; first: number; count: number }[]];
  /** The guest ended by itself, or by a lost page. */
  ended: [error: Error];
  /** The guest belongs to the destination now. */
  departed: [];
}

/** What an arrival hands over. */
export interface GuestParts {
  name: string;
  module: GuestModule;
  data: unknown;
  links: WorkerLink[];
  regions: GuestRegion[];
  sharedRegion: Region | null;
  sharedMemory: SharedMemory | null;
  pauseTimeoutMs: number;
}

/**
 * A guest of one or more workers, at the host where it runs: `migrate` and `park` take it. `start` begins its first
 * life; one that has arrived comes by `workerGuests({ onGuest })`.
 */
export class WorkerGuest extends EventEmitter<WorkerGuestEvents> implements Guest {
  readonly name: string;
  readonly module: GuestModule;
  /** As `WorkerGuestOptions.data`. */
  readonly data: unknown;
  /**
   * Runs before the workers are ended, and is awaited: an engine that still serves pages must poison what is
   * missing first, or a worker that waits for a page could not be ended.
   */
  beforeTerminate: (() => Promise<void> | void) | null = null;
  readonly #links: WorkerLink[];
  readonly #pauseTimeoutMs: number;
  readonly #sharedRegion: Region | null;
  readonly #sharedMemory: SharedMemory | null;
  #regions: GuestRegion[];
  #status: WorkerGuestStatus = 'running';
  #pausedAtNs: bigint | undefined;
  #lostPages = 0;
  #ending: Promise<void> | null = null;

  private constructor(parts: GuestParts) {
    super();
    this.name = parts.name;
    this.module = parts.module;
    this.data = parts.data;
    this.#links = parts.links;
    this.#regions = parts.regions;
    this.#sharedRegion = parts.sharedRegion;
    this.#sharedMemory = parts.sharedMemory;
    this.#pauseTimeoutMs = parts.pauseTimeoutMs;
  }

  /** Starts a guest's first life. Rejects with INVALID_ARGUMENT, also where its module throws (as the `cause`). */
  static async start(given: WorkerGuestOptions): Promise<WorkerGuest> {
    const options = resolveWorkerGuestOptions(given);
    const { data = null, workers, sharedHeapBytes, pauseTimeoutMs } = options;
    const name = options.name ?? options.module.name;
    const url = moduleUrl(options.module.url, 'WorkerGuest.start: module.url');
    const module = {
      name: options.module.name,
      sha256: await sha256OfModule(url),
    };
    const wiring = new GuestWiring();
    const made: Unfinished = { shared: null, sharedMemory: null, links: [], regions: [] };
    try {
      made.shared =
        sharedHeapBytes > 0 ? Region.allocate({ lengthBytes: sharedHeapBytes, shared: true }) : null;
      made.sharedMemory = options.sharedMemory ? SharedMemory.make(options.sharedMemory) : null;
      const boot = {
        url: url.href,
        name,
        workers,
        data,
        sharedHeap: [...(made.shared?.views ?? [])],
        sharedMemory: made.sharedMemory?.memory ?? null,
        plan: null,
      };
      made.links = await startAll(
        Array.from(
          { length: workers },
          (_, worker) => () =>
            WorkerLink.start({ ...boot, worker }, wiring.events(worker), options.resourceLimits),
        ),
      );
      made.regions = openRegions(made.links, made.shared, made.sharedMemory);
    } catch (error) {
      await letGo(made, error as Error);
      throw error;
    }
    const { links, regions, shared, sharedMemory } = made;
    const parts = {
      name,
      module,
      data,
      links,
      regions,
      sharedRegion: shared,
      sharedMemory,
      pauseTimeoutMs,
    };
    return WorkerGuest.fromParts(parts, wiring);
  }

  /** For arrivals. */
  static fromParts(parts: GuestParts, wiring: GuestWiring): WorkerGuest {
    const guest = new WorkerGuest(parts);
    wiring.connect({
      message: (worker, value) => tellListeners(guest, 'message', value, worker),
      shape: () => guest.#renewRegions(),
      trapped: (error) => guest.#trapped(error.message),
      ended: (error) => guest.#ended(error),
    });
    return guest;
  }

  /** What it does now. */
  get status(): WorkerGuestStatus {
    return this.#status;
  }

  /** How many workers it has. */
  get workers(): number {
    return this.#links.length;
  }

  get regions(): readonly GuestRegion[] {
    return this.#regions;
  }

  /** Throws GUEST_UNMOVABLE with names when the guest holds what is known never to move. */
  get description(): unknown {
    const unmovable = this.#links.flatMap((link) => link.shape.unmovable);
    if (unmovable.length > 0) throw unmovableError([...new Set(unmovable)]);
    return describeGuest({
      data: this.data,
      sharedHeapBytes: this.#sharedRegion?.lengthBytes ?? 0,
      sharedMemoryPages: this.#sharedMemory?.maximumPages ?? null,
      links: this.#links.map((link) => link.shape),
    });
  }

  /** Requests that have no reply yet. */
  get pendingRequests(): number {
    return this.#links.reduce((sum, link) => sum + link.pendingRequests, 0);
  }

  /**
   * Asks the guest. Rejects with GUEST_MOVED when the guest left before it began, GUEST_REQUEST_FAILED with
   * what its `handle` threw, GUEST_LOST when it ended, INVALID_ARGUMENT when `value` cannot be cloned.
   */
  async request(value: unknown, options: { worker?: number } = {}): Promise<unknown> {
    checkOptions(options, 'request', ['worker']);
    const link = this.#links[options.worker ?? 0];
    if (!link)
      throw memferryError('INVALID_ARGUMENT', `guest "${this.name}" has no worker ${options.worker}`);
    return link.request(value);
  }

  /**
   * Looks at everything that would have to move, as a pause would, without pausing: rejects with GUEST_UNMOVABLE or
   * GUEST_BUSY, and the names of what stands in the way. `migrate` and `park` begin with it. What may be closed any
   * moment (a timer, a file) gets half a second for it. Where requests are in progress for longer than that, it is left
   * to the pause.
   */
  async check(options: { signal?: AbortSignal } = {}): Promise<void> {
    void this.description;
    const limitMs = this.#pauseTimeoutMs;
    await Promise.all(this.#links.map((link) => checkWorker(link, limitMs, options.signal)));
    // What the look itself has brought to light: a memory made since, and the like.
    void this.description;
  }

  /** The guest's last instruction before the pause that it is in, by the clock of `process.hrtime`. */
  get pausedAtNs(): bigint | undefined {
    return this.#status === 'paused' ? this.#pausedAtNs : undefined;
  }

  async pause(options: { signal?: AbortSignal } = {}): Promise<Uint8Array> {
    if (this.#status !== 'running') {
      throw memferryError('GUEST_BUSY', `guest "${this.name}" cannot pause: it is ${this.#status}`, {
        facts: { names: [this.#status] },
      });
    }
    void this.description;
    this.#status = 'pausing';
    const limit = pauseLimit(options.signal, this.#pauseTimeoutMs, () => {
      const names = this.#links.flatMap((link, worker) =>
        link.pendingRequests > 0 ? [`a request in progress in worker ${worker}`] : [],
      );
      return memferryError('GUEST_BUSY', `guest "${this.name}" reached no safepoint: ${names.join(', ')}`, {
        facts: { names, pauseTimeoutMs: this.#pauseTimeoutMs },
      });
    });
    // A barrier: the first refusal calls the others off, and only when all stand still is the guest paused.
    const paused = await Promise.allSettled(
      this.#links.map((link) =>
        link.pause(limit.cancelled).catch((error: unknown) => {
          limit.cancel(error);
          throw error;
        }),
      ),
    );
    limit.done();
    const states = paused.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
    if (states.length < this.#links.length) {
      paused.forEach((result, i) => {
        if (result.status === 'fulfilled') this.#links[i]?.unpause();
      });
      if (this.#status === 'pausing') this.#status = 'running';
      throw limit.reason();
    }
    try {
      this.#takeLengths(states);
    } catch (error) {
      for (const link of this.#links) link.unpause();
      this.#status = 'running';
      throw error;
    }
    this.#status = 'paused';
    this.#pausedAtNs = states
      .map(({ sinceNs }) => sinceNs)
      .sort((a, b) => (a < b ? -1 : 1))
      .at(-1);
    return Uint8Array.from(serialize(states.map(({ state }) => state)));
  }

  unpause(): void {
    if (this.#status !== 'paused') return;
    this.#status = 'running';
    for (const link of this.#links) link.unpause();
  }

  departed(): void {
    if (this.#status === 'departed') return;
    this.#status = 'departed';
    for (const link of this.#links) link.departed();
    tellListeners(this, 'departed');
  }

  release(): Promise<void> {
    return this.#end(guestMoved(this.name));
  }

  /** Pages of an arrived guest are lost for good: it ends at the first touch. */
  pagesLost(pages: { region: number; first: number; count: number }[]): void {
    this.#lostPages += pages.reduce((sum, run) => sum + run.count, 0);
    tellListeners(this, 'pages-lost', pages);
  }

  /** Ends the guest here. Everything pending rejects. Twice is fine. */
  terminate(): Promise<void> {
    if (this.#status !== 'departed' && this.#status !== 'lost') this.#status = 'terminated';
    return this.#end(
      memferryError('GUEST_LOST', `guest "${this.name}" was terminated`, {
        facts: {},
      }),
    );
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.terminate();
  }

  #end(reason: Error): Promise<void> {
    this.#ending ??= (async () => {
      await this.beforeTerminate?.();
      await this.#stopped(reason);
      for (const { region } of this.#regions) closeQuietly(region);
    })();
    return this.#ending;
  }

  /** A worker that waits for a page ends only when the page comes or is poisoned, so the wait is bounded. */
  async #stopped(reason: Error): Promise<void> {
    let timer: NodeJS.Timeout | undefined;
    const tooLong = new Promise<never>((_, reject) => {
      timer = setTimeout(() => {
        const message = `guest "${this.name}" cannot be ended: it waits for a page that has not come`;
        reject(
          memferryError('GUEST_LOST', message, {
            cause: reason,
            facts: { terminateTimeoutMs: TERMINATE_MS },
          }),
        );
      }, TERMINATE_MS);
    });
    try {
      await Promise.race([tooLong, Promise.all(this.#links.map((link) => link.stop(reason)))]);
    } finally {
      clearTimeout(timer);
    }
  }

  /** A trap after pages were lost is taken for the loss: the heap is in the middle of an operation for good. */
  #trapped(message: string): Error | null {
    if (this.#lostPages === 0) return null;
    const error = memferryError('GUEST_LOST', `guest "${this.name}" touched a lost page: ${message}`, {
      facts: { pages: this.#lostPages },
    });
    this.#ended(error);
    return error;
  }

  #ended(error: Error): void {
    if (this.#status === 'lost' || this.#status === 'terminated' || this.#status === 'departed') return;
    this.#status = 'lost';
    // Whoever terminates the guest later gets the same promise, and hears of a failure.
    this.#end(error).catch(() => undefined);
    tellListeners(this, 'ended', error);
  }

  /** A worker that has ended since it told of a memory has taken the region with it. */
  #renewRegions(): void {
    const old = new Map(this.#regions.map((entry) => [entry.region.id, entry]));
    try {
      this.#regions = openRegions(this.#links, this.#sharedRegion, this.#sharedMemory, old);
    } catch (cause) {
      const message = `guest "${this.name}" ended: ${(cause as Error).message}`;
      this.#ended(memferryError('GUEST_LOST', message, { cause, facts: {} }));
    }
  }

  /** The workers know their memories' exact lengths. */
  #takeLengths(states: Paused[]): void {
    this.#sharedMemory?.refresh();
    for (const { region } of this.#regions) region.refresh();
    const told = states.flatMap((state) => state.lengths);
    told.forEach((lengthBytes, i) => {
      const { name, region } = this.#regions[i] as GuestRegion;
      const pages = lengthBytes / region.pageSize;
      if (region.native.pages() < pages) region.native.grow(pages);
      if (region.lengthBytes < lengthBytes) throw memferryError('PAUSE_FAILED', `region ${name} fell behind`);
    });
  }
}

/** Starts all or none. */
export async function startAll(starts: (() => Promise<WorkerLink>)[]): Promise<WorkerLink[]> {
  const results = await Promise.allSettled(starts.map((start) => start()));
  const links = results.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
  const failed = results.find((result) => result.status === 'rejected');
  if (!failed) return links;
  await Promise.all(links.map((link) => link.stop(new Error('another worker of the guest did not start'))));
  throw failed.reason;
}

/** A guest that is being made, as far as it has come. */
export interface Unfinished {
  shared: Region | null;
  sharedMemory: SharedMemory | null;
  links: WorkerLink[];
  regions: GuestRegion[];
}

/** It comes to nothing. */
export async function letGo(made: Unfinished, why: Error): Promise<void> {
  await Promise.all(made.links.map((link) => link.stop(why)));
  for (const { region } of made.regions) closeQuietly(region);
  if (made.shared) closeQuietly(made.shared);
  if (made.sharedMemory) closeQuietly(made.sharedMemory.region);
}

/**
 * Handles on the workers' regions, in an order that source and destination share.
 * @throws REGION_GONE when a worker has ended
 */
export function openRegions(
  links: readonly WorkerLink[],
  shared: Region | null,
  sharedMemory: SharedMemory | null,
  known: ReadonlyMap<string, GuestRegion> = new Map(),
): GuestRegion[] {
  const regions = links.flatMap((link, worker) =>
    link.shape.regions.map(({ kind, index, id }) => {
      const name = links.length === 1 ? `${kind}:${index}` : `${worker}:${kind}:${index}`;
      return known.get(id) ?? { name, region: Region.open(id) };
    }),
  );
  if (shared) regions.push({ name: 'shared', region: shared });
  if (sharedMemory) regions.push({ name: 'shared-memory', region: sharedMemory.region });
  return regions;
}

export function closeQuietly(region: Region): void {
  try {
    region.close();
  } catch {
    // A region that still moves is closed by its engine's end; its memory's owner is gone already.
  }
}
