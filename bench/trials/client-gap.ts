/** The longest gap that the demo's client saw while its guest moved. */
import { join } from 'node:path';
import { repositoryRoot } from '../support/paths.js';
import { runCommand } from '../support/processes.js';
import { paired, type Trial } from '../support/trial.js';

interface DemoReport {
  verified: boolean;
  client: { acknowledged: number; lost: number; duplicated: number; longestGapMs: number };
}

const heapMb = 256;

async function longestGap(mode: string): Promise<number> {
  const cli = join(repositoryRoot, 'lib', 'cli', 'main.js');
  const args = [cli, 'demo', '--mode', mode, '--heap-mb', String(heapMb), '--json'];
  const lines = (await runCommand(process.execPath, args)).trimEnd().split('\n');
  const report = JSON.parse(lines.at(-1) ?? '') as DemoReport;
  const { client, verified } = report;
  if (!verified || client.lost !== 0 || client.duplicated !== 0) {
    throw new Error(`the demo went wrong: ${lines.at(-1)}`);
  }
  return client.longestGapMs;
}

export async function run(trial: Trial): Promise<void> {
  for (const mode of ['hybrid', 'post-copy']) {
    const gaps: number[] = [];
    for (let round = trial.samples(7); round > 0; round--) gaps.push(await longestGap(mode));
    trial.report(mode, 'ms', paired(gaps, []), {
      words: 'below 50 ms',
      met: ({ value }) => value < 50,
    });
  }
}
