/**
 * `memferry send`: starts a guest from a module of one's own, lets one talk to it line by line, and moves it
 * when told to: by an empty line, the end of standard input, SIGUSR1, or after `--after-ms`, whichever is first.
 */
import { pathToFileURL } from 'node:url';
import { type Command, Option } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { memferryError } from '../errors.js';
import { type Mode, modes, type NonConvergence, nonConvergenceChoices } from '../options.js';
import { traitsOf } from '../protocol/mode-traits.js';
import type { EvictionReport, MigrationReport } from '../report.js';
import { type Migration, migrate } from '../source/migrate.js';
import { WorkerGuest } from '../worker/index.js';
import { addConnectionFlags, type ConnectionFlags, connectionOptions } from './connection-flags.js';
import { GuestConsole } from './guest-console.js';
import { LiveProgress } from './live-progress.js';
import { makeOutput, type Output } from './output.js';
import { byteCount, type NamedModule, namedModule, positiveNumber, wholeNumber } from './parse-values.js';
import { onInterrupt } from './signals.js';

interface SendFlags extends ConnectionFlags {
  to: string;
  module: NamedModule;
  data?: unknown;
  mode: Mode;
  channels?: number;
  bandwidth?: number;
  downtimeLimitMs?: number;
  maxRounds?: number;
  onNonConvergence?: NonConvergence;
  tracker?: string;
  via?: string[];
  discover?: string | boolean;
  replicas?: number;
  onCapacity?: 'fail' | 'direct';
  rack?: string;
  destinationRack?: string;
  releaseAsEvicted?: boolean;
  leaveWhenEvicted?: boolean;
  verify: boolean;
  afterMs?: number;
  json?: boolean;
}

export function addSend(program: Command): void {
  const command = program
    .command('send')
    .description('start a guest from a module and move it: at an empty line, the end of input, or SIGUSR1')
    .requiredOption('--to <host:port>', 'where `memferry receive` waits')
    .requiredOption('--module <name=path>', 'the guest: a module that exports defineGuest(...)', namedModule)
    .option('--data <json>', 'what the guest finds in context.data', parseData)
    .addOption(new Option('--mode <mode>', 'how it moves').choices(modes).default('hybrid'))
    .option('--channels <count>', 'parallel data connections', wholeNumber(1, 16))
    .option('--bandwidth <bytes/s>', 'limit, as 100M or 1Gi', byteCount)
    .option(
      '--downtime-limit-ms <ms>',
      'pre-copy goes on until the expected downtime is below',
      positiveNumber,
    )
    .option('--max-rounds <count>', 'pre-copy rounds at most', wholeNumber(1, 1000))
    .addOption(
      new Option('--on-non-convergence <choice>', 'when rounds stop shrinking').choices(
        nonConvergenceChoices,
      ),
    )
    .option('--tracker <name>', 'a dirty tracker; see `memferry doctor`')
    .option(
      '--via <host:port,...>',
      'scatter modes: VMD servers (`memferry stage`); repeatable',
      (text: string, former: string[] = []) => [...former, ...text.split(',').filter(Boolean)],
    )
    .option('--discover [group:port]', 'scatter modes: take servers that announce themselves')
    .option('--replicas <count>', 'scatter modes: on how many servers a page is kept', wholeNumber(1, 2))
    .addOption(
      new Option('--on-capacity <choice>', 'scatter modes: when the servers cannot hold the guest').choices([
        'fail',
        'direct',
      ]),
    )
    .option('--rack <name>', 'scatter modes: where this host stands; servers there are taken last')
    .option('--destination-rack <name>', 'scatter modes: servers there are taken first')
    .option('--release-as-evicted', 'scatter modes: give memory back as others hold it')
    .option('--leave-when-evicted', 'scatter modes: end here as soon as nobody needs this side any more')
    .option('--no-verify', 'do not compare digests at the end')
    .option('--after-ms <ms>', 'move it by itself after this long', wholeNumber(0, 86_400_000))
    .option('--json', 'one JSON object a line, the last one the report');
  addConnectionFlags(command).action(send);
}

export function parseData(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw memferryError('INVALID_ARGUMENT', '--data is not JSON', { cause });
  }
}

