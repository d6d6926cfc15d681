/**
 * `memferry share`: keeps pages that guests of a domain are likely to have on this host, within a budget. Runs until it
 * is interrupted; SIGHUP reads the budget again from `--budget-file`.
 */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { mebibytes } from '../demo/table.js';
import { memferryError } from '../errors.js';
import { type Distribution, distribute } from '../share/distribution.js';
import { Share } from '../share/share.js';
import { makeOutput, type Output } from './output.js';
import { byteCount, byteRate, duration } from './parse-values.js';
import { onInterrupt } from './signals.js';

interface ShareFlags {
  budget?: number;
  budgetFile?: string;
  dedupDomain: string;
  dedupSecretFile?: string;
  secretFile?: string;
  file?: string;
  from?: string[];
  discard?: boolean;
  via?: string[];
  interval?: number;
  bandwidth?: number;
  plaintext?: boolean;
  json?: boolean;
}

const reportEveryMs = 1000;

export function addShare(program: Command): void {
  program
    .command('share')
    .description('keep pages that guests of a domain are likely to have on this host')
    .requiredOption('--dedup-domain <name>', 'whose pages')
    .option('--budget <bytes>', 'all that it may take, as 512Mi or 2Gi', byteCount)
    .option('--budget-file <path>', 'the same from a file, which SIGHUP has read again')
    .option('--dedup-secret-file <path>', "the domain's own secret, mode 0600; else the hosts' shared one")
    .option('--secret-file <file>', "the hosts' shared secret, mode 0600 (default: this user's)")
    .option('--file <path>', "where it lies (default: the domain's place on tmpfs)")
    .option('--from <path...>', 'begin with the pages of these files: images of regions, or raw memory')
    .option(
      '--via <host:port,...>',
      'VMD servers (`memferry stage`) that count: what several guests have is brought here; repeatable',
      (text: string, former: string[] = []) => [...former, ...text.split(',').filter(Boolean)],
    )
    .option('--interval <duration>', 'from one look at what is popular to the next (default 30s)', duration)
    .option('--bandwidth <rate>', 'bytes a second that fetching takes, as 10M (default: no limit)', byteRate)
    .option('--plaintext', 'allow an address other than loopback although nothing is encrypted')
    .option('--discard', 'leave nothing behind at the end')
    .option('--json', 'one JSON object a line, its figures once a second')
    .action(keep);
}

/** Pure but for the file. Exactly one of the two. */
export function budgetOf({ budget, budgetFile }: Pick<ShareFlags, 'budget' | 'budgetFile'>): number {
  if ((budget === undefined) === (budgetFile === undefined)) {
    throw memferryError('INVALID_ARGUMENT', 'either --budget or --budget-file');
  }
  if (budget !== undefined) return budget;
  try {
    return byteCount(readFileSync(budgetFile as string, 'utf8').trim());
  } catch (cause) {
    // Of commander's errors only those about the command line have been told.
    throw memferryError('INVALID_ARGUMENT', `--budget-file: ${budgetFile}: ${(cause as Error).message}`, {
      cause,
    });
  }
}

async function keep(flags: ShareFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt({ hangup: flags.budgetFile === undefined });
  const domain = {
    dedup: {
      domain: flags.dedupDomain,
      ...(flags.dedupSecretFile === undefined ? {} : { secretFile: flags.dedupSecretFile }),
    },
    ...(flags.secretFile === undefined ? {} : { secretFile: flags.secretFile }),
  };
  const share = await Share.open({
    budgetBytes: budgetOf(flags),
    ...domain,
    ...(flags.file === undefined ? {} : { file: flags.file }),
  });
  let distribution: Distribution | null = null;
  const readAgain = () => {
    try {
      share.setBudget(budgetOf(flags)).catch(complain);
    } catch (error) {
      complain(error);
    }
  };
  const complain = (error: unknown) =>
    output.say(`the budget stays: ${error instanceof Error ? error.message : String(error)}`);
  if (flags.budgetFile !== undefined) process.on('SIGHUP', readAgain);
  const reporting = setInterval(() => report(share, distribution, output), reportEveryMs);
  try {
    output.say(`sharing ${share.path}, at most ${mebibytes(share.stats().budgetBytes)} MiB`);
    output.line({ type: 'sharing', path: share.path });
    for (const path of flags.from ?? []) {
      const filled = await share.fill(path);
      output.say(
        `${path}: ${filled.inserted} pages more, ${filled.there} were there, ${filled.noRoom} have no room`,
      );
      output.line({ type: 'filled', path, ...filled });
      if (interruption.signal.aborted) break;
    }
    if (flags.via?.length) {
      const { via, interval, bandwidth, plaintext = false } = flags;
      distribution = await distribute(share, {
        ...domain,
        via,
        plaintext,
        ...(interval === undefined ? {} : { intervalMs: interval }),
        ...(bandwidth === undefined ? {} : { bandwidth }),
      });
    }
    await new Promise<void>((resolve) => {
      if (interruption.signal.aborted) resolve();
      else interruption.signal.addEventListener('abort', () => resolve(), { once: true });
    });
    report(share, distribution, output);
  } finally {
    clearInterval(reporting);
    process.off('SIGHUP', readAgain);
    await distribution?.close();
    await share.close({ discard: flags.discard ?? false });
  }
}

/** The distribution's figures are null without servers. */
function report(share: Share, distribution: Distribution | null, output: Output): void {
  output.line({ type: 'stats', ...share.stats(), distribution: distribution?.stats() ?? null });
}
