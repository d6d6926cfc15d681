/**
 * `memferry send`: starts a guest from a module of one's own, lets one talk to it line by line, and moves it
 * when told to: by an empty line, the end of standard input, SIGUSR1, or after `--after-ms`, whichever is first.
 */
import { access, readFile } from 'node:fs/promises';
import { dirname } from 'node:path';
import { type Command, Option } from 'commander';
import { describeEncodings, figure, mebibytes } from '../demo/table.js';
import { MemferryError, memferryError } from '../errors.js';
import {
  type MigrateOptions,
  type Mode,
  modes,
  type NonConvergence,
  nonConvergenceChoices,
  type SampleOptions,
} from '../options.js';
import { sampleGuest } from '../share/sampling.js';
import { traitsOf } from '../protocol/mode-traits.js';
import type { BaseReport, EvictionReport, MigrationReport } from '../report.js';
import { checkMigrateOptions, type Migration, migrate } from '../source/migrate.js';
import { type TrackerName, trackerChoices, type Writers, writersChoices } from '../trackers.js';
import type { WorkerGuest } from '../worker/index.js';
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
import { connectionOptions } from './connection-flags.js';
import { untilKnown } from './in-doubt.js';
import { LiveProgress } from './live-progress.js';
import { makeOutput, type Output } from './output.js';
import { byteCount, positiveNumber, wholeNumber } from './parse-values.js';
import { onInterrupt } from './signals.js';

interface SendFlags extends GuestFlags, ServerFlags {
  to: string;
  mode: Mode;
  channels?: number;
  downtimeLimitMs?: number;
  maxRounds?: number;
  hybridRounds?: number;
  onNonConvergence?: NonConvergence;
  tracker?: TrackerName | 'kvm-log';
  writers?: Writers;
  splitHugePages?: boolean;
  deltaCache?: number;
  onCapacity?: 'fail' | 'direct';
  destinationRack?: string;
  releaseAsEvicted?: boolean;
  sample?: boolean;
  leaveWhenEvicted?: boolean;
  useBase?: 'auto' | 'always' | 'off';
  replay?: string;
  keepStaleCopy?: string;
  staleBytes?: number;
  verify: boolean;
}

export function addSend(program: Command): void {
  const command = program
    .command('send')
    .description('start a guest from a module and move it: at an empty line, the end of input, or SIGUSR1')
    .requiredOption('--to <host:port>', 'where `memferry receive` waits')
    .addOption(new Option('--mode <mode>', 'how it moves').choices(modes).default('hybrid'))
    .option('--channels <count>', 'parallel data connections', wholeNumber(1, 16))
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
    .addOption(
      new Option('--writers <where>', 'where writes to shared memory come from').choices([...writersChoices]),
    )
    .option(
      '--split-huge-pages',
      'of a huge page that was written, send only the pages of 4 KiB that changed',
    )
    .option(
      '--delta-cache <bytes>',
      'modes with rounds: memory for deltas of pages that are sent again, as 256Mi',
      byteCount,
    )
    .addOption(
      new Option('--on-capacity <choice>', 'scatter modes: when the servers cannot hold the guest').choices([
        'fail',
        'direct',
      ]),
    )
    .option('--destination-rack <name>', 'scatter modes: servers there are taken first')
    .option('--release-as-evicted', 'scatter modes: give memory back as others hold it')
    .option(
      '--sample',
      'until it moves: tell the servers of --via in the background which pages it keeps, for --dedup-domain',
    )
    .option('--leave-when-evicted', 'scatter modes: end here as soon as nobody needs this side any more')
    .addOption(
      new Option('--use-base <choice>', 'a base that the destination has: compare with it').choices([
        'auto',
        'always',
        'off',
      ]),
    )
    .option('--replay <file>', 'requests since that base, one a line, which the destination is to replay')
    .option(
      '--keep-stale-copy <directory>',
      'when the guest has left, keep it there as a base for its return',
    )
    .option('--stale-bytes <bytes>', 'keep no larger guest (default 64Gi)', byteCount)
    .option('--no-verify', 'do not compare digests at the end');
  addServerFlags(addGuestFlags(command)).action(send);
}

