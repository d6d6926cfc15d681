/** Host functions and objects that a guest lets WebAssembly keep references to, by name. One for each worker. */
import { memferryError } from '../errors.js';

/** The destination is told all names before the first page, in 64 KiB with everything else. */
const MOST_NAMES = 256;

/**
 * Host functions and objects that WebAssembly may keep references to, by name: `GuestContext.hostFunctions`, one for
 * each worker.
 */
export class HostFunctions {
  readonly #byName = new Map<string, object>();
  readonly #names = new WeakMap<object, string>();
  readonly #asWasm = new Map<string, object>();

  /**
   * Gives the function, or the object, back, to be put into a table. A name has 1 to 128 characters and is taken once; there
   * are at most 256.
   * @throws INVALID_ARGUMENT
   */
  register<T extends object>(name: string, value: T): T {
    if (this.#byName.has(name)) {
      throw memferryError('INVALID_ARGUMENT', `a host function "${name}" is registered already`);
    }
    if (name.length === 0 || name.length > 128 || this.#byName.size === MOST_NAMES) {
      throw memferryError(
        'INVALID_ARGUMENT',
        `a host function has a name of 1 to 128 characters, and a guest has ${MOST_NAMES} of them at most`,
      );
    }
    this.#byName.set(name, value);
    this.#names.set(value, name);
    return value;
  }

  /** What was registered by that name. */
  get(name: string): object | undefined {
    return this.#byName.get(name);
  }

  /** What a table holds of it, as a function of that type: made once, however often the guest is given its state. */
  asWasm(name: string, signature: string, make: (host: object) => object): object | undefined {
    const host = this.#byName.get(name);
    if (typeof host !== 'function') return undefined;
    const key = `${signature} ${name}`;
    const found = this.#asWasm.get(key) ?? make(host);
    this.#asWasm.set(key, found);
    return found;
  }

  /** All of them, in the order of their registration. */
  get registered(): string[] {
    return [...this.#byName.keys()];
  }

  /** The name that it was registered by; null: by none. */
  nameOf(fn: object): string | null {
    return this.#names.get(fn) ?? null;
  }
}
