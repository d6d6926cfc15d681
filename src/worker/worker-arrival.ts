/**
 * The destination's side of a worker guest: starts its workers from a module on the host's own list, makes
 * their memories as long as the source's, and hands their regions to the engine. Lives in the main thread.
 */
import { deserialize } from 'node:v8';
import type { ResourceLimits } from 'node:worker_threads';

import { loadAddon } from '../addon.js';
import { memferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { checkWorkerGuestsOptions, moduleUrl } from '../options/worker.js';
import { Region } from '../region.js';
import { callOut } from '../tell-listeners.js';
import { type GuestDescription, parseDescription } from './description.js';
import { sha256OfModule } from './module-file.js';
import { SharedMemory } from './shared-memory.js';
import { WASM_PAGE_BYTES } from './wasm-registry.js';
import { GuestWiring } from './guest-wiring.js';
import { closeQuietly, letGo, openRegions, startAll, type Unfinished, WorkerGuest } from './worker-guest.js';
import { type WorkerBase, type WorkerBaseOptions, workerBase } from './worker-base.js';
import { WorkerLink } from './worker-link.js';

/** What `workerGuests` may be told. */
export interface WorkerGuestsOptions {
  /** What this host is willing to run: names, and the file: URLs of the files behind them. */
  modules: Readonly<Record<string, URL | string>>;
  /** Called when a guest has arrived and runs; its pages may still be on their way. What it throws is a warning. */
  onGuest?: ((guest: WorkerGuest) => void) | undefined;
  /** Guests start from what lies there, where there is something. */
  base?: WorkerBaseOptions | undefined;
  /** As `WorkerGuestOptions.pauseTimeoutMs`, for when the guest leaves again. Default 5000. */
  pauseTimeoutMs?: number;
  /** Passed to the workers. */
  resourceLimits?: ResourceLimits;
}

/**
 * Takes worker guests: for `listen({ accept })` and `unpark({ accept })`. What it gives throws MODULE_REFUSED for a module
 * that is not on the list or has another SHA-256, and GUEST_UNMOVABLE where the module builds something else here than at
 * the source.
 * @throws INVALID_ARGUMENT
 */
export function workerGuests(
  options: WorkerGuestsOptions,
): (offer: GuestOffer, context?: { signal?: AbortSignal }) => Promise<ArrivingWorkerGuest> {
  checkWorkerGuestsOptions(options);
  return (offer, context) => ArrivingWorkerGuest.start(offer, options, context?.signal);
}

/** The destination's side of a worker guest, as `workerGuests` makes it. */
export class ArrivingWorkerGuest implements ArrivingGuest {
  readonly regions: readonly Region[];
  /** The guest itself; it runs, and may leave again, from `resume` on. */
  readonly guest: WorkerGuest;
  readonly #links: WorkerLink[];
  readonly #description: GuestDescription;
  readonly #sharedRegion: Region | null;
  readonly #sharedMemory: SharedMemory | null;
  readonly #onGuest: ((guest: WorkerGuest) => void) | undefined;
  /** Set before it is handed over. */
  #base: WorkerBase | null = null;

  private constructor(parts: {
    guest: WorkerGuest;
    links: WorkerLink[];
    description: GuestDescription;
    sharedRegion: Region | null;
    sharedMemory: SharedMemory | null;
    onGuest: ((guest: WorkerGuest) => void) | undefined;
  }) {
    this.guest = parts.guest;
    this.regions = parts.guest.regions.map(({ region }) => region);
    this.#links = parts.links;
    this.#description = parts.description;
    this.#sharedRegion = parts.sharedRegion;
    this.#sharedMemory = parts.sharedMemory;
    this.#onGuest = parts.onGuest;
  }

  /** Starts the workers and makes their memories as long as the source's. `workerGuests` calls it. */
  static async start(
    offer: GuestOffer,
    options: WorkerGuestsOptions,
    signal?: AbortSignal,
  ): Promise<ArrivingWorkerGuest> {
    const url = await listedModule(offer, options.modules);
    const description = parseDescription(offer.description);
    const plans = planOf(offer, description);
    loadAddon().forwardSigbusToWebAssembly();

    const { sharedHeapBytes, sharedMemoryPages, data } = description;
    const wiring = new GuestWiring();
    const made: Unfinished = { shared: null, sharedMemory: null, links: [], regions: [] };
    try {
      made.shared =
        sharedHeapBytes > 0 ? Region.allocate({ lengthBytes: sharedHeapBytes, shared: true }) : null;
      made.sharedMemory =
        sharedMemoryPages === null
          ? null
          : SharedMemory.make({
              initialPages: (offer.regions.at(-1)?.lengthBytes ?? 0) / WASM_PAGE_BYTES,
              maximumPages: sharedMemoryPages,
            });
      const boot = {
        url: url.href,
        name: offer.name,
        workers: plans.length,
        data,
        sharedHeap: [...(made.shared?.views ?? [])],
        sharedMemory: made.sharedMemory?.memory ?? null,
      };
      made.links = await startAll(
        plans.map(
          (plan, worker) => () =>
            WorkerLink.start(
              { ...boot, worker, plan },
              wiring.events(worker),
              options.resourceLimits,
              signal,
            ),
        ),
      );
      made.links.forEach((link, worker) => {
        checkShape(link, description.workers[worker] as GuestDescription['workers'][number]);
      });
      made.regions = openRegions(made.links, made.shared, made.sharedMemory);
      await lengthen(made, offer);
      checkRegions(made.regions, offer);
      const guest = WorkerGuest.fromParts(
        {
          name: offer.name,
          module: offer.module as NonNullable<GuestOffer['module']>,
          data,
          links: made.links,
          regions: made.regions,
          sharedRegion: made.shared,
          sharedMemory: made.sharedMemory,
          pauseTimeoutMs: options.pauseTimeoutMs ?? 5000,
        },
        wiring,
      );
      const arriving = new ArrivingWorkerGuest({
        guest,
        links: made.links,
        description,
        sharedRegion: made.shared,
        sharedMemory: made.sharedMemory,
        onGuest: options.onGuest,
      });
      arriving.#base = await workerBase(offer, arriving.regions, options, ArrivingWorkerGuest.start);
      return arriving;
    } catch (error) {
      await letGo(made, error as Error);
      throw error;
    }
  }

  get bases(): WorkerBase['bases'] {
    return this.#base?.bases ?? [];
  }

  get replay(): NonNullable<ArrivingGuest['replay']> | undefined {
    return this.#base?.replay;
  }

  async grow(index: number, lengthBytes: number): Promise<void> {
    let rest = index;
    for (const [worker, { regions }] of this.#description.workers.entries()) {
      const entry = regions[rest];
      if (entry) {
        await this.#links[worker]?.grow(entry.kind, entry.index, lengthBytes);
        this.regions[index]?.refresh();
        return;
      }
      rest -= regions.length;
    }
    if (this.#sharedMemory && index === this.regions.length - 1) {
      this.#sharedMemory.grow(lengthBytes);
      return;
    }
    throw memferryError('PROTOCOL_ERROR', `region ${index} of "${this.guest.name}" cannot grow`);
  }

  async prepare(state: Uint8Array, options: { signal?: AbortSignal } = {}): Promise<void> {
    const states = deserializeStates(state);
    if (states.length !== this.#links.length) {
      throw memferryError('PREPARE_FAILED', `a state of ${states.length} workers for ${this.#links.length}`);
    }
    const prepared = Promise.all(
      this.#links.map((link, worker) => link.prepare(states[worker] as Uint8Array)),
    );
    await untilAborted(prepared, options.signal);
  }

  resume(): void {
    for (const link of this.#links) link.unpause();
    // Apart: what the host does with its guest cannot make the resume fail.
    queueMicrotask(() => {
      const what = `onGuest, for guest '${this.guest.name}',`;
      callOut({ what, code: 'MEMFERRY_ON_GUEST_THREW' }, this.#onGuest, this.guest);
    });
  }

  async abandon(): Promise<void> {
    await this.guest.terminate();
    if (this.#sharedRegion) closeQuietly(this.#sharedRegion);
    if (this.#sharedMemory) closeQuietly(this.#sharedMemory.region);
  }

  lost(pages: { region: number; first: number; count: number }[]): void {
    this.guest.pagesLost(pages);
  }
}

async function listedModule(offer: GuestOffer, modules: WorkerGuestsOptions['modules']): Promise<URL> {
  const { module } = offer;
  const refuse = (why: string): never => {
    throw memferryError('MODULE_REFUSED', `guest "${offer.name}": ${why}`, {
      facts: { module },
    });
  };
  if (module === null) return refuse('it names no module to run');
  const listed = Object.hasOwn(modules, module.name) ? modules[module.name] : undefined;
  if (listed === undefined) return refuse(`module "${module.name}" is not on this host's list`);
  const url = moduleUrl(listed, `module "${module.name}"`);
  const sha256 = await sha256OfModule(url);
  if (sha256 !== module.sha256.toLowerCase()) {
    return refuse(`module "${module.name}" has SHA-256 ${sha256} here and ${module.sha256} at the source`);
  }
  return url;
}

/** The lengths that each worker's memories and heaps must have, from the offer's region table. */
function planOf(offer: GuestOffer, description: GuestDescription) {
  const lengths = offer.regions.map((region) => region.lengthBytes);
  const expected = description.workers.reduce((sum, worker) => sum + worker.regions.length, 0);
  const shared = description.sharedHeapBytes > 0 ? 1 : 0;
  const given = description.sharedMemoryPages === null ? 0 : 1;
  if (
    lengths.length !== expected + shared + given ||
    (shared && lengths[expected] !== description.sharedHeapBytes)
  ) {
    throw memferryError('PROTOCOL_ERROR', `guest "${offer.name}": its regions and its description differ`);
  }
  let next = 0;
  return description.workers.map(({ regions, build }) => {
    const plan = { memoryBytes: [] as number[], heapBytes: [] as number[] };
    for (const { kind, index } of regions) {
      const list = kind === 'memory' ? plan.memoryBytes : plan.heapBytes;
      while (list.length < index) list.push(0);
      const length = lengths[next++] as number;
      // What the program grows while it is built ends where it did there; the rest follows when it is.
      list[index] = kind === 'memory' && build?.grown.includes(index) ? 0 : length;
    }
    return plan;
  });
}

function checkShape(link: WorkerLink, described: GuestDescription['workers'][number]): void {
  const { shape } = link;
  const same =
    JSON.stringify(shape.instances) === JSON.stringify(described.instances) &&
    JSON.stringify(shape.regions.map(({ kind, index }) => [kind, index])) ===
      JSON.stringify(described.regions.map(({ kind, index }) => [kind, index]));
  const differ = `${described.instances.length} WebAssembly instances and ${described.regions.length} regions at the source, ${shape.instances.length} and ${shape.regions.length} here`;
  const names = same
    ? [...shape.unmovable, ...buildDifferences(shape, described)]
    : [`the guest builds other memories here (${differ})`];
  if (names.length > 0) {
    throw memferryError('GUEST_UNMOVABLE', `the guest cannot be set up here: ${names.join('; ')}`, {
      facts: { names },
    });
  }
}

/** What the state will refer to and is not here: found before the first page, and named. */
function buildDifferences(
  shape: WorkerLink['shape'],
  described: GuestDescription['workers'][number],
): string[] {
  const names = described.hostFunctions
    .filter((name) => !shape.hostFunctions.includes(name))
    .map((name) => `host function "${name}", which is not registered here`);
  const { build } = described;
  if (build === null) return names;
  if (build.functions !== shape.build.functions) {
    names.push(`${build.functions} host functions made by building it, and ${shape.build.functions} here`);
  }
  if (build.references !== shape.build.references) names.push('other host objects in its tables than here');
  const length = Math.max(build.layout.length, shape.build.layout.length);
  for (let i = 0; i < length && names.length < 20; i++) {
    const [there, here] = [build.layout[i] ?? 'nothing', shape.build.layout[i] ?? 'nothing'];
    if (there !== here) names.push(`its layout: ${there} at the source, ${here} here`);
  }
  return names;
}

/** Memories that had to begin shorter than they are at the source. */
async function lengthen({ links, regions }: Unfinished, offer: GuestOffer): Promise<void> {
  let at = 0;
  for (const link of links) {
    for (const { kind, index } of link.shape.regions) {
      const { region } = regions[at] as Unfinished['regions'][number];
      const wanted = offer.regions[at++]?.lengthBytes ?? 0;
      if (kind !== 'memory' || region.lengthBytes >= wanted) continue;
      await link.grow(kind, index, wanted);
      region.refresh();
    }
  }
}

function checkRegions(regions: readonly { name: string; region: Region }[], offer: GuestOffer): void {
  regions.forEach(({ name, region }, i) => {
    const wanted = offer.regions[i];
    if (!wanted || region.lengthBytes >= wanted.lengthBytes) return;
    throw memferryError(
      'GUEST_UNMOVABLE',
      `region ${name} has ${region.lengthBytes} bytes here and ${wanted.lengthBytes} at the source`,
      { facts: { names: [name] } },
    );
  });
}

/** The state is a peer's: V8 checks the form of what it reads, and this its meaning. */
function deserializeStates(state: Uint8Array): Uint8Array[] {
  let value: unknown;
  try {
    value = deserialize(state);
  } catch (cause) {
    throw memferryError('PREPARE_FAILED', 'the execution state is not readable', { cause });
  }
  if (Array.isArray(value) && value.every((each) => each instanceof Uint8Array)) {
    return value.map((each: Uint8Array) => Uint8Array.from(each));
  }
  throw memferryError('PREPARE_FAILED', 'the execution state is not one of worker guests');
}

async function untilAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise;
  let aborted!: () => void;
  const abort = new Promise<never>((_, reject) => {
    aborted = () =>
      reject(
        memferryError('CANCELLED', 'preparing was cancelled', {
          cause: signal.reason,
        }),
      );
  });
  signal.addEventListener('abort', aborted, { once: true });
  if (signal.aborted) aborted();
  promise.catch(() => undefined);
  try {
    return await Promise.race([promise, abort]);
  } finally {
    signal.removeEventListener('abort', aborted);
  }
}
