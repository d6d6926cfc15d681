/**
 * The part of a WebAssembly program that lies outside its memories: mutable globals and tables, to and from
 * plain data. References to functions become (instance, function index) pairs; a host function in a table is
 * known by the name under which the guest registered it, or by the order of its making. Runs in the worker.
 */
import { memferryError } from '../errors.js';
import type { HostFunctions } from './host-functions.js';
import { type FunctionOwner, WASM_PAGE_BYTES, type WasmRegistry } from './wasm-registry.js';
import { trampolineModule } from './wasm-rewrite.js';
import type { Signature } from './wasm-shape.js';
import { wasm } from './webassembly.js';

export interface HostReference {
  ordinal: number;
  /** Under which the guest registered it, or null. */
  registered: string | null;
  /** What to call it in an error. */
  label: string;
  signature: Signature;
}

/** A function reference as a number: -1 is null, -2 - k is `hosts[k]`, else instance * 2^32 + index. */
type Reference = number;
const PER_INSTANCE = 2 ** 32;

export interface WasmState {
  instances: string[];
  memoryBytes: number[];
  /** In the registry's order: number, bigint, or a reference. */
  globals: { name: string; type: string; value: number | bigint }[];
  tables: { name: string; entries: Float64Array }[];
  hosts: HostReference[];
}

/** Everything but the memories' content. Throws GUEST_UNMOVABLE with all that cannot move, not just the first. */
export function captureWasm(registry: WasmRegistry, hostFunctions: HostFunctions): WasmState {
  const unmovable = [...registry.unmovable];
  const hosts: HostReference[] = [];
  const numbers = new Map<FunctionOwner, number>();

  const reference = (value: unknown, where: string): Reference => {
    if (value === null) return -1;
    const owner = registry.owners.get(value as object);
    if (owner?.kind === 'instance') return owner.instance * PER_INSTANCE + owner.index;
    if (owner === undefined) {
      unmovable.push(`${where}: a function of unknown origin`);
      return -1;
    }
    let number = numbers.get(owner);
    if (number === undefined) {
      const host = owner.host?.deref();
      const registered = host ? hostFunctions.nameOf(host) : null;
      number =
        hosts.push({
          ordinal: owner.ordinal,
          registered,
          label: owner.name,
          signature: owner.signature,
        }) - 1;
      numbers.set(owner, number);
    }
    return -2 - number;
  };

  const globals = registry.globals.map(({ name, type, global }) => {
    const value: unknown = global.value;
    if (type === 'funcref') return { name, type, value: reference(value, `global ${name}`) };
    if (type === 'externref') {
      if (value !== null && value !== undefined)
        unmovable.push(`global ${name}: an externref to a host object`);
      return { name, type, value: value === null ? -1 : 0 };
    }
    return { name, type, value: value as number | bigint };
  });

  const tables = registry.tables.map(({ name, type, table }) => {
    const entries = new Float64Array(table.length);
    for (let slot = 0; slot < entries.length; slot++) {
      const value: unknown = table.get(slot);
      if (type === 'funcref') entries[slot] = reference(value, `table ${name}, slot ${slot}`);
      else if (value === null || value === undefined) entries[slot] = value === null ? -1 : 0;
      else unmovable.push(`table ${name}, slot ${slot}: an externref to a host object`);
    }
    return { name, entries };
  });

  if (unmovable.length > 0) throw unmovableError(unmovable);
  return {
    instances: registry.instances.map((instance) => instance.sha256),
    memoryBytes: registry.memories.map(({ memory }) => memory.buffer.byteLength),
    globals,
    tables,
    hosts,
  };
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
  const { instances, memoryBytes, globals, tables, hosts } = Object(state) as Partial<WasmState>;
  if (!Array.isArray(instances) || !Array.isArray(memoryBytes) || !Array.isArray(hosts))
    return 'its form is unknown';
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
    if (!(table.entries instanceof Float64Array)) return `table ${own?.name} has no entries`;
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
  const functions = functionsByNumber(registry);
  const hosts = state.hosts.map((host) => once(() => hostFunction(registry, host, hostFunctions)));
  const resolve = (reference: Reference, where: string): unknown => {
    if (reference === -1) return null;
    const found = reference < 0 ? hosts[-2 - reference]?.() : functions(reference);
    if (found === undefined) throw unmovableError([`${where}: a function that does not exist here`]);
    return found;
  };

  registry.globals.forEach(({ name, type, global }, i) => {
    const value = state.globals[i]?.value;
    if (type === 'externref') global.value = value === -1 ? null : undefined;
    else global.value = type === 'funcref' ? resolve(Number(value), `global ${name}`) : value;
  });
  registry.tables.forEach(({ name, type, table }, i) => {
    const entries = state.tables[i]?.entries ?? new Float64Array();
    if (entries.length > table.length) table.grow(entries.length - table.length);
    entries.forEach((entry, slot) => {
      const value =
        type === 'externref'
          ? entry === -1
            ? null
            : undefined
          : resolve(entry, `table ${name}, slot ${slot}`);
      // Glue mirrors tables in JavaScript: a slot that is right already stays untouched.
      if (table.get(slot) !== value) table.set(slot, value);
    });
  });
}

function once<T>(make: () => T): () => T {
  let made: { value: T } | null = null;
  return () => {
    made ??= { value: make() };
    return made.value;
  };
}

/** The reverse of `owners`: every function that a reference can name, by number. */
function functionsByNumber(registry: WasmRegistry): (reference: number) => unknown {
  return (reference) => {
    const instance = registry.functionsOf(Math.floor(reference / PER_INSTANCE));
    return instance?.get(reference % PER_INSTANCE);
  };
}

function hostFunction(registry: WasmRegistry, host: HostReference, hostFunctions: HostFunctions): unknown {
  const { ordinal, registered, label, signature } = Object(host) as HostReference;
  const wanted = JSON.stringify(signature);
  if (typeof registered === 'string') {
    const found = hostFunctions.get(registered);
    if (!found)
      throw unmovableError([`host function "${registered}", which is not registered at the destination`]);
    const module = new wasm.Module(trampolineModule(signature));
    return new wasm.Instance(module, { e: { f: found } }).exports.f;
  }
  const made = registry.trampolines[Number(ordinal)]?.deref();
  const owner = made ? registry.owners.get(made) : undefined;
  if (owner?.kind === 'host' && JSON.stringify(owner.signature) === wanted) return made;
  throw unmovableError([`host function ${String(label)} in a table, which is not registered by name`]);
}