async function send(flags: SendFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  const { name, path } = flags.module;
  await using guest = await WorkerGuest.start({
    module: { name, url: pathToFileURL(path) },
    ...(flags.data === undefined ? {} : { data: flags.data }),
  });
  follow(guest, output);
  const lengthBytes = guest.regions.reduce((sum, { region }) => sum + region.refresh(), 0);
  // Before it is said that the guest runs: whoever reads that may give the sign at once.
  const told = untilTold(guest, flags, output, signal);
  told.catch(() => {});
  output.say(`guest ${name} runs, ${mebibytes(lengthBytes)} MiB; a line asks it, an empty one moves it`);
  output.line({ type: 'started', guest: name, pid: process.pid, heapBytes: lengthBytes });

  await told;
  const report = await move(guest, flags, output, signal);
  output.result(describeReport(report, flags.to), { type: 'report', ...report });
}

/** Resolves at the first of the signs to go; rejects when interrupted or when the guest ends first. */
export async function untilTold(
  guest: WorkerGuest,
  flags: { afterMs?: number },
  output: Output,
  signal: AbortSignal,
): Promise<void> {
  let typed: GuestConsole | null = null;
  let timer: NodeJS.Timeout | undefined;
  let go = () => {};
  try {
    await new Promise<void>((resolve, reject) => {
      go = resolve;
      process.once('SIGUSR1', go);
      if (flags.afterMs !== undefined) timer = setTimeout(go, flags.afterMs);
      // With a time given, an input that ends (or has none, as in a script) is no sign.
      const onEnd = flags.afterMs === undefined ? go : () => {};
      typed = new GuestConsole({ input: process.stdin, output, guest: () => guest, onEmptyLine: go, onEnd });
      guest.once('ended', reject);
      const stop = () => reject(memferryError('CANCELLED', 'interrupted', { cause: signal.reason }));
      if (signal.aborted) stop();
      else signal.addEventListener('abort', stop, { once: true });
    });
  } finally {
    clearTimeout(timer);
    process.removeListener('SIGUSR1', go);
    (typed as GuestConsole | null)?.close();
    process.stdin.destroy();
  }
}

async function move(
  guest: WorkerGuest,
  flags: SendFlags,
  output: Output,
  signal: AbortSignal,
): Promise<EvictionReport | MigrationReport> {
  const { to, mode, channels, bandwidth, downtimeLimitMs, maxRounds, onNonConvergence, tracker, verify } =
    flags;
  const given = Object.entries({
    channels,
    bandwidth,
    downtimeLimitMs,
    maxRounds,
    onNonConvergence,
    tracker,
    via: flags.via,
    discover: flags.discover,
    replicas: flags.replicas,
    onCapacity: flags.onCapacity,
    rack: flags.rack,
    destinationRack: flags.destinationRack,
    releaseAsEvicted: flags.releaseAsEvicted,
  });
  const options = Object.fromEntries(given.filter(([, value]) => value !== undefined));
  await using migration = migrate(guest, {
    to,
    mode,
    verify,
    signal,
    ...connectionOptions(flags),
    ...options,
  });
  const shown = show(migration, mode, output);
  const evicted = migration.evicted.then((report) => {
    output.line({ type: 'evicted', ...report });
    return report;
  });
  evicted.catch(() => {}); // `done` has the same reason
  if (flags.leaveWhenEvicted && traitsOf(mode).scatter) return evicted;
  const [report] = await Promise.all([migration.done, shown]);
  return report;
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

/** Pure: the report for people. */
export function describeReport(report: EvictionReport | MigrationReport, to: string): string {
  const { rounds, intermediaries } = report;
  const whole = 'totalMs' in report ? report : null;
  const faults = whole?.remoteFaults;
  return [
    `guest ${report.guest} runs at ${to}`,
    `  downtime ${figure(report.downtimeMs)} ms after waiting ${figure(report.pauseWaitMs)} ms for a safepoint`,
    `  eviction ${figure(report.evictionMs)} ms` +
      (whole ? `, total ${figure(whole.totalMs)} ms` : '; the destination gathers on'),
    `  ${mebibytes(report.bytesOnWire)} MiB on the wire in ${rounds.length} rounds: ${report.pagesSent} pages ` +
      `sent, ${report.pagesZero} zero, ${report.pagesResent} again`,
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

export function follow(guest: WorkerGuest, output: Output): void {
  guest.on('message', (value) => {
    if (output.json) output.line({ type: 'message', guest: guest.name, value });
    else output.say(`${guest.name}: ${JSON.stringify(value)}`);
  });
}
