/**
 * Which guests have left this process, or may have: nobody here pauses, keeps or moves one again, or there would be two of
 * it. By their memory, since each call may bring another object for the same guest; with the name, since memory that a
 * guest has left may be used for another one. JavaScript thread.
 */
import { memferryError } from './errors.js';
import type { Guest } from './guest.js';
import type { Region } from './region.js';

type Held = Pick<Guest, 'name' | 'regions'>;

const departed = new WeakMap<object, Set<string>>();

const memoryOf = (guest: Held): object[] =>
  guest.regions.length > 0 ? guest.regions.map(({ region }) => region) : [guest];

/** It is the destination's, or may be, as far as this side knows. */
export function markDeparted(guest: Held): void {
  for (const memory of memoryOf(guest)) {
    departed.set(memory, (departed.get(memory) ?? new Set()).add(guest.name));
  }
}

/** It has never left after all. */
export function markHere(guest: Held): void {
  for (const memory of memoryOf(guest)) departed.get(memory)?.delete(guest.name);
}

/** A guest that came into this memory runs here: perhaps the one that had left it. */
export function markArrived(regions: readonly Region[]): void {
  for (const region of regions) departed.delete(region);
}

export function isHere(guest: Held): boolean {
  return memoryOf(guest).every((memory) => !departed.get(memory)?.has(guest.name));
}

/** @throws GUEST_BUSY for a guest that has left, or may have */
export function requireHere(guest: Held): void {
  if (isHere(guest)) return;
  throw memferryError(
    'GUEST_BUSY',
    `guest '${guest.name}' has left, or may have: it is not this side's to move or keep again`,
    { facts: { names: ['departed'] } },
  );
}
