/**
 * The part of a WebAssembly program that lies outside its memories: mutable globals and tables, to and from
 * plain data. References to functions become (instance, function index) pairs; a host function in a table is
 * known by the name under which the guest registered it, or by the order of its making. Runs in the worker.
 */
import { memferryError } from '../errors.js';
import type { HostFunctions } from './host-functions.js';
import { describe, type HostValue } from './host-references.js';
import { WASM_PAGE_BYTES, type WasmRegistry } from './wasm-registry.js';
import { trampolineModule } from './wasm-rewrite.js';
import { parseSignature } from './wasm-shape.js';
import {
  hostOrdinal,
  indexOf,
  instanceOf,
  isHost,
  NULL,
  type References,
  type Reference,
  readTable,
  referenceTo,
} from './wasm-tables.js';
import { wasm } from './webassembly.js';

export interface HostReference {
  ordinal: number;
  /** Under which the guest registered it, or null. */
  registered: string | null;
  /** What to call it in an error. */
  label: string;
  /** As `signatureText` has it: a text is quick to carry, and there are hundreds. */
  signature: string;
}

export interface WasmState {
  instances: string[];
  memoryBytes: number[];
  /** In the registry's order: number, bigint, or a reference; for an externref -1 is null, else `values[n]`. */
  globals: { name: string; type: string; value: number | bigint }[];
  tables: { name: string; entries: References }[];
  /** The host functions that tables and globals refer to. */
  hosts: HostReference[];
  /** The host values that externrefs are. */
  values: HostValue[];
}

/** Host functions up to this number were made when the guest was built, and so at every host. */
export interface Built {
  functions: number;
}

/** Everything but the memories' content. Throws GUEST_UNMOVABLE with all that cannot move, not just the first. */
export function captureWasm(registry: WasmRegistry, hostFunctions: HostFunctions, built: Built): WasmState {
  const unmovable = [...registry.unmovable];
  const hosts = new Map<number, HostReference>();
  const values: HostValue[] = [];

  const check = (reference: Reference, where: string): Reference => {
    if (Number.isNaN(reference)) unmovable.push(`${where}: a function of unknown origin`);
    else if (isHost(reference)) {
      const host = hosts.get(reference) ?? hostReference(registry, hostFunctions, hostOrdinal(reference));
      if (host === null || (host.registered === null && host.ordinal >= built.functions)) {
        unmovable.push(`${where}: the host function ${host?.label ?? ''} that is not registered by name`);
      } else hosts.set(reference, host);
    }
    return reference;
  };
  const external = (value: unknown, where: string): number => {
    if (value === null) return -1;
    const encoded = registry.hostReferences.encode(value, hostFunctions);
    if (encoded === null) unmovable.push(`${where}: an externref to a host object (${describe(value)})`);
    return encoded === null ? -1 : values.push(encoded) - 1;
  };

  const globals = registry.globals.map(({ name, type, global }) => {
    const value: unknown = global.value;
    const where = `global ${name}`;
    if (type === 'funcref') return { name, type, value: check(referenceTo(registry, value), where) };
    if (type === 'externref') return { name, type, value: external(value, where) };
    return { name, type, value: value as number | bigint };
  });

  const tables = registry.tables.map((record) => {
    const { name, type, table } = record;
    if (type === 'funcref') {
      const known = readTable(registry, record);
      for (const slot of known.special) {
        check(known.entries[slot] as number, `table ${name}, slot ${slot}`);
      }
      return { name, entries: known.entries };
    }
    const entries = Float64Array.from({ length: table.length }, (_, slot) =>
      external(table.get(slot), `table ${name}, slot ${slot}`),
    );
    return { name, entries };
  });

  if (unmovable.length > 0) throw unmovableError(unmovable);
  return {
    instances: registry.instances.map((instance) => instance.sha256),
    memoryBytes: registry.memories.map(({ memory }) => memory.buffer.byteLength),
    globals,
    tables,
    hosts: [...hosts.values()],
    values,
  };
}

function hostReference(
  registry: WasmRegistry,
  hostFunctions: HostFunctions,
  ordinal: number,
): HostReference | null {
  const made = registry.trampolines[ordinal]?.deref();
  const owner = made ? registry.owners.get(made) : undefined;
  if (owner?.kind !== 'host') return null;
  const host = owner.host?.deref();
  const registered = host ? hostFunctions.nameOf(host) : null;
  return { ordinal, registered, label: owner.name, signature: owner.signature };
}

export function unmovableError(names: string[]): Error {
  const shown = names.slice(0, 20);
  const more = names.length > shown.length ? ` and ${names.length - shown.length} more` : '';
  return memferryError('GUEST_UNMOVABLE', `the guest holds what cannot move: ${shown.join('; ')}${more}`, {
    facts: { names: shown },
  });
}

