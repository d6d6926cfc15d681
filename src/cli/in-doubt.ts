/**
 * A migration whose GRANT has no answer. The copy here is the only one that is certain, so a command keeps it and asks
 * on: the destination answers when the network is back.
 */
import { MemferryError, memferryError } from '../errors.js';
import type { Migration } from '../source/migrate.js';
import { complain, type Output } from './output.js';
import { interrupted } from './signals.js';

/**
 * What `outcome` gives; it is called again when the destination has said, late, that the guest is there. Rejects with
 * PEER_LOST when it has said that the guest never will be and was let run on here; with MIGRATION_IN_DOUBT when
 * interrupted before it says anything.
 */
export async function untilKnown<Report>(
  migration: Pick<Migration, 'resolve'>,
  outcome: () => Promise<Report>,
  output: Output,
  signal: AbortSignal,
): Promise<Report> {
  try {
    return await outcome();
  } catch (error) {
    if (!isInDoubt(error) || signal.aborted) throw error;
    tellDoubt(error, output);
    if ((await askOn(migration, error, signal)) === 'destination') return await outcome();
    throw memferryError('PEER_LOST', 'the destination did not take the guest, which was let run on here', {
      cause: error,
    });
  }
}

export function tellDoubt({ code, message }: MemferryError, output: Output): void {
  output.line({ type: 'in-doubt', message });
  complain(
    `memferry: ${code}: ${message}. It is asked until it answers: see to it, and to the network. ` +
      'Ctrl-C gives up what is here of the guest',
  );
}

/** Of a park, which asks on by itself. */
export function tellParkInDoubt(ticket: string, output: Output): void {
  const what = `the home server was granted the guest and has not answered; if it has it, ${ticket} claims it`;
  tellDoubt(memferryError('MIGRATION_IN_DOUBT', what), output);
}

async function askOn(
  migration: Pick<Migration, 'resolve'>,
  doubt: MemferryError,
  signal: AbortSignal,
): Promise<'source' | 'destination'> {
  const stopped = interrupted(signal).catch(() => Promise.reject(doubt));
  for (;;) {
    try {
      // Each time for as long as it took to be in doubt.
      return await Promise.race([migration.resolve({ askAgain: true }), stopped]);
    } catch (error) {
      if (!isInDoubt(error) || signal.aborted) throw error;
    }
  }
}

function isInDoubt(error: unknown): error is MemferryError {
  return error instanceof MemferryError && error.code === 'MIGRATION_IN_DOUBT';
}
