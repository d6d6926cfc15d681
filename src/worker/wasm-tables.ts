/**
 * A table of functions as plain numbers, which mean the same at both sides: -1 is null, -2 - k the k-th host function
 * that was made into one of WebAssembly, instance * 2^32 + index a function of an instance, NaN a function of unknown
 * origin. Read as a whole once (a microsecond a slot, too long for a pause); then only what was written since.
 */
import type { FunctionOwner, TableRecord, WasmRegistry } from './wasm-registry.js';

/** See above. */
export type Reference = number;

const PER_INSTANCE = 2 ** 32;

export const NULL: Reference = -1;
export const isHost = (reference: Reference): boolean => reference <= -2;
export const hostOrdinal = (reference: Reference): number => -2 - reference;
export const instanceOf = (reference: Reference): number => Math.floor(reference / PER_INSTANCE);
export const indexOf = (reference: Reference): number => reference % PER_INSTANCE;

export function referenceTo(registry: WasmRegistry, value: unknown): Reference {
  if (value === null) return NULL;
  const owner: FunctionOwner | undefined = registry.owners.get(value as object);
  if (owner?.kind === 'instance') return owner.instance * PER_INSTANCE + owner.index;
  return owner?.kind === 'host' ? -2 - owner.ordinal : Number.NaN;
}

/** A function of an instance, or nothing: it means the same at both sides, and nothing is to be asked about it. */
const isPlain = (reference: Reference): boolean => reference >= NULL;
/** So are all of the first instance, and host functions. */
const hasFourBytes = (reference: Reference): boolean => (reference | 0) === reference;

/** In four bytes each where all entries allow it: a pause copies them several times, into memory that is new. */
export type References = Int32Array | Float64Array;

export class KnownTable {
  #entries: References;
  readonly #special = new Set<number>();

  constructor(length: number, read: (slot: number) => Reference) {
    this.#entries = new Int32Array(length);
    for (let slot = 0; slot < length; slot++) this.set(slot, read(slot));
  }

  /** Changes with `set`. */
  get entries(): References {
    return this.#entries;
  }

  /** Slots with a host function, or one of unknown origin: few, so that a pause need not look at all. Ascending. */
  get special(): number[] {
    return [...this.#special].sort((a, b) => a - b);
  }

  set(slot: number, reference: Reference): void {
    if (!hasFourBytes(reference) && this.#entries instanceof Int32Array) {
      this.#entries = new Float64Array(this.#entries);
    }
    this.#entries[slot] = reference;
    if (isPlain(reference)) this.#special.delete(slot);
    else this.#special.add(slot);
  }

  /** Slots where `wanted` has another entry than stands here, or a special one. Each once, the latter last. */
  *toSettle(wanted: References): Generator<number> {
    const here = this.#entries;
    const common = Math.min(wanted.length, here.length);
    const alike = here.BYTES_PER_ELEMENT === wanted.BYTES_PER_ELEMENT;
    // As bytes and many at once: a loop over all of them takes a millisecond of a pause.
    for (let start = 0; start < common; start += COMPARED_AT_ONCE) {
      const end = Math.min(common, start + COMPARED_AT_ONCE);
      if (alike && bytesOf(here, start, end).equals(bytesOf(wanted, start, end))) continue;
      for (let slot = start; slot < end; slot++) if (!Object.is(here[slot], wanted[slot])) yield slot;
    }
    for (let slot = common; slot < wanted.length; slot++) yield slot;
    for (const slot of this.special) if (slot < common && Object.is(here[slot], wanted[slot])) yield slot;
  }
}

const COMPARED_AT_ONCE = 512;

function bytesOf(entries: References, start: number, end: number): Buffer {
  const { buffer, byteOffset, BYTES_PER_ELEMENT } = entries;
  return Buffer.from(buffer, byteOffset + start * BYTES_PER_ELEMENT, (end - start) * BYTES_PER_ELEMENT);
}

/** What stands in a table of functions. It is the record's own, and changes with the next call. */
export function readTable(registry: WasmRegistry, record: TableRecord): KnownTable {
  const { table, written } = record;
  if (record.unseen || record.known?.entries.length !== table.length) record.known = null;
  if (record.known === null) {
    record.known = new KnownTable(table.length, (slot) => referenceTo(registry, table.get(slot)));
  } else {
    for (const slot of written) {
      if (slot < table.length) record.known.set(slot, referenceTo(registry, table.get(slot)));
    }
  }
  written.clear();
  return record.known;
}
