/**
 * `memferry park`: starts a guest from a module, lets one talk to it, and parks it in the VMD when told to. The ticket
 * that claims it again is written to a file that nobody else can read.
 */
import { writeFile } from 'node:fs/promises';
import { pathToFileURL } from 'node:url';
import type { Command } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { park } from '../source/park.js';
import { WorkerGuest } from '../worker/index.js';
import { addConnectionFlags, type ConnectionFlags, connectionOptions } from './connection-flags.js';
import { makeOutput } from './output.js';
import { byteCount, type NamedModule, namedModule, wholeNumber } from './parse-values.js';
import { follow, parseData, untilTold } from './send.js';
import { onInterrupt } from './signals.js';

interface ParkFlags extends ConnectionFlags {
  ticket: string;
  module: NamedModule;
  data?: unknown;
  via?: string[];
  discover?: string | boolean;
  replicas?: number;
  rack?: string;
  bandwidth?: number;
  afterMs?: number;
  json?: boolean;
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
    .requiredOption('--module <name=path>', 'the guest: a module that exports defineGuest(...)', namedModule)
    .option('--data <json>', 'what the guest finds in context.data', parseData)
    .option(
      '--via <host:port,...>',
      'VMD servers (`memferry stage`); repeatable',
      (text: string, former: string[] = []) => [...former, ...text.split(',').filter(Boolean)],
    )
    .option('--discover [group:port]', 'take servers that announce themselves')
    .option('--replicas <count>', 'on how many servers a page is kept', wholeNumber(1, 2))
    .option('--rack <name>', 'where this host stands; servers there are taken last')
    .option('--bandwidth <bytes/s>', 'limit, as 100M or 1Gi', byteCount)
    .option('--after-ms <ms>', 'park it by itself after this long', wholeNumber(0, 86_400_000))
    .option('--json', 'one JSON object a line, the last one the report');
  addConnectionFlags(command).action(parkGuest);
}

async function parkGuest(flags: ParkFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  const { name, path } = flags.module;
  // First, so that a guest is never parked with nobody able to claim it.
  await writeFile(flags.ticket, '', { mode: 0o600, flag: 'wx' });
  await using guest = await WorkerGuest.start({
    module: { name, url: pathToFileURL(path) },
    ...(flags.data === undefined ? {} : { data: flags.data }),
  });
  follow(guest, output);
  const lengthBytes = guest.regions.reduce((sum, { region }) => sum + region.refresh(), 0);
  const told = untilTold(guest, flags, output, signal);
  told.catch(() => {});
  output.say(`guest ${name} runs, ${mebibytes(lengthBytes)} MiB; a line asks it, an empty one parks it`);
  output.line({ type: 'started', guest: name, pid: process.pid, heapBytes: lengthBytes });
  await told;
  const given = Object.entries({
    via: flags.via,
    discover: flags.discover,
    replicas: flags.replicas,
    rack: flags.rack,
    bandwidth: flags.bandwidth,
  });
  const options = Object.fromEntries(given.filter(([, value]) => value !== undefined));
  const report = await park(guest, { signal, ...connectionOptions(flags), ...options });
  await writeFile(flags.ticket, `${JSON.stringify(report.ticket)}\n`, { mode: 0o600 });
  const { ticket, ...rest } = report;
  output.result(
    [
      `guest ${name} is parked; ${flags.ticket} claims it again, by \`memferry unpark\``,
      `  evicted in ${figure(report.evictionMs)} ms, ${mebibytes(report.bytesOnWire)} MiB on the wire`,
      `  ${report.intermediaries.map((each) => `${each.pages} pages at ${each.name}`).join(', ')}`,
    ].join('\n'),
    { type: 'report', image: ticket.image, home: ticket.home, ticket: flags.ticket, ...rest },
  );
}
