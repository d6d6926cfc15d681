/**
 * A region: memory that can move. Either memferry's own (`Region.allocate`), or memory that JavaScript has
 * already (`Region.adopt`), or memory of another process (`Region.attach`), or a handle on a region of another thread of
 * this process (`Region.open`).
 */
import { markAsUntransferable } from 'node:worker_threads';

import { loadAddon } from './addon.js';
import { type AttachOptions, checkAttachment } from './attach.js';
import { checkOptions } from './check-options.js';
import { type MemferryError, memferryError, native, nativeAsync } from './errors.js';
import { deferred } from './protocol/deferred.js';
import type { NativeRegion } from './native.js';

/** The huge pages that `allocate` makes memory of. */
export const HUGE_PAGE_BYTES = 2 ** 21;

/** The longest view that every supported Node can make. */
export const MAX_VIEW_BYTES = 2 ** 32;

/** What `Region.allocate` takes. */
export interface AllocateOptions {
  /** A positive multiple of the page size. */
  lengthBytes: number;
  /** Memory that workers can share (its views lie over SharedArrayBuffers); else one thread owns it. Default false. */
  shared?: boolean;
  /**
   * Of reserved huge pages of 2 MiB (`vm.nr_hugepages`): `lengthBytes` is a multiple of that. The region still counts in
   * pages of the system's size, so that it moves to and from memory of any kind; `Region.open` gives it views in other
   * threads, so it takes no `shared`. Default false.
   */
  hugePages?: boolean;
}

/** A WebAssembly.Memory, as far as a region cares; spelt out because its type is part of no Node typings. */
export interface WasmMemory {
  /** The memory's buffer now. */
  readonly buffer: ArrayBufferLike;
  /** By so many pages of 64 KiB; gives the length before, in pages. */
  grow(pages: number): number;
}

/** What `Region.adopt` takes. */
export type Adoptable = WasmMemory | ArrayBufferLike | ArrayBufferView;

/** How a region's length follows its memory, and how its views are had. */
interface Backing {
  views(): readonly Uint8Array[];
  /** Memory of JavaScript's, which may be moved; memferry's own never is. */
  mayMove: boolean;
  /** The memory's length now in bytes, or null: ask the kernel. */
  lengthBytes(): number | null;
}

/**
 * Memory that can move, as a handle: memferry's own (`allocate`), memory that JavaScript has already (`adopt`), memory
 * of another process (`attach`), or a region of another thread of this process (`open`). One migration at a time has
 * it. What needs the memory throws REGION_CLOSED once the handle is closed.
 */
export class Region {
  /** The addon's handle; for the parts of memferry that drive engines. */
  readonly native: NativeRegion;
  /**
   * Of attached memory: resolves when the process that owns it has ended or runs another program, with the error that
   * whatever used the region failed with. Null where this process owns the memory.
   */
  readonly ownerGone: Promise<MemferryError> | null;
  readonly #backing: Backing;
  #closed = false;

  private constructor(
    handle: NativeRegion,
    backing: Backing,
    ownerGone: Promise<MemferryError> | null = null,
  ) {
    this.native = handle;
    this.ownerGone = ownerGone;
    this.#backing = backing;
  }

  /**
   * New memory, zeros, page-aligned, not touched yet.
   * @throws INVALID_ARGUMENT when `lengthBytes` is not a positive multiple of the page size; NO_MEMORY, also when not
   * so many huge pages are free
   */
  static allocate(options: AllocateOptions): Region {
    checkOptions(options, 'Region.allocate', ['lengthBytes', 'shared', 'hugePages']);
    const { lengthBytes, shared = false, hugePages = false } = options;
    const { pageSize } = loadAddon();
    checkLength(lengthBytes, hugePages ? HUGE_PAGE_BYTES : pageSize);
    if (hugePages) {
      if (shared) {
        throw memferryError(
          'INVALID_ARGUMENT',
          'huge pages with `shared`: other threads have them by Region.open',
        );
      }
      const handle = native(() => loadAddon().allocate(lengthBytes, true));
      return new Region(handle, { ...own(handle), lengthBytes: () => lengthBytes });
    }
    if (!shared) {
      const handle = native(() => loadAddon().allocate(lengthBytes));
      return new Region(handle, { ...own(handle), lengthBytes: () => lengthBytes });
    }
    const views: Uint8Array[] = [];
    for (let start = 0; start < lengthBytes; start += MAX_VIEW_BYTES) {
      views.push(sharedView(Math.min(MAX_VIEW_BYTES, lengthBytes - start)));
    }
    return new Region(
      native(() => loadAddon().adopt(views, lengthBytes, null)),
      fixed(views),
    );
  }

