/**
 * What `send` and `park` have in common: a guest is started from a module, one may talk to it line by line, and it
 * leaves when told to: by an empty line, the end of standard input, SIGUSR1, or after `--after-ms`, whichever is first.
 */
import { pathToFileURL } from 'node:url';
import { type Command, Option } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { memferryError } from '../errors.js';
import { type CompressChoice, compressChoices, type MigrateOptions } from '../options.js';
import { rehearse } from '../rehearse.js';
import type { DedupReport } from '../report.js';
import { WorkerGuest } from '../worker/index.js';
import { addConnectionFlags, type ConnectionFlags, connectionOptions } from './connection-flags.js';
import { GuestConsole, sayMessages } from './guest-console.js';
import type { Output } from './output.js';
import { byteCount, type NamedModule, namedModule, wholeNumber } from './parse-values.js';
import { interrupted } from './signals.js';

export interface GuestFlags extends ConnectionFlags {
  module: NamedModule;
  data?: unknown;
  afterMs?: number;
  bandwidth?: number;
  compress?: CompressChoice;
  json?: boolean;
}

/** Of VMD servers. */
export interface ServerFlags {
  via?: string[];
  discover?: string | boolean;
  replicas?: number;
  rack?: string;
  dedup?: boolean;
  dedupDomain?: string;
  dedupSecretFile?: string;
}

export function addGuestFlags(command: Command): Command {
  command
    .requiredOption('--module <name=path>', 'the guest: a module that exports defineGuest(...)', namedModule)
    .option('--data <json>', 'what the guest finds in context.data', parseData)
    .option('--after-ms <ms>', 'it leaves by itself after this long', wholeNumber(0, 86_400_000))
    .option('--bandwidth <bytes/s>', 'limit, as 100M or 1Gi', byteCount)
    .addOption(compressFlag())
    .option('--json', 'one JSON object a line, the last one the report');
  return addConnectionFlags(command);
}

export function addServerFlags(command: Command): Command {
  return command
    .option(
      '--via <host:port,...>',
      'VMD servers (`memferry stage`); repeatable',
      (text: string, former: string[] = []) => [...former, ...text.split(',').filter(Boolean)],
    )
    .option('--discover [group:port]', 'take VMD servers that announce themselves')
    .option('--replicas <count>', 'on how many servers a page is kept', wholeNumber(1, 2))
    .option('--rack <name>', 'where this host stands; servers there are taken last')
    .option('--dedup', 'with VMD servers: pages that they hold already go as references')
    .option('--dedup-domain <name>', 'the same, and pages of all guests of this domain count')
    .option('--dedup-secret-file <path>', "the domain's own secret, mode 0600; else the hosts' shared one");
}

export function compressFlag(): Option {
  return new Option(
    '--compress <choice>',
    'pages on the way; auto: where the link is what is waited for',
  ).choices(compressChoices);
}

/** The options of `migrate` and `park` that these flags are. */
export function serverOptions(flags: Omit<GuestFlags, 'module'> & ServerFlags): Record<string, unknown> {
  const { bandwidth, compress, via, discover, replicas, rack } = flags;
  const dedup = dedupOption(flags);
  return {
    ...connectionOptions(flags),
    ...given({ bandwidth, compress, via, discover, replicas, rack, dedup }),
  };
}

/** Pure: a domain means deduplication, with or without the flag itself. */
export function dedupOption({
  dedup,
  dedupDomain: domain,
  dedupSecretFile: secretFile,
}: Pick<ServerFlags, 'dedup' | 'dedupDomain' | 'dedupSecretFile'>): MigrateOptions['dedup'] {
  if (domain !== undefined) return secretFile === undefined ? { domain } : { domain, secretFile };
  if (secretFile === undefined) return dedup;
  throw memferryError('INVALID_ARGUMENT', '--dedup-secret-file is for --dedup-domain');
}

/** Pure: lines of a report for people. */
export function describeDedup(dedup: DedupReport | null): string[] {
  if (!dedup) return [];
  const { pagesDeduplicated, bytesSaved, pagesHashed, cpuMs } = dedup;
  return [
    `  ${pagesDeduplicated} pages deduplicated, ${mebibytes(Math.max(0, bytesSaved))} MiB saved; ` +
      `${pagesHashed} hashed in ${figure(cpuMs)} ms of CPU`,
  ];
}

/** Without what was not said, so that the library's defaults hold. */
export function given(options: Record<string, unknown>): Record<string, unknown> {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
}

/** Starts it and waits until it is to leave. `leaves`: what it does then, for people. `whileHere`: until then. */
export async function startGuest(
  flags: GuestFlags,
  leaves: string,
  output: Output,
  signal: AbortSignal,
  whileHere: (guest: WorkerGuest) => Promise<AsyncDisposable | null> = async () => null,
): Promise<WorkerGuest> {
  const { name, path } = flags.module;
  const guest = await WorkerGuest.start({
    module: { name, url: pathToFileURL(path) },
    ...(flags.data === undefined ? {} : { data: flags.data }),
  });
  try {
    sayMessages(guest, output);
    await using _companion = await whileHere(guest);
    const lengthBytes = guest.regions.reduce((sum, { region }) => sum + region.refresh(), 0);
    // Before it is said that the guest runs: whoever reads that may give the sign at once.
    const told = untilTold(guest, flags, output, signal);
    told.catch(() => {});
    output.say(
      `guest ${name} runs, ${mebibytes(lengthBytes)} MiB; a line asks it; at an empty one it ${leaves}`,
    );
    output.line({ type: 'started', guest: name, pid: process.pid, heapBytes: lengthBytes });
    void rehearse(); // it will leave some day, and the guest has time now
    await told;
    return guest;
  } catch (error) {
    await guest.terminate();
    throw error;
  }
}

function parseData(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw memferryError('INVALID_ARGUMENT', '--data is not JSON', { cause });
  }
}

/** Resolves at the first of the signs to go; rejects when interrupted or when the guest ends first. */
async function untilTold(
  guest: WorkerGuest,
  flags: GuestFlags,
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
      interrupted(signal).catch(reject);
    });
  } finally {
    clearTimeout(timer);
    process.removeListener('SIGUSR1', go);
    (typed as GuestConsole | null)?.close();
    process.stdin.destroy();
  }
}
