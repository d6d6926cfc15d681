/** `memferry status`: what a VMD server holds. */
import type { Command } from 'commander';
import { type Column, mebibytes, table } from '../demo/table.js';
import type { StageStatus } from '../protocol/stage-messages.js';
import { addConnectionFlags, type ConnectionFlags } from './connection-flags.js';
import { makeOutput, printable } from './output.js';
import { withStageClient } from './stage-client.js';

type HeldImage = StageStatus['held'][number];

export function addStatus(program: Command): void {
  const command = program
    .command('status')
    .description('say what a VMD server holds')
    .argument('<host:port>', 'of a `memferry stage`')
    .option('--json', 'one JSON object');
  addConnectionFlags(command).action(run);
}

async function run(address: string, flags: ConnectionFlags & { json?: boolean }): Promise<void> {
  const output = makeOutput(flags.json);
  const status = await withStageClient(address, flags, (client) => client.status());
  output.result(describeStatus(status), { type: 'status', ...status });
}

const columns: Column<HeldImage>[] = [
  { heading: 'image', text: true, cell: ({ id }) => id },
  { heading: 'name', text: true, cell: ({ name }) => cell(name) },
  { heading: 'kind', text: true, cell: ({ kind }) => kind },
  { heading: 'phase', text: true, cell: ({ phase }) => phase },
  { heading: 'server', cell: ({ ordinal, servers }) => `${ordinal + 1}/${servers}` },
  { heading: 'pages here', cell: ({ pagesHeld }) => String(pagesHeld) },
  { heading: 'shared', cell: ({ pagesShared }) => String(pagesShared) },
  { heading: 'zero', cell: ({ pagesZero }) => String(pagesZero) },
  { heading: 'of', cell: ({ pages }) => String(pages) },
  { heading: 'MiB', cell: ({ bytes }) => mebibytes(bytes) },
  { heading: 'age', cell: ({ ageMs }) => age(ageMs) },
];

/** Pure. */
export function describeStatus(status: StageStatus): string {
  const { name, rack, memoryBytes, freeBytes, bandwidth, connections, held, maxImages, sharedPages } = status;
  const { members, popularNames, popularPages } = status;
  const facts = [
    `${cell(name)}${rack === null ? '' : ` (rack ${cell(rack)})`}`,
    `${mebibytes(freeBytes)} of ${mebibytes(memoryBytes)} MiB free`,
    bandwidth === 0 ? 'no bandwidth limit' : `at most ${mebibytes(bandwidth)} MiB/s each way`,
    `${connections} connections`,
    `up ${age(status.uptimeMs)}`,
    ...(sharedPages > 0 ? [`${sharedPages} pages shared`] : []),
    ...(members > 0 ? [`${members} members of domains`] : []),
    ...(popularNames > 0 ? [`${popularPages} popular pages of ${popularNames} that are counted`] : []),
    `${held.length} of at most ${maxImages} images`,
  ].join(', ');
  return held.length === 0 ? facts : `${facts}\n\n${table(columns, held)}`;
}

/** One unit: 45s, 12m, 3h, 2d. */
export function age(ms: number): string {
  const seconds = Math.floor(ms / 1000);
  if (seconds < 120) return `${seconds}s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)}h`;
  return `${Math.floor(seconds / 86_400)}d`;
}

/** A name, in a cell of a table. */
function cell(name: string): string {
  return printable(name).replace(/[\t\n]/g, '?');
}