async function send(flags: SendFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  const sampled = sampleOptions(flags);
  await checkFlags(flags);
  const report = await untilItLeaves(
    {
      ...{ flags, leaves: 'moves', output, signal },
      whileHere: async (guest) => (sampled ? await sampleGuest(guest, sampled) : null),
    },
    (guest) => move(guest, flags, output, signal),
  );
  output.result(describeReport(report, flags.to), { type: 'report', ...report });
}

/** Before there is a guest, which would be ended by a wrong word. */
async function checkFlags(flags: SendFlags): Promise<void> {
  if (flags.keepStaleCopy && flags.leaveWhenEvicted) {
    throw memferryError('INVALID_ARGUMENT', '--leave-when-evicted does not wait for --keep-stale-copy');
  }
  const { replay } = flags;
  if (replay !== undefined) {
    // Whoever writes it may do so until the guest goes, but somewhere.
    await access(dirname(replay)).catch((cause) => {
      throw memferryError('INVALID_ARGUMENT', `--replay: ${replay} cannot be read`, { cause });
    });
  }
  await checkMigrateOptions(migrateOptions(flags));
}

/** But for the replay log, which is read when the guest goes. */
function migrateOptions(flags: SendFlags): MigrateOptions {
  const { to, mode, verify, channels, downtimeLimitMs, maxRounds, hybridRounds } = flags;
  const { onNonConvergence, tracker, writers } = flags;
  const { onCapacity, destinationRack, releaseAsEvicted, useBase, keepStaleCopy } = flags;
  const { staleBytes = 64 * 2 ** 30 } = flags;
  return {
    ...{ to, mode, verify },
    ...given({
      base: useBase,
      keepStaleCopy: keepStaleCopy && { directory: keepStaleCopy, maxBytes: staleBytes },
    }),
    ...given({ channels, downtimeLimitMs, maxRounds, hybridRounds, onNonConvergence, tracker, writers }),
    ...given({ splitHugePages: flags.splitHugePages }),
    ...given({ onCapacity, destinationRack, releaseAsEvicted, deltaCacheBytes: flags.deltaCache }),
    ...serverOptions(flags.sample && !traitsOf(mode).scatter ? withoutServers(flags) : flags),
  };
}

/** Those that the guest's pages are told of are no way for them. */
function withoutServers({ via: _via, ...others }: SendFlags): Omit<SendFlags, 'via'> {
  return others;
}

async function move(
  guest: WorkerGuest,
  flags: SendFlags,
  output: Output,
  signal: AbortSignal,
): Promise<EvictionReport | MigrationReport> {
  const { replay } = flags;
  const replayLog = replay === undefined ? undefined : new Uint8Array(await readReplay(replay));
  await using migration = migrate(guest, { ...migrateOptions(flags), signal, ...given({ replayLog }) });
  // Awaited here: what is left of the migration is let go of when this function ends.
  return await accountOf(migration, flags, output, signal);
}

/** Shows a migration as it goes; gives what it came to, which is asked for until it is known. */
export async function accountOf(
  migration: Migration,
  { mode, leaveWhenEvicted }: { mode: Mode; leaveWhenEvicted?: boolean },
  output: Output,
  signal: AbortSignal,
): Promise<EvictionReport | MigrationReport> {
  const shown = show(migration, mode, output);
  const outcome = async () => {
    const evicted = migration.evicted.then((report) => {
      output.line({ type: 'evicted', ...report });
      return report;
    });
    evicted.catch(() => {}); // `done` has the same reason
    if (leaveWhenEvicted && traitsOf(mode).scatter) return await evicted;
    const [report] = await Promise.all([migration.done, shown]);
    return report;
  };
  return await untilKnown(migration, outcome, output, signal);
}

