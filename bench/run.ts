/**
 * `npm run bench [-- TRIAL…] [--json] [--samples N]`: runs trials one after another, each in a fresh process.
 * A target that is missed is reported and changes no exit status; a trial that breaks does.
 */
import { spawn } from 'node:child_process';
import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { parseArgs } from 'node:util';
import { compiledDirectory } from './support/paths.js';
import type { Result } from './support/result.js';
import { heading, row } from './support/table.js';

/** From the cheap to the expensive; trials that are not listed come last. */
const order = [
  'hash',
  'track',
  'track-attached',
  'bulk',
  'peer-qemu',
  'fault',
  'fault-lab',
  'scatter',
  'dedup',
  'distribute',
  'compress',
  'delta',
  'downtime',
  'scale',
  'return',
  'replay',
  'client-gap',
  'restore',
];

/** More than any trial needs; one that hangs must not take the others with it. */
const trialTimeoutMs = 10 * 60_000;

function trialNames(): string[] {
  const rank = (name: string): number => (order.includes(name) ? order.indexOf(name) : order.length);
  return readdirSync(join(compiledDirectory, 'trials'))
    .filter((file) => file.endsWith('.js'))
    .map((file) => file.slice(0, -'.js'.length))
    .sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
}

function runTrial(
  name: string,
  samples: string | undefined,
  show: (result: Result) => void,
): Promise<boolean> {
  return new Promise((resolve) => {
    const args = [
      join(compiledDirectory, 'trial-main.js'),
      name,
      ...(samples === undefined ? [] : [samples]),
    ];
    const child = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'inherit'] });
    const stop = (): void => {
      child.kill('SIGTERM');
    };
    const timer = setTimeout(() => {
      process.stderr.write(`${name}: no end within ${trialTimeoutMs / 60_000} minutes\n`);
      stop();
    }, trialTimeoutMs);
    process.once('SIGINT', stop);
    process.once('SIGTERM', stop);
    createInterface({ input: child.stdout }).on('line', (line) => show(JSON.parse(line) as Result));
    child.once('close', (status, signal) => {
      clearTimeout(timer);
      process.off('SIGINT', stop);
      process.off('SIGTERM', stop);
      if (status !== 0) process.stderr.write(`${name}: ended with ${signal ?? status}\n`);
      resolve(status === 0);
    });
  });
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { json: { type: 'boolean', default: false }, samples: { type: 'string' } },
});
const known = trialNames();
const unknown = positionals.filter((name) => !known.includes(name));
if (unknown.length > 0 || (values.samples !== undefined && !/^[1-9]\d{0,3}$/.test(values.samples))) {
  process.stderr.write(
    `usage: npm run bench [-- TRIAL…] [--json] [--samples N]\ntrials: ${known.join(', ')}\n`,
  );
  process.exit(2);
}

const json = values.json || !process.stdout.isTTY;
if (!json) process.stdout.write(heading());
let broken = false;
for (const name of positionals.length > 0 ? positionals : known) {
  const ended = await runTrial(name, values.samples, (result) => {
    process.stdout.write(json ? `${JSON.stringify(result)}\n` : row(result));
  });
  broken ||= !ended;
}
process.exitCode = broken ? 1 : 0;