  /**
   * Makes a region of memory that JavaScript has already, and pins it: a WebAssembly memory, shared or not,
   * with its whole reservation as the capacity it may grow to; or a buffer (or view of one) that starts at
   * a page boundary and is a multiple of the page size long. The memory stays its owner's: the end of this
   * thread takes the region with it. A resizable buffer may grow, never shrink, while it is a region.
   * @throws REGION_UNALIGNED with what to do; INVALID_ARGUMENT
   */
  static adopt(memory: Adoptable): Region {
    const { pageSize } = loadAddon();
    if (isWasmMemory(memory)) return adoptWasm(memory, (handle, backing) => new Region(handle, backing));
    const view = viewOf(memory);
    const { buffer } = view;
    checkLength(view.byteLength, pageSize);
    // A view up to the end of a resizable buffer grows with it; any other view's length stands.
    const growable = growthLimit(buffer);
    const follows = growable !== null && view.byteOffset + view.byteLength === buffer.byteLength;
    const capacity = follows ? growable - view.byteOffset : view.byteLength;
    const handle = native(() => loadAddon().adopt([view], capacity - (capacity % pageSize), memory));
    if (buffer instanceof ArrayBuffer) markAsUntransferable(buffer);
    if (!follows) return new Region(handle, fixed([view]));
    const now = () => buffer.byteLength - view.byteOffset;
    return new Region(handle, {
      views: () => [new Uint8Array(buffer, view.byteOffset, now())],
      mayMove: true,
      lengthBytes: now,
    });
  }

  /**
   * Makes a region of memory that another process owns: a hypervisor's guest RAM. It can be the source's region of a
   * migration (tracked by the owner's userfaultfd, or by hashes), and the destination's: pages that arrive go into the
   * owner's memory, and who touches one that is missing there waits for it. The region has no views. When the owner ends,
   * what uses the region fails with OWNER_GONE at once.
   *
   * Nobody but the owner may write the memory, and only by these addresses: writes by another mapping of its file go
   * unseen by `uffd-wp-async`. Root, or CAP_SYS_PTRACE over the owner.
   * @throws INVALID_ARGUMENT: a mapping that is not whole pages, overlaps, reaches beyond the file, or a descriptor that
   * is not what it should be; SYSTEM: a part is not mapped there, or not so; OWNER_GONE
   */
  static attach(options: AttachOptions): Region {
    const { pidfd, uffd, mappings, memory } = checkAttachment(options);
    const gone = deferred<MemferryError>();
    const handle = native(() =>
      loadAddon().attach(pidfd, uffd, mappings, memory, (message) =>
        gone.resolve(memferryError('OWNER_GONE', message)),
      ),
    );
    const lengthBytes = mappings.reduce((sum, mapping) => sum + mapping.lengthBytes, 0);
    const backing = { views: () => [], mayMove: false, lengthBytes: () => lengthBytes };
    return new Region(handle, backing, gone.promise);
  }

  /**
   * A handle on a region of any thread of this process, by its `id`. Memory that `allocate` made without
   * `shared` has views here too; adopted memory has none, because it belongs to the other thread.
   * @throws REGION_GONE when there is none any more
   */
  static open(id: string): Region {
    const handle = native(() => loadAddon().openRegion(id));
    if (handle === null) {
      throw memferryError('REGION_GONE', `no region ${id} in this process: its owner closed it or ended`, {
        facts: { id },
      });
    }
    return new Region(handle, { ...own(handle), lengthBytes: () => null });
  }

  /** Unguessable within the process; `Region.open(id)` gives a handle in another thread. */
  get id(): string {
    return this.native.id;
  }

  /** In bytes: the system's page size, of huge pages too. */
  get pageSize(): number {
    return this.native.pageSize;
  }

  /** Its length in pages; `refresh` takes note of growth. */
  get pages(): number {
    return this.#open().pages();
  }

  /** Its length in bytes; `refresh` takes note of growth. */
  get lengthBytes(): number {
    return this.pages * this.pageSize;
  }

  /** How far the memory may grow in place. */
  get capacityBytes(): number {
    return this.native.capacityPages * this.pageSize;
  }

  /** Whether this handle was closed. */
  get closed(): boolean {
    return this.#closed;
  }

  /**
   * The memory, in order, as views of at most 4 GiB each; none where it belongs to another thread. Take
   * them afresh after a WebAssembly memory has grown, as with `memory.buffer`.
   */
  get views(): readonly Uint8Array[] {
    this.#open();
    return this.#backing.views();
  }

  /**
   * The memory's length now in bytes: its own where it lives in this thread, else how far it is mapped. The
   * region takes no note of growth yet; `refresh` does.
   * @throws REGION_GONE when the memory has moved away (which V8 does only where address space is short)
   */
  measure(): number {
    const handle = this.#open();
    const length = this.#backing.lengthBytes();
    if (length === null) return native(() => handle.mappedPages()) * this.pageSize;
    const first = this.#backing.mayMove ? this.#backing.views()[0] : undefined;
    if (first !== undefined && !native(() => handle.startsAt(first))) {
      native(() => handle.retire());
      throw memferryError('REGION_GONE', 'the memory moved when it grew, beyond what was reserved for it');
    }
    return length - (length % this.pageSize);
  }

