/**
 * `memferry park`: starts a guest from a module, lets one talk to it, and parks it in the VMD when told to. The ticket
 * that claims it again is written to a file that nobody else can read.
 */
import { rm } from 'node:fs/promises';
import type { Command } from 'commander';
import { describeEncodings, figure, mebibytes } from '../demo/table.js';
import { MemferryError, memferryError } from '../errors.js';
import { type ParkReport, park } from '../source/park.js';
import { tellDoubt } from './in-doubt.js';
import {
  addGuestFlags,
  addServerFlags,
  describeDedup,
  type GuestFlags,
  given,
  type ServerFlags,
  serverOptions,
  startGuest,
} from './leaving-guest.js';
import { makeOutput, type Output, reportError } from './output.js';
import { byteCount } from './parse-values.js';
import { interrupted, onInterrupt } from './signals.js';
import { newTicketFile, writeTicket } from './ticket.js';

/** A home server that was to take the guest and does not answer: told after this long, and asked on. */
const inDoubtAfterMs = 30_000;
const askedForMs = 7 * 24 * 3600 * 1000;

interface ParkFlags extends GuestFlags, ServerFlags {
  ticket: string;
  keepStaleCopy?: string;
  staleBytes?: number;
}

export function addPark(program: Command): void {
  const command = program
    .command('park')
    .description(
      'start a guest from a module and park it in the VMD: at an empty line, the end of input, or SIGUSR1',
    )
    .requiredOption(
      '--ticket <file>',
      'where to write what claims it again; made with mode 0600, never overwritten',
    )
    .option(
      '--keep-stale-copy <directory>',
      'keep what the guest was when it left, for `unpark --base` on this host',
    )
    .option('--stale-bytes <bytes>', 'keep no larger guest (default 64Gi)', byteCount);
  addServerFlags(addGuestFlags(command)).action(parkGuest);
}

async function parkGuest(flags: ParkFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  // First, so that a guest is never parked with nobody able to claim it.
  const file = await newTicketFile(flags.ticket);
  let report: ParkReport;
  let left = false;
  let unanswered: NodeJS.Timeout | undefined;
  try {
    await using guest = await startGuest(flags, 'is parked', output, signal);
    guest.once('departed', () => {
      left = true;
    });
    const { keepStaleCopy, staleBytes = 64 * 2 ** 30 } = flags;
    report = await park(guest, {
      signal,
      ...given({ keepStaleCopy: keepStaleCopy && { directory: keepStaleCopy, maxBytes: staleBytes } }),
      ...serverOptions(flags),
      inDoubtTimeoutMs: askedForMs,
      // Before the commit: also a park that nobody heard the end of can be claimed.
      onTicket: async (ticket) => {
        // By then it was granted the guest, or the park has failed.
        unanswered = setTimeout(() => {
          if (!left) waitInDoubt(flags.ticket, output, signal, () => left);
        }, inDoubtAfterMs);
        await writeTicket(file, flags.ticket, ticket);
      },
    });
  } catch (error) {
    const perhapsParked = error instanceof MemferryError && error.code === 'MIGRATION_IN_DOUBT';
    if (!left && !perhapsParked) await rm(flags.ticket);
    throw error;
  } finally {
    clearTimeout(unanswered);
    await file.close();
  }
  const { ticket, ...rest } = report;
  output.result(
    [
      `guest ${report.guest} is parked; ${flags.ticket} claims it again, by \`memferry unpark\``,
      `  evicted in ${figure(report.evictionMs)} ms, ${mebibytes(report.bytesOnWire)} MiB on the wire`,
      ...describeEncodings(report),
      ...describeDedup(report.dedup),
      `  ${report.intermediaries.map((each) => `${each.pages} pages at ${each.name}`).join(', ')}`,
    ].join('\n'),
    { type: 'report', image: ticket.image, home: ticket.home, ticket: flags.ticket, ...rest },
  );
}

/** Interrupted meanwhile the process ends at once: nothing else ends what waits for the server's answer. */
function waitInDoubt(ticket: string, output: Output, signal: AbortSignal, answered: () => boolean): void {
  const doubt = memferryError(
    'MIGRATION_IN_DOUBT',
    `the home server was granted the guest and has not answered; if it has it, ${ticket} claims it`,
  );
  tellDoubt(doubt, output);
  interrupted(signal).catch(() => {
    if (!answered()) process.exit(reportError(doubt, false));
  });
}
