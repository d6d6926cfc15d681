/** `memferry bench`: the benchmarks are part of a checkout, not of the package; this starts them there. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Command } from 'commander';
import { memferryError } from '../errors.js';

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');

export function addBench(program: Command): void {
  program
    .command('bench')
    .description('run the benchmarks (in a checkout)')
    .argument('[trial...]', 'which trials; all without')
    .option('--json', 'one JSON object a line')
    .action(run);
}

async function run(trials: string[], flags: { json?: boolean }): Promise<void> {
  if (!existsSync(join(root, 'bench'))) {
    throw memferryError('INVALID_ARGUMENT', 'the benchmarks run in a checkout of memferry: npm run bench');
  }
  const args = ['run', '--silent', 'bench', '--', ...trials, ...(flags.json ? ['--json'] : [])];
  const child = spawn('npm', args, { cwd: root, stdio: 'inherit' });
  // Ctrl-C reaches the benchmarks by themselves; wait for them to clear up.
  const ignore = () => {};
  process.on('SIGINT', ignore);
  try {
    process.exitCode = await new Promise<number>((resolve, reject) => {
      child.once('error', reject).once('exit', (code) => resolve(code ?? 1));
    });
  } finally {
    process.removeListener('SIGINT', ignore);
  }
}
