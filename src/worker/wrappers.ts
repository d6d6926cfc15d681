/**
 * JavaScript objects around memory of WebAssembly: glue gives them a finalizer (`FinalizationRegistry`), which frees
 * what they stand for. Such an object cannot move, and a finalizer that runs at the wrong side of a migration frees
 * what it does not own. So registrations are counted: those that the guest made after it was built refuse a pause,
 * unless the guest says that it carries them; and of those that a destination made while it was built, none runs once
 * the source's memory has come. Installed before the guest's module is loaded; lives in the worker.
 */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

interface Entry {
  held: unknown;
  kind: string;
  /** Which memory it belongs to: the one before an arrival, or after it. */
  life: number;
  built: boolean;
}

export class Wrappers {
  readonly #live = new Set<Entry>();
  #life = 0;

  intercept(): void {
    const Native = globalThis.FinalizationRegistry;
    const live = this.#live;
    const life = (): number => this.#life;
    class Counted extends Native<Entry> {
      readonly #byToken = new WeakMap<WeakKey, Entry[]>();
      constructor(cleanup: (held: unknown) => void) {
        if (typeof cleanup !== 'function')
          throw new TypeError('FinalizationRegistry: cleanup must be callable');
        super((entry) => {
          live.delete(entry);
          if (entry.life === life()) cleanup(entry.held);
        });
      }
      override register(target: WeakKey, held: unknown, token?: WeakKey): void {
        const entry = { held, kind: kindOf(target), life: life(), built: false };
        super.register(target, entry, token);
        live.add(entry);
        if (token === undefined) return;
        const known = this.#byToken.get(token);
        if (known) known.push(entry);
        else this.#byToken.set(token, [entry]);
      }
      override unregister(token: WeakKey): boolean {
        for (const entry of this.#byToken.get(token) ?? []) live.delete(entry);
        this.#byToken.delete(token);
        return super.unregister(token);
      }
    }
    Object.defineProperty(Counted, 'name', { value: 'FinalizationRegistry' });
    Object.defineProperty(globalThis, 'FinalizationRegistry', {
      value: Counted,
      writable: true,
      configurable: true,
    });
  }

  /** What exists now is made alike at every host: the guest is built. */
  built(): void {
    for (const entry of this.#live) entry.built = true;
  }

  /** The memory under everything made so far is about to be another's. */
  forget(): void {
    this.#life++;
    this.#live.clear();
  }

  /** Those that are no part of what was built, by kind. */
  names(): string[] {
    const counts = new Map<string, number>();
    for (const { built, kind } of this.#live) if (!built) counts.set(kind, (counts.get(kind) ?? 0) + 1);
    return [...counts].map(([kind, count]) => {
      const many = count === 1 ? 'an object with a finalizer' : `${count} objects with finalizers`;
      return `${many} (${kind}) that JavaScript holds, made after the guest was built`;
    });
  }
}

function kindOf(target: WeakKey): string {
  if (typeof target === 'symbol') return 'symbol';
  const name: unknown = (target as { constructor?: { name?: unknown } }).constructor?.name;
  return typeof name === 'string' && name ? name.slice(0, 60) : typeof target;
}

let collect: (() => void) | null = null;

/** What is garbage already needs no refusal: its finalizer runs within a turn or two after this. */
export function collectGarbage(): void {
  if (collect === null) {
    setFlagsFromString('--expose-gc');
    collect = runInNewContext('gc') as () => void;
  }
  collect();
}
