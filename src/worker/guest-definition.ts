/** Checks of what a guest's module gives: it is code of the host's own, whose mistakes deserve a clear word. */
import { memferryError } from '../errors.js';
import type { GuestDefinition } from './define-guest.js';

export type AnyDefinition = GuestDefinition<unknown, unknown, unknown, unknown>;

/** What `layout` may give: it goes to the destination within 64 KiB. */
const MOST_LAYOUT = 64;

export function checkDefinition(value: unknown, url: string): AnyDefinition {
  const { create, handle } = Object(value) as Partial<AnyDefinition>;
  if (typeof create === 'function' && typeof handle === 'function') return value as AnyDefinition;
  throw memferryError(
    'INVALID_ARGUMENT',
    `${url} has no default export made by defineGuest({ create, handle })`,
  );
}

export function layoutOf(definition: AnyDefinition, app: unknown): string[] {
  const layout: unknown = definition.layout?.(app) ?? [];
  const fits = (value: unknown): boolean => typeof value === 'string' && value.length <= 256;
  if (Array.isArray(layout) && layout.length <= MOST_LAYOUT && layout.every(fits)) return layout as string[];
  throw memferryError(
    'INVALID_ARGUMENT',
    `layout() gives at most ${MOST_LAYOUT} strings of at most 256 characters`,
  );
}
