/** Tables and figures for people: plain text, numbers right-aligned, units in the heading. */
import type { EncodingReport } from '../report.js';
import type { DemoReport } from './driver.js';

export interface Column<Row> {
  heading: string;
  cell: (row: Row) => string;
  /** Text goes left; figures, the default, right. */
  text?: boolean;
}

export function table<Row>(columns: readonly Column<Row>[], rows: readonly Row[]): string {
  const cells = [
    columns.map(({ heading }) => heading),
    ...rows.map((row) => columns.map(({ cell }) => cell(row))),
  ];
  const widths = columns.map((_, index) => Math.max(...cells.map((line) => (line[index] as string).length)));
  const lines = cells.map((line) =>
    line
      .map((cell, index) => {
        const width = widths[index] as number;
        return columns[index]?.text ? cell.padEnd(width) : cell.padStart(width);
      })
      .join('  ')
      .trimEnd(),
  );
  lines.splice(1, 0, widths.map((width) => '-'.repeat(width)).join('  '));
  return lines.join('\n');
}

function savedBy({ rawBytes, encodedBytes }: EncodingReport): number {
  return rawBytes - encodedBytes;
}

/** Three figures: 0.123, 1.23, 12.3, 123, 1234. */
export function figure(value: number): string {
  if (!Number.isFinite(value)) return '-';
  const digits = value >= 100 ? 0 : value >= 10 ? 1 : value >= 1 ? 2 : 3;
  return value === 0 ? '0' : value.toFixed(digits);
}

export function mebibytes(bytes: number): string {
  return figure(bytes / 2 ** 20);
}

/** Pure: a line for each encoding that was used. */
export function describeEncodings(report: { compression: EncodingReport; delta?: EncodingReport }): string[] {
  const line = (what: string, encoding: EncodingReport | undefined) =>
    encoding && encoding.pages > 0
      ? [
          `  ${what}: ${encoding.pages} pages of ${mebibytes(encoding.rawBytes)} MiB as ` +
            `${mebibytes(encoding.encodedBytes)} MiB, ${figure(encoding.cpuMs)} ms of CPU`,
        ]
      : [];
  return [...line('compressed', report.compression), ...line('deltas', report.delta)];
}

const columns: Column<DemoReport>[] = [
  { heading: 'mode', text: true, cell: ({ mode, slow }) => (slow ? `${mode} *` : mode) },
  { heading: 'way', text: true, cell: ({ from, to }) => `${from}>${to}` },
  { heading: 'pause ms', cell: ({ pauseWaitMs }) => figure(pauseWaitMs) },
  { heading: 'downtime ms', cell: ({ downtimeMs }) => figure(downtimeMs) },
  { heading: 'eviction ms', cell: ({ evictionMs }) => figure(evictionMs) },
  { heading: 'gather ms', cell: ({ gatherMs }) => figure(gatherMs) },
  { heading: 'total ms', cell: ({ totalMs }) => figure(totalMs) },
  { heading: 'wire MiB', cell: ({ bytesOnWire }) => mebibytes(bytesOnWire) },
  {
    heading: 'saved MiB',
    cell: ({ compression, delta }) => mebibytes(savedBy(compression) + savedBy(delta)),
  },
  { heading: 'rounds', cell: ({ rounds }) => String(rounds) },
  { heading: 'sent', cell: ({ pagesSent }) => String(pagesSent) },
  { heading: 'zero', cell: ({ pagesZero }) => String(pagesZero) },
  { heading: 'direct', cell: ({ directPages }) => String(directPages) },
  { heading: 'resent', cell: ({ pagesResent }) => String(pagesResent) },
  { heading: 'faults', cell: ({ remoteFaults }) => String(remoteFaults.count) },
  { heading: 'p50 us', cell: ({ remoteFaults: { count, p50Us } }) => (count ? figure(p50Us) : '-') },
  { heading: 'p99 us', cell: ({ remoteFaults: { count, p99Us } }) => (count ? figure(p99Us) : '-') },
  { heading: 'client gap ms', cell: ({ client }) => figure(client.longestGapMs) },
];

/** The table, the client's account below it, and the verdict. */
export function demoSummary(reports: readonly DemoReport[]): string {
  const last = reports.at(-1);
  if (!last) return 'nothing was run';
  const { acknowledged, lost, duplicated, staleReads } = last.client;
  const ok = reports.every(({ verified }) => verified);
  return [
    `heap ${mebibytes(last.heapBytes)} MiB; pages sent, zero and resent; the client's gap before the move: ` +
      `${reports.map(({ client }) => figure(client.before.longestGapMs)).join(', ')} ms`,
    '',
    table(columns, reports),
    ...(reports.some(({ slow }) => slow)
      ? ['* to a destination that takes in a sixth of what the source sends']
      : []),
    ...reports.flatMap(({ mode, intermediaries }) =>
      intermediaries.length === 0
        ? []
        : `${mode}: ${intermediaries.map(({ name, pages }) => `${pages} pages through ${name}`).join(', ')}; ` +
          'the source was ended when it was evicted',
    ),
    '',
    `${acknowledged} writes acknowledged, ${lost} lost, ${duplicated} applied twice; ${staleReads} stale reads`,
    `PRAGMA integrity_check: ${last.integrity}; digests ${reports.every((r) => r.digestsEqual) ? 'equal' : 'NOT equal'}`,
    ok ? 'verified' : 'NOT verified',
  ].join('\n');
}
