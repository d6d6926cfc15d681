/** Exports that the rewrite adds to a module, and what the program sees of its instances: its own. */
import { EXPORT_PREFIX } from './wasm-rewrite.js';
import { type WasmExports, type WasmInstance, type WasmNamespace, wasm } from './webassembly.js';

/** The exports as the module's author wrote them: glue that walks over them must not meet ours. */
export function withoutOurs(all: WasmExports): WasmExports {
  const own = Object.create(null) as WasmExports;
  for (const [name, value] of Object.entries(all)) if (!name.startsWith(EXPORT_PREFIX)) own[name] = value;
  return Object.freeze(own);
}

export function hideOurs(instance: WasmInstance): WasmInstance {
  Object.defineProperty(instance, 'exports', { value: withoutOurs(instance.exports), enumerable: true });
  return instance;
}

/** `WebAssembly.Module` with the static function that lists exports. */
export function ownExports(exports: WasmNamespace['Module']['exports']): WasmNamespace['Module']['exports'] {
  return (module) => exports(module).filter((entry) => !entry.name.startsWith(EXPORT_PREFIX));
}

/**
 * In a thread that the program started: modules come there compiled, and rewritten, from the guest's worker. Nothing is
 * tracked.
 */
export function hideOurExports(): void {
  const { Instance, instantiate, Module } = wasm;
  const tracing = new Proxy(Instance, {
    construct: (target, args: unknown[], newTarget): object =>
      hideOurs(Reflect.construct(target, args, newTarget === tracing ? target : newTarget) as WasmInstance),
  });
  const replaced: Record<string, unknown> = {
    Instance: tracing,
    instantiate: async (source: unknown, ...rest: unknown[]): Promise<unknown> => {
      const made = await instantiate(source, ...rest);
      // A module gives the instance itself, bytes give both.
      if (source instanceof Module) return hideOurs(made as WasmInstance);
      hideOurs((made as { instance: WasmInstance }).instance);
      return made;
    },
  };
  for (const [name, value] of Object.entries(replaced)) {
    Object.defineProperty(wasm, name, { value, writable: true, configurable: true });
  }
  Object.defineProperty(Module, 'exports', {
    value: ownExports(Module.exports.bind(Module)),
    writable: true,
    configurable: true,
  });
}
