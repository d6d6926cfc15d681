/** The shape of options that have no schema. Pure. */
import { memferryError } from './errors.js';
import type { Region } from './region.js';

/**
 * That they are an object, with no other keys than these: a misspelt option would be one that is not set.
 * @throws INVALID_ARGUMENT
 */
export function checkOptions(options: unknown, what: string, keys: readonly string[]): void {
  if (typeof options !== 'object' || options === null || Array.isArray(options)) {
    throw memferryError('INVALID_ARGUMENT', `${what}: expected an object with ${keys.join(', ')}`);
  }
  const unknown = Object.keys(options).filter((key) => !keys.includes(key));
  if (unknown.length === 0) return;
  throw memferryError(
    'INVALID_ARGUMENT',
    `${what}: unknown option '${unknown.join("', '")}'; there are ${keys.join(', ')}`,
  );
}

/**
 * That what is given is called: found where it is given, not when there is something to tell.
 * @throws INVALID_ARGUMENT
 */
export function checkCallbacks(what: string, callbacks: Readonly<Record<string, unknown>>): void {
  for (const [name, value] of Object.entries(callbacks)) {
    if (value === undefined || typeof value === 'function') continue;
    throw memferryError('INVALID_ARGUMENT', `${what}.${name}: must be a function`);
  }
}

/** Of any copy of this library. @throws INVALID_ARGUMENT */
export function checkRegion(region: unknown, what: string): asserts region is Region {
  const { native } = Object(region) as { native?: unknown };
  if (typeof (Object(native) as { claim?: unknown }).claim === 'function') return;
  throw memferryError('INVALID_ARGUMENT', `${what}: no Region; Region.allocate, adopt or attach makes one`);
}
