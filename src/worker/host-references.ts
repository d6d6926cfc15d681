/**
 * References from WebAssembly to values of the host: what stands in tables and globals of externref. Primitive values
 * move as they are. An object moves if both sides have it: because the guest registered it by name, or because
 * building the guest put it there, at every host into the same slot. Everything else is named and refused.
 */
import { createHash } from 'node:crypto';
import type { HostFunctions } from './host-functions.js';
import type { WasmRegistry } from './wasm-registry.js';

export type HostValue =
  | { kind: 'value'; value: undefined | boolean | number | string | bigint }
  /** By its number among those that stood there when the guest was built. */
  | { kind: 'built'; index: number }
  | { kind: 'registered'; name: string };

/** More objects than any glue keeps; beyond, they are not known as built. */
const MOST_BUILT = 65_536;
const LONGEST_STRING = 65_536;

export class HostReferences {
  #built: unknown[] = [];
  readonly #numbers = new Map<unknown, number>();

  /** The guest is built. Gives a digest of what it refers to: kinds and places, which are the same at every host. */
  built(registry: WasmRegistry): string {
    const hash = createHash('sha256');
    this.#built = [];
    this.#numbers.clear();
    for (const { value, where } of externrefs(registry)) {
      hash.update(`${where}: ${describe(value)}\n`);
      if (this.#numbers.has(value) || this.#built.length === MOST_BUILT) continue;
      if (isPrimitive(value)) continue;
      this.#numbers.set(value, this.#built.push(value) - 1);
    }
    return hash.digest('hex').slice(0, 16);
  }

  /** Null when it cannot move. */
  encode(value: unknown, names: HostFunctions): HostValue | null {
    if (isPrimitive(value)) return { kind: 'value', value };
    const name = typeof value === 'symbol' ? null : names.nameOf(value as object);
    if (name !== null) return { kind: 'registered', name };
    const index = this.#numbers.get(value);
    return index === undefined ? null : { kind: 'built', index };
  }

  /** Undefined when there is none here; the value comes from a peer. */
  decode(from: unknown, names: HostFunctions): { value: unknown } | undefined {
    const { kind, value, index, name } = Object(from) as Record<string, unknown>;
    if (kind === 'value') return isPrimitive(value) ? { value } : undefined;
    if (kind === 'registered') {
      const found = names.get(String(name));
      return found === undefined ? undefined : { value: found };
    }
    const number = Number(index);
    if (kind !== 'built' || !Number.isInteger(number) || number < 0 || number >= this.#built.length) return;
    return { value: this.#built[number] };
  }
}

function* externrefs(registry: WasmRegistry): Generator<{ value: unknown; where: string }> {
  for (const { name, type, global } of registry.globals) {
    if (type === 'externref' && global.value != null) yield { value: global.value, where: `global ${name}` };
  }
  for (const { name, type, table } of registry.tables) {
    if (type !== 'externref') continue;
    for (let slot = 0; slot < table.length; slot++) {
      const value = table.get(slot);
      if (value != null) yield { value, where: `table ${name}, slot ${slot}` };
    }
  }
}

function isPrimitive(value: unknown): value is undefined | boolean | number | string | bigint {
  if (typeof value === 'string') return value.length <= LONGEST_STRING;
  return value === undefined || ['boolean', 'number', 'bigint'].includes(typeof value);
}

/** For an error: what it is, never what it holds. */
export function describe(value: unknown): string {
  if (typeof value === 'function') return value.name ? `function "${value.name.slice(0, 60)}"` : 'a function';
  if (typeof value !== 'object' || value === null) return typeof value;
  const name: unknown = (value as { constructor?: { name?: unknown } }).constructor?.name;
  return typeof name === 'string' && name ? `object of class ${name.slice(0, 60)}` : 'object';
}
