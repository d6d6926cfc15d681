/**
 * An arrival that a command ends with. Ending it loses every page that is still on its way, so a loss is told at once, and
 * the command stays until no other page comes.
 */
import type { Arrival } from '../destination/listen.js';
import { MemferryError } from '../errors.js';
import type { ArrivalReport } from '../report.js';
import type { Output } from './output.js';

/** Runs of lost pages in one line. */
const mostRuns = 1000;

/**
 * Gives the report. Rejects with PAGES_LOST once `rest` has settled (by default: no page comes any more), or `stopped`
 * has; with everything else at once, as with what `stopped` rejects with.
 */
export async function reportOrRest(
  arriving: Pick<Arrival, 'offer' | 'complete' | 'restHere'>,
  output: Output,
  stopped: Promise<never>,
  rest: Promise<unknown> = arriving.restHere,
): Promise<ArrivalReport> {
  try {
    return await Promise.race([arriving.complete, stopped]);
  } catch (error) {
    if (error instanceof MemferryError && error.code === 'PAGES_LOST') {
      tellLoss(arriving.offer.name, error, output);
      await Promise.race([rest, stopped]).catch(() => {});
    }
    throw error;
  }
}

function tellLoss(guest: string, { message, facts }: MemferryError, output: Output): void {
  const { pages, runs } = facts as { pages?: number; runs?: unknown[] };
  output.say(`${message}; what is not lost still comes`);
  output.line({ type: 'lost', guest, pages, runs: runs?.slice(0, mostRuns), message });
}
