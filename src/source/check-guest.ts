/** What cannot move is found before anything of a migration begins: no connection, no tracking, no page. */
import type { Guest } from '../guest.js';
import { untilAborted } from '../protocol/bounded.js';

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
