/**
 * What `send` and `park` have in common: a guest is started from a module, one may talk to it line by line, and it
 * leaves when told to: by an empty line, the end of standard input, SIGUSR1, or after `--after-ms`, whichever is first. One
 * that cannot leave runs on where it can be told again.
 */
import { pathToFileURL } from 'node:url';
import { type Command, Option } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { isHere } from '../departed.js';
import { memferryError } from '../errors.js';
import { type CompressChoice, compressChoices, type MigrateOptions } from '../options.js';
import { rehearse } from '../rehearse.js';
import type { DedupReport } from '../report.js';
import { WorkerGuest } from '../worker/index.js';
import { addPeerFlags, type PeerFlags, peerOptions } from './connection-flags.js';
import { GuestConsole, sayMessages } from './guest-console.js';
import type { Output } from './output.js';
import { byteRate, type NamedModule, namedModule, wholeNumber } from './parse-values.js';
import { interrupted } from './signals.js';

export interface GuestFlags extends PeerFlags {
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
  linkRate?: number;
  dedup?: boolean;
  dedupDomain?: string;
  dedupSecretFile?: string;
}

export function addGuestFlags(command: Command): Command {
  command
    .requiredOption('--module <name=path>', 'the guest: a module that exports defineGuest(...)', namedModule)
    .option('--data <json>', 'what the guest finds in context.data', parseData)
    .option('--after-ms <ms>', 'it leaves by itself after this long', wholeNumber(0, 86_400_000))
    .option('--bandwidth <bytes/s>', 'limit, as 100M or 1Gi', byteRate)
    .addOption(compressFlag())
    .option('--json', 'one JSON object a line, the last one the report');
  return addPeerFlags(command);
}

export function addServerFlags(command: Command): Command {
  return command
    .option(
      '--via <host:port,...>',
      'VMD servers (`memferry stage`); repeatable',
      (text: string, former: string[] = []) => [...former, ...text.split(',').filter(Boolean)],
    )
    .option('--discover [group:port]', 'take VMD servers that announce themselves')
    .option(
      '--replicas <count>',
      'on how many servers a page is kept, of those that go to servers',
      wholeNumber(1, 2),
    )
    .option('--rack <name>', 'where this host stands; servers there are taken last')
    .option(
      '--link-rate <rate>',
      "bytes a second of this host's link, as 125M, where its interface does not say: with --discover, as many servers as fill it",
      byteRate,
    )
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
  const { bandwidth, compress, via, discover, replicas, rack, linkRate: linkBytesPerSecond } = flags;
  const dedup = dedupOption(flags);
  return {
    ...peerOptions(flags),
    ...given({ bandwidth, compress, via, discover, replicas, rack, linkBytesPerSecond, dedup }),
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

export interface Leaving {
  flags: GuestFlags;
  /** What it does when it is told to, for people. */
  leaves: string;
  output: Output;
  signal: AbortSignal;
  /** Begun while the guest waits to be told, and disposed of when it is. */
  whileHere?: (guest: WorkerGuest) => Promise<AsyncDisposable | null>;
}

/**
 * Starts a guest and waits until it is told to leave. When `leave` fails and the guest is still here, it waits to be told
 * again, as long as there is somebody who can: until the input has ended, and not after `--after-ms`.
 */
export async function untilItLeaves<T>(
  { flags, leaves, output, signal, whileHere = async () => null }: Leaving,
  leave: (guest: WorkerGuest) => Promise<T>,
): Promise<T> {
  const { name, path } = flags.module;
  // Before there is a guest: the signal's own meaning in Node is a debugger, and it may come at any time.
  using signs = new Signs(flags);
  await using guest = await WorkerGuest.start({
    module: { name, url: pathToFileURL(path) },
    ...(flags.data === undefined ? {} : { data: flags.data }),
  });
  const ended = new Promise<never>((_, reject) => guest.once('ended', reject));
  ended.catch(() => {});
  sayMessages(guest, output);
  for (let again = false; ; again = true) {
    {
      await using _companion = await whileHere(guest).catch((error) => {
        if (!again) throw error;
        // It had one before, and lives without.
        output.say(`memferry: ${error instanceof Error ? error.message : error}`);
        return null;
      });
      const told = signs.next();
      if (!again) {
        const lengthBytes = guest.regions.reduce((sum, { region }) => sum + region.refresh(), 0);
        // Only now are they read: whoever sees that the guest runs may give the sign at once.
        signs.listen(guest, output);
        output.say(
          `guest ${name} runs, ${mebibytes(lengthBytes)} MiB; a line asks it; at an empty one it ${leaves}`,
        );
        output.line({ type: 'started', guest: name, pid: process.pid, heapBytes: lengthBytes });
        void rehearse(); // it will leave some day, and the guest has time now
      }
      await Promise.race([told, ended, interrupted(signal)]);
    }
    try {
      return await leave(guest);
    } catch (error) {
      if (signal.aborted || !signs.more || !(await runsHere(guest, ended))) throw error;
      const { code, message } = error as { code?: string; message: string };
      output.say(
        `memferry: ${code ?? 'ERROR'}: ${message}; guest ${name} runs on here, until it is told again`,
      );
      output.line({ type: 'failed', guest: name, code: code ?? 'ERROR', message });
    }
  }
}

async function runsHere(guest: WorkerGuest, ended: Promise<never>): Promise<boolean> {
  if (!isHere(guest)) return false;
  const turn = new Promise<true>((resolve) => setImmediate(resolve, true));
  return await Promise.race([turn, ended.catch(() => false)]);
}

/** That the guest is to leave: an empty line, the end of the input, SIGUSR1, or a time that is over. */
class Signs {
  #given = false;
  /** It is on its way, and need not be told again. */
  #leaving = false;
  #tell: (() => void) | null = null;
  #timer: NodeJS.Timeout | undefined;
  #console: GuestConsole | null = null;
  #inputEnded = false;
  readonly #onSign = () => {
    if (this.#leaving) return;
    this.#given = true;
    this.#tell?.();
  };

  constructor(private readonly flags: Pick<GuestFlags, 'afterMs'>) {
    process.on('SIGUSR1', this.#onSign);
  }

  /** The next one, or one that nobody has waited for yet. */
  async next(): Promise<void> {
    this.#leaving = false;
    if (!this.#given) {
      await new Promise<void>((resolve) => {
        this.#tell = resolve;
      });
    }
    this.#given = false;
    this.#leaving = true;
  }

  listen(guest: WorkerGuest, output: Output): void {
    const { afterMs } = this.flags;
    if (afterMs !== undefined) this.#timer = setTimeout(this.#onSign, afterMs);
    this.#console = new GuestConsole({
      ...{ input: process.stdin, output, guest: () => guest, onEmptyLine: this.#onSign },
      onEnd: () => {
        this.#inputEnded = true;
        // With a time given, an input that ends (or has none, as in a script) is no sign.
        if (afterMs === undefined) this.#onSign();
      },
    });
  }

  /** Another one may come: somebody is there, and has not left it to a time. */
  get more(): boolean {
    return !this.#inputEnded && this.flags.afterMs === undefined;
  }

  [Symbol.dispose](): void {
    clearTimeout(this.#timer);
    process.removeListener('SIGUSR1', this.#onSign);
    this.#console?.close();
    process.stdin.destroy();
  }
}

function parseData(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw memferryError('INVALID_ARGUMENT', '--data is not JSON', { cause });
  }
}