/** Why the state does not fit what was set up here, or null. The state comes from a peer: every field is checked. */
export function misfit(registry: WasmRegistry, state: unknown): string | null {
  const { instances, memoryBytes, globals, tables, hosts, values } = Object(state) as Partial<WasmState>;
  if (!Array.isArray(instances) || !Array.isArray(memoryBytes) || !Array.isArray(hosts))
    return 'its form is unknown';
  if (!Array.isArray(values)) return 'its form is unknown';
  if (!Array.isArray(globals) || !Array.isArray(tables)) return 'its form is unknown';
  const here = registry.instances.map((instance) => instance.sha256);
  if (here.length !== instances.length || here.some((sha256, i) => sha256 !== instances[i])) {
    return `it has ${instances.length} WebAssembly instances that are not the ${here.length} set up here`;
  }
  if (memoryBytes.length !== registry.memories.length) {
    return `it has ${memoryBytes.length} memories, ${registry.memories.length} were set up here`;
  }
  for (const [i, { memory }] of registry.memories.entries()) {
    if (memory.buffer.byteLength < Number(memoryBytes[i])) return `memory ${i} is shorter here`;
    if (Number(memoryBytes[i]) % WASM_PAGE_BYTES !== 0) return `memory ${i} has an impossible length`;
  }
  if (globals.length !== registry.globals.length) return 'its globals are others';
  for (const [i, global] of globals.entries()) {
    const own = registry.globals[i];
    if (own?.name !== Object(global).name || own?.type !== Object(global).type)
      return `global ${i} is another`;
    const wanted = own?.type === 'i64' ? 'bigint' : 'number';
    if (typeof global.value !== wanted) return `global ${own?.name} has no value of its type`;
  }
  if (tables.length !== registry.tables.length) return 'its tables are others';
  for (const [i, table] of tables.entries()) {
    const own = registry.tables[i];
    if (own?.name !== Object(table).name) return `table ${i} is another`;
    if (!(table.entries instanceof Float64Array || table.entries instanceof Int32Array))
      return `table ${own?.name} has no entries`;
    if (own && own.table.length > table.entries.length) return `table ${own.name} is longer here`;
  }
  return null;
}

/** Sets globals and tables as the state has them. Throws GUEST_UNMOVABLE; the half-set instances are then useless. */
export function restoreWasm(registry: WasmRegistry, state: WasmState, hostFunctions: HostFunctions): void {
  const reason = misfit(registry, state);
  if (reason !== null) {
    throw memferryError('GUEST_UNMOVABLE', `the arriving WebAssembly state does not fit: ${reason}`, {
      facts: { names: [reason] },
    });
  }
  const hosts = new Map(
    state.hosts.map((host) => [
      Number(Object(host).ordinal),
      { host, make: once(() => hostFunction(registry, host, hostFunctions)) },
    ]),
  );
  const resolve = (reference: Reference, where: string): unknown => {
    if (reference === NULL) return null;
    const found = isHost(reference)
      ? hosts.get(hostOrdinal(reference))?.make()
      : registry.functionsOf(instanceOf(reference))?.get(indexOf(reference));
    if (found === undefined) throw unmovableError([`${where}: a function that does not exist here`]);
    return found;
  };
  const external = (number: number, where: string): unknown => {
    if (number === -1) return null;
    const found = registry.hostReferences.decode(state.values[number], hostFunctions);
    if (found === undefined) throw unmovableError([`${where}: a host object that does not exist here`]);
    return found.value;
  };
  /** The same number means the same host function, unless it was registered: then its name counts. */
  const same = (reference: Reference): boolean => hosts.get(hostOrdinal(reference))?.host.registered === null;

  registry.globals.forEach(({ name, type, global }, i) => {
    const value = state.globals[i]?.value;
    const where = `global ${name}`;
    if (type === 'externref') global.value = external(Number(value), where);
    else global.value = type === 'funcref' ? resolve(Number(value), where) : value;
  });
  registry.tables.forEach((record, i) => {
    const { name, type, table } = record;
    const entries = state.tables[i]?.entries ?? new Int32Array();
    const here = type === 'funcref' ? readTable(registry, record) : null;
    if (entries.length > table.length) table.grow(entries.length - table.length);
    // Glue mirrors tables in JavaScript: a slot that is right already stays untouched.
    for (const slot of here ? here.toSettle(entries) : entries.keys()) {
      const entry = entries[slot] as number;
      if (here && entry === here.entries[slot] && same(entry)) continue;
      const where = `table ${name}, slot ${slot}`;
      const value = here ? resolve(entry, where) : external(entry, where);
      if (here || table.get(slot) !== value) table.set(slot, value);
    }
  });
}

function once<T>(make: () => T): () => T {
  let made: { value: T } | null = null;
  return () => {
    made ??= { value: make() };
    return made.value;
  };
}

function hostFunction(registry: WasmRegistry, host: HostReference, hostFunctions: HostFunctions): unknown {
  const { ordinal, registered, label, signature } = Object(host) as HostReference;
  if (typeof registered === 'string') {
    const type = String(signature);
    const found = hostFunctions.asWasm(registered, type, (f) => {
      const module = new wasm.Module(trampolineModule(parseSignature(type)));
      return new wasm.Instance(module, { e: { f } }).exports.f as object;
    });
    if (found) return found;
    throw unmovableError([`host function "${registered}", which is not registered at the destination`]);
  }
  const made = registry.trampolines[Number(ordinal)]?.deref();
  const owner = made ? registry.owners.get(made) : undefined;
  if (owner?.kind === 'host' && owner.signature === signature) return made;
  throw unmovableError([`host function ${String(label)} in a table, which is not registered by name`]);
}