/** Read when the guest goes: whoever writes it may do so until then. */
async function readReplay(file: string): Promise<Buffer> {
  try {
    return await readFile(file);
  } catch (cause) {
    throw memferryError('INVALID_ARGUMENT', `--replay: ${file} cannot be read`, { cause });
  }
}

/** Pure: null without --sample. */
export function sampleOptions(
  flags: Pick<SendFlags, 'sample' | 'via' | 'dedupDomain' | 'dedupSecretFile' | 'secretFile' | 'plaintext'>,
): SampleOptions | null {
  const { sample, via, dedupDomain: domain, dedupSecretFile: secretFile } = flags;
  if (!sample) return null;
  if (!via?.length || domain === undefined) {
    throw new MemferryError('INVALID_ARGUMENT', '--sample needs --via and --dedup-domain');
  }
  return {
    ...connectionOptions(flags),
    via,
    dedup: secretFile === undefined ? { domain } : { domain, secretFile },
  };
}

async function show(migration: Migration, mode: Mode, output: Output): Promise<void> {
  const live = output.json ? null : new LiveProgress(mode);
  migration.on('state', (state) => {
    live?.state(state);
    output.line({ type: 'state', state });
  });
  try {
    for await (const sample of migration.progress) {
      live?.update(sample);
      output.line({ type: 'progress', ...sample });
    }
  } finally {
    live?.stop();
  }
}

function describeBase(base: BaseReport): string {
  if (!base.used && base.pagesSame === 0) {
    return `the destination's base was of no use (${base.problem ?? base.reason})`;
  }
  return (
    `${mebibytes(base.bytesSaved)} MiB were there already: compared in ${figure(base.compareMs)} ms and ` +
    `${base.roundTrips} round trips, ${figure(base.sourceCpuMs)} + ${figure(base.destinationCpuMs)} ms of CPU time, ` +
    `${mebibytes(base.bytesExchanged)} MiB of hashes`
  );
}

/** Pure: the report for people. */
export function describeReport(report: EvictionReport | MigrationReport, to: string): string {
  const { rounds, intermediaries, base } = report;
  const whole = 'totalMs' in report ? report : null;
  const faults = whole?.remoteFaults;
  return [
    `guest ${report.guest} runs at ${to}`,
    `  downtime ${figure(report.downtimeMs)} ms after waiting ${figure(report.pauseWaitMs)} ms for a safepoint`,
    `  eviction ${figure(report.evictionMs)} ms` +
      (whole ? `, total ${figure(whole.totalMs)} ms` : '; the destination gathers on'),
    `  ${mebibytes(report.bytesOnWire)} MiB on the wire in ${rounds.length} rounds: ${report.pagesSent} pages ` +
      `sent, ${report.pagesZero} zero, ${report.pagesResent} again`,
    ...describeEncodings(report),
    ...(base ? [`  ${describeBase(base)}`] : []),
    ...(intermediaries.length > 0
      ? [
          `  ${report.pagesDirect} pages directly, ` +
            intermediaries
              .map(
                ({ name, pages, failed }) =>
                  `${pages} through ${name}${failed ? ` (given up: ${failed})` : ''}`,
              )
              .join(', '),
        ]
      : []),
    ...(report.pagesWithOneCopy > 0
      ? [`  ${report.pagesWithOneCopy} pages at one server alone, since no second one could take them`]
      : []),
    ...describeDedup(report.dedup),
    ...(faults
      ? [
          `  ${faults.count} remote faults` +
            (faults.count > 0
              ? `: p50 ${figure(faults.p50Us)}, p99 ${figure(faults.p99Us)}, max ${figure(faults.maxUs)} us`
              : ''),
        ]
      : []),
    ...(whole
      ? [`  digests ${whole.verified === null ? 'not compared' : whole.verified ? 'equal' : 'NOT equal'}`]
      : []),
  ].join('\n');
}
