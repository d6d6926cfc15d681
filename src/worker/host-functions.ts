/** Host functions that a guest lets WebAssembly keep references to, by name. One for each worker. */
import { memferryError } from '../errors.js';

export class HostFunctions {
  readonly #byName = new Map<string, (...args: never[]) => unknown>();
  readonly #names = new WeakMap<object, string>();

  /** Gives the function back, to be put into a table. A name is taken once. */
  register<T extends (...args: never[]) => unknown>(name: string, fn: T): T {
    if (this.#byName.has(name)) {
      throw memferryError('INVALID_ARGUMENT', `a host function "${name}" is registered already`);
    }
    this.#byName.set(name, fn);
    this.#names.set(fn, name);
    return fn;
  }

  get(name: string): ((...args: never[]) => unknown) | undefined {
    return this.#byName.get(name);
  }

  nameOf(fn: object): string | null {
    return this.#names.get(fn) ?? null;
  }
}
