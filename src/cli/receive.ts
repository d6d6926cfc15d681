/**
 * `memferry receive`: waits for guests, runs only the modules it was told of, and lets one talk to the guest
 * that arrived last, line by line.
 */
import type { Command } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { type Arrival, listen } from '../destination/listen.js';
import { memferryError } from '../errors.js';
import { parseAddress } from '../options.js';
import { deferred } from '../protocol/deferred.js';
import { rehearse } from '../rehearse.js';
import type { ArrivalReport } from '../report.js';
import { type WorkerGuest, workerGuests } from '../worker/index.js';
import { reportOrRest } from './await-rest.js';
import { addPeerFlags, type PeerFlags, peerOptions } from './connection-flags.js';
import { GuestConsole, sayMessages } from './guest-console.js';
import { dedupOption, given } from './leaving-guest.js';
import { makeOutput, type Output } from './output.js';
import {
  byteCount,
  byteRate,
  type NamedModule,
  namedModules,
  positiveNumber,
  readableModules,
} from './parse-values.js';
import { replayLines } from './replay-lines.js';
import { interrupted, onInterrupt } from './signals.js';
import { ticketFrom } from './ticket.js';

interface ReceiveFlags extends PeerFlags {
  listen: string;
  module: NamedModule[];
  maxBytes?: number;
  bandwidth?: number;
  gatherLimit?: number;
  dedup?: boolean;
  dedupDomain?: string;
  dedupSecretFile?: string;
  share?: string;
  base?: string;
  baseForAny?: boolean;
  replayMs?: number;
  json?: boolean;
  once?: boolean;
}

/** Of a base that is no directory. */
const vmd = 'vmd:';

export function addReceive(program: Command): void {
  const command = program
    .command('receive')
    .description('wait for guests and run them')
    .requiredOption('--listen <host:port>', 'where to wait; port 0 takes any and says which')
    .requiredOption(
      '--module <name=path>',
      'a module that may be run here, by its name (repeatable)',
      namedModules,
    )
    .option('--max-bytes <bytes>', 'memory that all guests together may take', byteCount)
    .option('--bandwidth <bytes/s>', 'taken from sources at most, as 100M or 1Gi', byteRate)
    .option(
      '--gather-limit <bytes/s>',
      'scatter modes: fetched ahead of the guest from VMD servers at most',
      byteRate,
    )
    .option('--dedup', 'pages that a guest has several times come once')
    .option(
      '--dedup-domain <name>',
      'pages that are here already for guests of this domain do not come again',
    )
    .option('--dedup-secret-file <path>', "the domain's own secret, mode 0600; else the hosts' shared one")
    .option('--share <file>', "the host's page share too, or 'auto' for the domain's (see memferry share)")
    .option(
      '--base <directory | vmd:ticket>',
      'guests start from what was kept of them there, and logs are replayed on it; or from a guest that is parked, by ' +
        'the file that `memferry park` wrote',
    )
    .option(
      '--base-for-any',
      'also for guests of that name and module that were started anew: any host with the secret can read the base then',
    )
    .option(
      '--replay-ms <ms>',
      'how long a replay takes, where that is known beforehand; once it runs its pace counts',
      positiveNumber,
    )
    .option('--once', 'end with the first migration, and its guest with it')
    .option('--json', 'one JSON object a line');
  addPeerFlags(command).action(receive);
}

async function receive(flags: ReceiveFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const guests = new Set<WorkerGuest>();
  let latest: WorkerGuest | null = null;
  const ended = deferred<void>();
  const modules = await readableModules(flags.module);
  const parked = flags.base?.startsWith(vmd) ? await ticketFrom(flags.base.slice(vmd.length)) : null;
  const anySource = flags.baseForAny ?? false;
  const listening = await listen({
    ...parseAddress(flags.listen),
    ...peerOptions(flags),
    ...(flags.maxBytes === undefined ? {} : { maxBytes: flags.maxBytes }),
    ...(flags.bandwidth === undefined ? {} : { bandwidth: flags.bandwidth }),
    ...(flags.gatherLimit === undefined ? {} : { gatherLimit: flags.gatherLimit }),
    ...(parked ? { base: { parked, anySource } } : {}),
    ...given({ dedup: dedupOption(flags), share: flags.share }),
    signal: interruption.signal,
    accept: workerGuests({
      modules,
      base:
        flags.base === undefined || parked
          ? undefined
          : {
              directory: flags.base,
              anySource,
              replay: replayLines,
              ...(flags.replayMs === undefined ? {} : { replayMs: flags.replayMs }),
            },
      onGuest: (guest) => {
        guests.add(guest);
        latest = guest;
        guest.once('ended', () => ended.resolve());
        follow(guest, output);
      },
    }),
  });
  await rehearse();
  output.say(`listening on ${listening.host}:${listening.port}; a line asks the guest that came last`);
  output.line({ type: 'listening', host: listening.host, port: listening.port });
  const typed = new GuestConsole({ input: process.stdin, output, guest: () => latest });
  const stop = () => void listening.close();
  interruption.signal.addEventListener('abort', stop, { once: true });
  try {
    for await (const arrival of listening) {
      if (flags.once) {
        const rest = Promise.race([arrival.restHere, ended.promise]);
        const stopped = interrupted(interruption.signal);
        await account(arrival, output, reportOrRest(arrival, output, stopped, rest));
        return;
      }
      account(arrival, output, arrival.complete).catch((error: Error & { code?: string }) => {
        output.say(`failed: ${error.code ?? 'ERROR'}: ${error.message}`);
        output.line({ type: 'failed', id: arrival.id, code: error.code ?? 'ERROR', message: error.message });
      });
    }
    if (flags.once) throw memferryError('CANCELLED', 'interrupted');
  } finally {
    typed.close();
    process.stdin.destroy();
    await listening.close();
    await Promise.all([...guests].map((guest) => guest.terminate()));
  }
}

/** Says what becomes of one arrival. */
async function account(arrival: Arrival, output: Output, complete: Promise<ArrivalReport>): Promise<void> {
  const { id, offer } = arrival;
  const lengthBytes = offer.regions.reduce((sum, region) => sum + region.lengthBytes, 0);
  output.say(`guest ${offer.name} is coming: ${mebibytes(lengthBytes)} MiB`);
  output.line({ type: 'arrival', id, guest: offer.name, regions: offer.regions });
  arrival.on('state', (state) => output.line({ type: 'state', id, state }));
  arrival.resumed.then(
    () => output.say(`guest ${offer.name} runs here`),
    () => {},
  );
  const report = await complete;
  output.result(
    `guest ${offer.name} is complete: ${mebibytes(report.bytesReceived)} MiB received, ` +
      `${report.remoteFaults.count} remote faults (p50 ${figure(report.remoteFaults.p50Us)} us)` +
      (report.pagesFromBase > 0 ? `, ${report.pagesFromBase} pages were here already` : '') +
      (report.pagesKnown > 0 ? `, ${report.pagesKnown} pages were known here` : ''),
    { type: 'report', ...report },
  );
}

export function follow(guest: WorkerGuest, output: Output): void {
  sayMessages(guest, output);
  guest.on('ended', (error) => {
    output.say(`guest ${guest.name} ended: ${error.message}`);
    output.line({ type: 'ended', guest: guest.name, message: error.message });
  });
}