  /** Takes note of growth. Gives the length in bytes. Throws as `measure` does. */
  refresh(): number {
    const pages = this.measure() / this.pageSize;
    if (pages > this.pages) native(() => this.#open().grow(pages));
    return this.lengthBytes;
  }

  /**
   * XXH3_128 over the hashes of all pages, as 32 hex digits; the same at both sides of a migration. It runs
   * on a thread of the pool; what the owner writes meanwhile may or may not be in it.
   * @throws PAGES_LOST when a page cannot be read; REGION_GONE; CANCELLED when this thread ends meanwhile
   */
  async digest(): Promise<string> {
    const handle = this.#open();
    return nativeAsync(() => handle.digest());
  }

  /**
   * Lets go of this handle. Memory of memferry's own is unmapped when the last handle, view and engine have
   * let go; adopted memory is unpinned. Twice is fine.
   * @throws REGION_BUSY while the region moves: cancel or finish its migration first
   */
  close(): void {
    if (this.#closed) return;
    if (this.native.claimed() && !this.native.retired()) {
      throw memferryError('REGION_BUSY', 'the region is moving: cancel its migration or wait for its end', {
        facts: { id: this.id },
      });
    }
    this.#closed = true;
    native(() => this.native.close());
  }

  [Symbol.dispose](): void {
    this.close();
  }

  #open(): NativeRegion {
    if (this.#closed)
      throw memferryError('REGION_CLOSED', 'the region is closed', { facts: { id: this.id } });
    return this.native;
  }
}

function adoptWasm(memory: WasmMemory, make: (handle: NativeRegion, backing: Backing) => Region): Region {
  const { pageSize } = loadAddon();
  const view = new Uint8Array(memory.buffer);
  if (view.byteLength === 0) {
    // A view of nothing has no address to pin.
    throw memferryError('INVALID_ARGUMENT', 'the WebAssembly memory is empty: grow it by a page first');
  }
  checkLength(view.byteLength, pageSize);
  // V8 reserves room for the largest memory plus guards, so that growth never moves it.
  const reserved = Math.min(
    native(() => loadAddon().reservedBytes(view)),
    MAX_VIEW_BYTES,
  );
  const capacity = Math.max(view.byteLength, reserved - (reserved % pageSize));
  const handle = native(() => loadAddon().adopt([view], capacity, memory));
  return make(handle, {
    views: () => [new Uint8Array(memory.buffer)],
    mayMove: true,
    lengthBytes: () => memory.buffer.byteLength,
  });
}

function fixed(views: readonly Uint8Array[]): Backing {
  const length = views.reduce((sum, view) => sum + view.byteLength, 0);
  return { views: () => views, mayMove: true, lengthBytes: () => length };
}

/** Made when first asked for: buffers outside of V8's heap bring its garbage collector about. */
function own(handle: NativeRegion): Omit<Backing, 'lengthBytes'> {
  let views: Uint8Array[] | null = null;
  return {
    views: () => (views ??= native(() => handle.buffers()).map((buffer) => new Uint8Array(buffer))),
    mayMove: false,
  };
}

function isWasmMemory(value: unknown): value is WasmMemory {
  // Memories of another context (vm) are memories too, so ask for the tag, not for the constructor.
  return Object.prototype.toString.call(value) === '[object WebAssembly.Memory]';
}

function viewOf(memory: ArrayBufferLike | ArrayBufferView): Uint8Array {
  if (ArrayBuffer.isView(memory)) return new Uint8Array(memory.buffer, memory.byteOffset, memory.byteLength);
  if (memory instanceof ArrayBuffer || memory instanceof SharedArrayBuffer) return new Uint8Array(memory);
  throw memferryError(
    'INVALID_ARGUMENT',
    'a region can be made of a WebAssembly.Memory, an ArrayBuffer, a SharedArrayBuffer or a view of one',
  );
}

/** `maxByteLength` of a resizable ArrayBuffer or growable SharedArrayBuffer, else null. */
function growthLimit(buffer: ArrayBufferLike): number | null {
  const { resizable, growable, maxByteLength } = buffer as {
    resizable?: boolean;
    growable?: boolean;
    maxByteLength?: number;
  };
  return (resizable || growable) && maxByteLength !== undefined ? maxByteLength : null;
}

/** A growable SharedArrayBuffer is a page-aligned mapping of its own, where a plain one lies inside malloc's. */
function sharedView(lengthBytes: number): Uint8Array {
  const Growable = SharedArrayBuffer as unknown as new (
    length: number,
    options: { maxByteLength: number },
  ) => SharedArrayBuffer;
  try {
    return new Uint8Array(new Growable(lengthBytes, { maxByteLength: lengthBytes }));
  } catch (cause) {
    throw memferryError('NO_MEMORY', `no ${lengthBytes} bytes of shared memory to be had`, {
      cause,
      facts: { lengthBytes },
    });
  }
}

function checkLength(lengthBytes: number, pageSize: number): void {
  const valid = Number.isSafeInteger(lengthBytes) && lengthBytes > 0;
  if (valid && lengthBytes % pageSize === 0) return;
  const next = valid ? lengthBytes + pageSize - (lengthBytes % pageSize) : pageSize;
  throw memferryError(
    'INVALID_ARGUMENT',
    `a region's length is a positive multiple of the page size (${pageSize} bytes), not ${lengthBytes}; ` +
      `the next one is ${next}`,
    { facts: { lengthBytes, pageSize, nextBytes: next } },
  );
}
