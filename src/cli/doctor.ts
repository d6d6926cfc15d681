/** `memferry doctor`: what this kernel offers, what is missing and why, and how to grant it. */
import type { Command } from 'commander';
import { table } from '../demo/table.js';
import { doctor } from '../doctor.js';
import { makeOutput } from './output.js';

interface Finding {
  name: string;
  available: boolean;
  reason: string;
  remedy: string;
}

export function addDoctor(program: Command): void {
  program
    .command('doctor')
    .description('say what this kernel offers for tracking and paging, and how to grant what is missing')
    .option('--json', 'one JSON object')
    .action(run);
}

async function run(flags: { json?: boolean }): Promise<void> {
  const output = makeOutput(flags.json);
  const facts = await doctor();
  const { trackers, features, ...machine } = facts;
  const text = [
    Object.entries(machine)
      .filter(([, value]) => typeof value !== 'object')
      .map(([name, value]) => `${name} ${value}`)
      .join(', '),
    section('dirty trackers', trackers),
    section('paging', features),
  ].join('\n\n');
  output.result(text, facts);
}

/** Pure: one line a finding, with the reason and the remedy where it is missing. */
export function section(heading: string, findings: readonly Finding[]): string {
  return table(
    [
      { heading, text: true, cell: ({ name }) => name },
      { heading: '', text: true, cell: ({ available }) => (available ? 'yes' : 'NO') },
      {
        heading: 'why, and how to grant it',
        text: true,
        cell: ({ available, reason, remedy }) =>
          available ? reason : [reason, remedy].filter((part) => part !== '').join('; '),
      },
    ],
    findings,
  );
}
