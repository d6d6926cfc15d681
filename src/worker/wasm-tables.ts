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

/** What stands in a table of functions. The array is the record's own, and changes with the next call. */
export function readTable(registry: WasmRegistry, record: TableRecord): Float64Array {
  const { table, known } = record;
  if (known === null || record.unseen || known.length !== table.length) {
    const entries = new Float64Array(table.length);
    for (let slot = 0; slot < entries.length; slot++) entries[slot] = referenceTo(registry, table.get(slot));
    record.known = entries;
  } else {
    for (const slot of record.written) {
      if (slot < known.length) known[slot] = referenceTo(registry, table.get(slot));
    }
  }
  record.written.clear();
  return record.known as Float64Array;
}
