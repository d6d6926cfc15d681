/**
 * `memferry park`: starts a guest from a module, lets one talk to it, and parks it in the VMD when told to. The ticket
 * that claims it again is written to a file that nobody else can read.
 */
import { rm } from 'node:fs/promises';
import type { Command } from 'commander';
import { describeEncodings, figure, mebibytes } from '../demo/table.js';
import { MemferryError } from '../errors.js';
import { checkParkOptions, type ParkReport, park } from '../source/park.js';
import { tellParkInDoubt } from './in-doubt.js';
import {
  addGuestFlags,
  addServerFlags,
  describeDedup,
  type GuestFlags,
  given,
  type ServerFlags,
  serverOptions,
  untilItLeaves,
} from './leaving-guest.js';
import { makeOutput } from './output.js';
import { byteCount } from './parse-values.js';
import { onInterrupt } from './signals.js';
import { newTicketFile, writeTicket } from './ticket.js';

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
  const { keepStaleCopy, staleBytes = 64 * 2 ** 30 } = flags;
  const options = {
    ...given({ keepStaleCopy: keepStaleCopy && { directory: keepStaleCopy, maxBytes: staleBytes } }),
    ...serverOptions(flags),
  };
  // Before there is a guest, which would be ended by a wrong word.
  await checkParkOptions(options);
  // First, so that a guest is never parked with nobody able to claim it.
  const file = await newTicketFile(flags.ticket);
  let report: ParkReport;
  let left = false;
  try {
    report = await untilItLeaves({ flags, leaves: 'is parked', output, signal }, (guest) => {
      guest.once('departed', () => {
        left = true;
      });
      return park(guest, {
        signal,
        ...options,
        // Before the commit: also a park that nobody heard the end of can be claimed.
        onTicket: (ticket) => writeTicket(file, flags.ticket, ticket),
        onInDoubt: () => tellParkInDoubt(flags.ticket, output),
      });
    });
  } catch (error) {
    const perhapsParked = error instanceof MemferryError && error.code === 'MIGRATION_IN_DOUBT';
    if (!left && !perhapsParked) await rm(flags.ticket);
    throw error;
  } finally {
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
