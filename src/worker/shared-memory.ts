/**
 * A shared WebAssembly.Memory that every worker of a guest imports: threads of one program. The main thread makes it,
 * before any worker, and moves it as a region of its own; instances, globals and tables are each worker's. Lives in
 * the main thread, which never touches its content.
 */
import { memferryError } from '../errors.js';
import { Region } from '../region.js';
import { WASM_PAGE_BYTES } from './wasm-registry.js';
import { type WasmMemoryObject, wasm } from './webassembly.js';

/** Lengths of a shared WebAssembly memory. */
export interface SharedMemoryOptions {
  /** In WebAssembly pages of 64 KiB, from 1. */
  initialPages: number;
  /** The same, up to 65 536. Threaded modules ask for exactly this maximum. */
  maximumPages: number;
}

/** Of a memory with 32-bit addresses. */
const MOST_PAGES = 65_536;

export class SharedMemory {
  readonly region: Region;
  private constructor(
    readonly memory: WasmMemoryObject,
    readonly maximumPages: number,
  ) {
    this.region = Region.adopt(memory as Parameters<typeof Region.adopt>[0]);
  }

  static make({ initialPages, maximumPages }: SharedMemoryOptions): SharedMemory {
    const whole = Number.isInteger(initialPages) && Number.isInteger(maximumPages);
    if (!whole || initialPages < 1 || maximumPages < initialPages || maximumPages > MOST_PAGES) {
      throw memferryError(
        'INVALID_ARGUMENT',
        `a shared memory has 1 to ${MOST_PAGES} pages of 64 KiB and a maximum not below that, not ${initialPages} and ${maximumPages}`,
      );
    }
    const memory = new wasm.Memory({ initial: initialPages, maximum: maximumPages, shared: true });
    return new SharedMemory(memory, maximumPages);
  }

  /** Takes note of what the workers made of its length. */
  refresh(): number {
    // Growth by nothing brings this thread's view of the length up to date.
    this.memory.grow(0);
    return this.region.refresh();
  }

  grow(lengthBytes: number): void {
    const missing = lengthBytes - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / WASM_PAGE_BYTES));
    this.region.refresh();
  }
}
