/** What cannot move is found before anything of a migration begins: no connection, no tracking, no page. */
import { requireHere } from '../departed.js';
import { memferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import { untilAborted } from '../protocol/bounded.js';
import { checkIdentity } from './guest-identity.js';

/**
 * What a caller may get wrong, told before anything begins.
 * @throws INVALID_ARGUMENT, REGION_CLOSED; GUEST_BUSY for a guest that has left
 */
export function requireGuest(guest: Guest): void {
  const refused = (message: string) => memferryError('INVALID_ARGUMENT', message);
  if (typeof Object(guest).pause !== 'function' || typeof guest.unpause !== 'function') {
    throw refused('a guest has pause() and unpause()');
  }
  checkIdentity(guest);
  const { name, regions } = guest;
  for (const { name: called, region } of regions) {
    // Of any copy of this library.
    if (typeof Object(region).native?.claim !== 'function') {
      throw refused(
        `'${called}' of guest '${name}' is no Region: make one by Region.allocate, adopt or attach`,
      );
    }
    if (region.closed) {
      throw memferryError('REGION_CLOSED', `region '${called}' of guest '${name}' is closed`, {
        facts: { region: called },
      });
    }
  }
  requireHere(guest);
}

/** Rejects with the guest's own error, or as aborted. A guest that cannot tell is taken at its word later, by `pause`. */
export async function checkGuest(guest: Guest, signal: AbortSignal, rounds = true): Promise<void> {
  if (guest.check) await untilAborted(guest.check({ signal, rounds }), signal);
}

/** Whether all that it writes while it runs can be known: a guest may move in a mode without rounds, and have none. */
export async function mayHaveRounds(guest: Guest, signal: AbortSignal): Promise<boolean> {
  try {
    await checkGuest(guest, signal);
    return true;
  } catch (error) {
    if (Object(error).code === 'GUEST_UNMOVABLE') return false;
    throw error;
  }
}
