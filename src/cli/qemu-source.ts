/** `memferry qemu source`: moves QEMU's guest at once. Ctrl-C before the commit: it runs on here. */
import { type Command, Option } from 'commander';
import { mebibytes } from '../demo/table.js';
import {
  type MigrateOptions,
  type Mode,
  modes,
  type NonConvergence,
  nonConvergenceChoices,
} from '../options.js';
import { QemuGuest } from '../qemu/source-guest.js';
import type { EvictionReport, MigrationReport } from '../report.js';
import { checkMigrateOptions, migrate } from '../source/migrate.js';
import { addPeerFlags } from './connection-flags.js';
import {
  addServerFlags,
  compressFlag,
  type GuestFlags,
  given,
  type ServerFlags,
  serverOptions,
} from './leaving-guest.js';
import { type TrackerName, trackerChoices } from '../trackers.js';
import { makeOutput, type Output } from './output.js';
import { byteCount, byteRate, positiveNumber, wholeNumber } from './parse-values.js';
import { addQemuFlags, type QemuFlags } from './qemu.js';
import { accountOf, describeReport } from './send.js';
import { onInterrupt } from './signals.js';

interface QemuSourceFlags extends QemuFlags, ServerFlags, Omit<GuestFlags, 'module'> {
  to: string;
  mode: Mode;
  name?: string;
  channels?: number;
  downtimeLimitMs?: number;
  maxRounds?: number;
  hybridRounds?: number;
  onNonConvergence?: NonConvergence;
  tracker?: TrackerName | 'kvm-log';
  splitHugePages?: boolean;
  onCapacity?: 'fail' | 'direct';
  deltaCache?: number;
  destinationRack?: string;
  leaveWhenEvicted?: boolean;
  stay?: boolean;
}

export function addQemuSource(qemu: Command): void {
  const command = qemu
    .command('source')
    .description('move the guest of this QEMU, and end QEMU when nobody needs it any more')
    .requiredOption('--to <host:port>', 'where `memferry qemu destination` waits')
    .addOption(new Option('--mode <mode>', 'how it moves').choices(modes).default('hybrid'));
  addQemuFlags(command)
    .option('--name <name>', "in reports and errors; QEMU's own (-name) without it")
    .option('--channels <count>', 'parallel data connections', wholeNumber(1, 16))
    .option('--bandwidth <bytes/s>', 'limit, as 100M or 1Gi', byteRate)
    .addOption(compressFlag())
    .option(
      '--delta-cache <bytes>',
      'modes with rounds: memory for deltas of pages that are sent again',
      byteCount,
    )
    .option(
      '--downtime-limit-ms <ms>',
      'pre-copy goes on until the expected downtime is below',
      positiveNumber,
    )
    .option('--max-rounds <count>', 'pre-copy rounds at most', wholeNumber(1, 1000))
    .option('--hybrid-rounds <count>', 'rounds before hybrid switches over', wholeNumber(1, 1000))
    .addOption(
      new Option('--on-non-convergence <choice>', 'when rounds stop shrinking').choices(
        nonConvergenceChoices,
      ),
    )
    .addOption(
      new Option('--tracker <name>', 'a dirty tracker; see `memferry doctor`').choices([...trackerChoices]),
    )
    .option(
      '--split-huge-pages',
      'of a huge page that was written, send only the pages of 4 KiB that changed',
    )
    .addOption(
      new Option('--on-capacity <choice>', 'scatter modes: when the servers cannot hold the guest').choices([
        'fail',
        'direct',
      ]),
    )
    .option('--destination-rack <name>', 'scatter modes: servers there are taken first')
    .option('--leave-when-evicted', 'scatter modes: end as soon as nobody needs this side any more')
    .option('--stay', 'leave QEMU as it is afterwards, stopped; it must never go on')
    .option('--json', 'one JSON object a line, the last one the report');
  addServerFlags(addPeerFlags(command)).action(source);
}

async function source(flags: QemuSourceFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  await checkMigrateOptions(migrateOptions(flags));
  await using guest = await QemuGuest.attach({
    qmp: flags.qmp,
    shim: flags.shim,
    name: flags.name,
    afterwards: flags.stay ? 'stay' : 'quit',
    signal,
  });
  guest.on('warning', (error: Error) => process.emitWarning(error));
  const heapBytes = guest.regions.reduce((sum, { region }) => sum + region.lengthBytes, 0);
  output.say(`guest ${guest.name} of QEMU ${guest.description.qemu}: ${mebibytes(heapBytes)} MiB of RAM`);
  output.line({ type: 'attached', guest: guest.name, pid: guest.pid, heapBytes, ...guest.description });
  const report = await move(guest, flags, output, signal);
  output.result(describeReport(report, flags.to), { type: 'report', ...report });
}

function migrateOptions(flags: QemuSourceFlags): MigrateOptions {
  const { to, mode } = flags;
  const { channels, downtimeLimitMs, maxRounds, hybridRounds, onNonConvergence, tracker } = flags;
  const { onCapacity, destinationRack } = flags;
  return {
    ...{ to, mode },
    ...given({ channels, downtimeLimitMs, maxRounds, hybridRounds, onNonConvergence, tracker }),
    ...given({ splitHugePages: flags.splitHugePages }),
    ...given({ onCapacity, destinationRack, deltaCacheBytes: flags.deltaCache }),
    ...serverOptions(flags),
  };
}

async function move(
  guest: QemuGuest,
  flags: QemuSourceFlags,
  output: Output,
  signal: AbortSignal,
): Promise<EvictionReport | MigrationReport> {
  await using migration = migrate(guest, { ...migrateOptions(flags), signal });
  // Awaited here: what is left of the migration is let go of when this function ends.
  return await accountOf(migration, flags, output, signal);
}
