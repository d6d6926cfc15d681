/** The regions of one worker: its WebAssembly memories and its heaps, in the order of their making. Lives in the worker. */
import { memferryError } from '../errors.js';
import { Region } from '../region.js';
import type { BootData, WorkerRegion } from './messages.js';
import { renewViews } from './wasm-growth.js';
import { WASM_PAGE_BYTES, type WasmRegistry } from './wasm-registry.js';

export class WorkerMemories {
  readonly #registry: WasmRegistry;
  readonly #plan: BootData['plan'];
  readonly #heaps: Region[] = [];
  /** By the memory's number; null while it is empty, or where it cannot be a region. */
  readonly #memories: (Region | null)[] = [];

  constructor(registry: WasmRegistry, plan: BootData['plan']) {
    this.#registry = registry;
    this.#plan = plan;
  }

  heap(lengthBytes: number): readonly Uint8Array[] {
    const planned = this.#plan?.heapBytes[this.#heaps.length] ?? lengthBytes;
    if (planned !== lengthBytes) {
      throw memferryError('GUEST_UNMOVABLE', `heap ${this.#heaps.length} has ${planned} bytes at the source`);
    }
    const region = Region.allocate({ lengthBytes });
    this.#heaps.push(region);
    return region.views;
  }

  /** Makes regions of the memories that have none yet. */
  adopt(): void {
    this.#registry.memories.forEach(({ memory }, number) => {
      // An empty memory has no address yet.
      if (this.#memories[number] || memory.buffer.byteLength === 0) this.#memories[number] ??= null;
      else this.#memories[number] = Region.adopt(memory as Parameters<typeof Region.adopt>[0]);
    });
  }

  /** How many memories are regions. */
  get adopted(): number {
    return this.#memories.filter((region) => region !== null).length;
  }

  regions(): WorkerRegion[] {
    const memories = this.#memories.flatMap((region, index): WorkerRegion[] =>
      region ? [{ kind: 'memory', index, id: region.id, lengthBytes: region.refresh() }] : [],
    );
    const heaps = this.#heaps.map(
      ({ id, lengthBytes }, index): WorkerRegion => ({ kind: 'heap', index, id, lengthBytes }),
    );
    return [...memories, ...heaps];
  }

  /** Gives the new length. `renewed` is for glue that has views of the memory. */
  grow(kind: WorkerRegion['kind'], index: number, lengthBytes: number, renewed: () => void): number {
    const entry = this.#registry.memories[index];
    const region = this.#memories[index];
    if (kind !== 'memory' || !entry || !region) {
      throw memferryError('GUEST_UNMOVABLE', `${kind} ${index} cannot grow`);
    }
    const missing = lengthBytes - entry.memory.buffer.byteLength;
    if (missing > 0) {
      entry.memory.grow(Math.ceil(missing / WASM_PAGE_BYTES));
      if (!entry.shared) renewViews(this.#registry, entry.memory);
      renewed();
    }
    return region.refresh();
  }
}
