/**
 * `memferry qemu destination`: waits for a guest for a QEMU that was started with `-S -incoming defer`, and ends when
 * every page of it is there. QEMU runs on by itself.
 */
import type { Command } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { type Arrival, listen } from '../destination/listen.js';
import { memferryError } from '../errors.js';
import { parseAddress } from '../options.js';
import { QemuDestination } from '../qemu/arriving-guest.js';
import { rehearse } from '../rehearse.js';
import { reportOrRest } from './await-rest.js';
import { addPeerFlags, type PeerFlags, peerOptions } from './connection-flags.js';
import { dedupOption, given } from './leaving-guest.js';
import { makeOutput, type Output } from './output.js';
import { byteCount, byteRate } from './parse-values.js';
import { addQemuFlags, type QemuFlags } from './qemu.js';
import { interrupted, onInterrupt } from './signals.js';

interface QemuDestinationFlags extends QemuFlags, PeerFlags {
  listen: string;
  maxBytes?: number;
  bandwidth?: number;
  gatherLimit?: number;
  dedup?: boolean;
  dedupDomain?: string;
  dedupSecretFile?: string;
  share?: string;
  json?: boolean;
}

export function addQemuDestination(qemu: Command): void {
  const command = qemu
    .command('destination')
    .description('wait for a guest for this QEMU, which waits too (-S -incoming defer)')
    .requiredOption('--listen <host:port>', 'where to wait; port 0 takes any and says which');
  addQemuFlags(command)
    .option('--max-bytes <bytes>', 'take no larger guest (default 64Gi)', byteCount)
    .option('--bandwidth <bytes/s>', 'taken from the source at most, as 100M or 1Gi', byteRate)
    .option(
      '--gather-limit <bytes/s>',
      'scatter modes: fetched ahead of the guest from VMD servers at most',
      byteRate,
    )
    .option('--dedup', 'pages that the guest has several times come once')
    .option(
      '--dedup-domain <name>',
      'pages that are here already for guests of this domain do not come again',
    )
    .option('--dedup-secret-file <path>', "the domain's own secret, mode 0600; else the hosts' shared one")
    .option('--share <file>', "the host's page share too, or 'auto' for the domain's (see memferry share)")
    .option('--json', 'one JSON object a line');
  addPeerFlags(command).action(destination);
}

async function destination(flags: QemuDestinationFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  await using waiting = new QemuDestination({
    qmp: flags.qmp,
    shim: flags.shim,
    onResumed: () => {
      output.say('the guest runs here');
      output.line({ type: 'resumed' });
    },
    onWarning: (error) => process.emitWarning(error),
  });
  await waiting.check({ signal });
  await using listening = await listen({
    ...parseAddress(flags.listen),
    ...peerOptions(flags),
    ...given({ maxBytes: flags.maxBytes, bandwidth: flags.bandwidth, gatherLimit: flags.gatherLimit }),
    ...given({ dedup: dedupOption(flags), share: flags.share }),
    signal,
    accept: waiting.accept,
  });
  await rehearse();
  output.say(`listening on ${listening.host}:${listening.port}`);
  output.line({ type: 'listening', host: listening.host, port: listening.port });
  const stopped = interrupted(signal);
  stopped.catch(() => {});
  for await (const arrival of listening) {
    await account(arrival, output, stopped);
    await waiting.running; // complete, and ours: whether it runs too is what the exit code says
    return;
  }
  throw memferryError('CANCELLED', 'interrupted');
}

/** Says what becomes of it. */
async function account(arrival: Arrival, output: Output, stopped: Promise<never>): Promise<void> {
  const { id, offer } = arrival;
  const lengthBytes = offer.regions.reduce((sum, region) => sum + region.lengthBytes, 0);
  output.say(`guest ${offer.name} is coming: ${mebibytes(lengthBytes)} MiB`);
  output.line({ type: 'arrival', id, guest: offer.name, regions: offer.regions });
  arrival.on('state', (state) => output.line({ type: 'state', id, state }));
  const report = await reportOrRest(arrival, output, stopped);
  const { count, p50Us } = report.remoteFaults;
  output.result(
    `guest ${offer.name} is complete: ${mebibytes(report.bytesReceived)} MiB received, ` +
      `${count} remote faults (p50 ${figure(p50Us)} us)`,
    { type: 'report', ...report },
  );
}
