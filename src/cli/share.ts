/**
 * `memferry share`: keeps pages that guests of a domain are likely to have on this host, within a budget. Runs until it
 * is interrupted; SIGHUP reads the budget again from `--budget-file`.
 */
import { readFileSync } from 'node:fs';
import type { Command } from 'commander';
import { mebibytes } from '../demo/table.js';
import { MemferryError } from '../errors.js';
import { Share } from '../share/share.js';
import { makeOutput, type Output } from './output.js';
import { byteCount } from './parse-values.js';
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
    .option('--discard', 'leave nothing behind at the end')
    .option('--json', 'one JSON object a line, its figures once a second')
    .action(keep);
}

/** Pure but for the file. Exactly one of the two. */
export function budgetOf({ budget, budgetFile }: Pick<ShareFlags, 'budget' | 'budgetFile'>): number {
  if ((budget === undefined) === (budgetFile === undefined)) {
    throw new MemferryError('INVALID_ARGUMENT', 'either --budget or --budget-file');
  }
  return budget ?? byteCount(readFileSync(budgetFile as string, 'utf8').trim());
}

async function keep(flags: ShareFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt({ hangup: flags.budgetFile === undefined });
  const share = await Share.open({
    budgetBytes: budgetOf(flags),
    dedup: {
      domain: flags.dedupDomain,
      ...(flags.dedupSecretFile === undefined ? {} : { secretFile: flags.dedupSecretFile }),
    },
    ...(flags.secretFile === undefined ? {} : { secretFile: flags.secretFile }),
    ...(flags.file === undefined ? {} : { file: flags.file }),
  });
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
  const reporting = setInterval(() => report(share, output), reportEveryMs);
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
    await new Promise<void>((resolve) => {
      if (interruption.signal.aborted) resolve();
      else interruption.signal.addEventListener('abort', () => resolve(), { once: true });
    });
    report(share, output);
  } finally {
    clearInterval(reporting);
    process.off('SIGHUP', readAgain);
    await share.close({ discard: flags.discard ?? false });
  }
}

function report(share: Share, output: Output): void {
  output.line({ type: 'stats', ...share.stats() });
}
