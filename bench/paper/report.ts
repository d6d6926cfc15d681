/** Figures for people and for the documentation: a table on the terminal; docs/paper.md with charts and JSON. */
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { cpus, release, totalmem } from 'node:os';
import { join } from 'node:path';
import { repositoryRoot } from '../support/paths.js';
import { renderChart } from './chart.js';
import type { Check, FigureResult, PaperNumber, Point } from './result.js';

const directory = join(repositoryRoot, 'docs', 'paper');
const page = join(repositoryRoot, 'docs', 'paper.md');
/** In the paper's order. */
const order = ['1', '9', '10', '11', 'table-1', '12', '13', '14', '15', 'qemu'];

function figure(value: number): string {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : 3);
}

function cell(point: Point | undefined): string {
  if (point === undefined) return '';
  if (point.value === null) return 'not available';
  const times = point.lineTimes === null ? '' : ` (×${point.lineTimes.toFixed(2)})`;
  return `${figure(point.value)} ${point.unit}${times}`.replace('  ', ' ').trim();
}

/** Sizes as they are, measured values to six digits. */
function settingText({ setting }: FigureResult): string {
  return Object.entries(setting)
    .map(([name, value]) => {
      const exact = typeof value !== 'number' || Number.isInteger(value);
      return `${name} ${exact ? value : Number(value.toPrecision(6))}`;
    })
    .join(', ');
}

/** Rows by x, columns by series and measure. */
function grid(result: FigureResult): string[][] {
  const xs = [...new Set(result.points.map(({ x }) => x))];
  if (xs.every((x) => typeof x === 'number')) xs.sort((a, b) => Number(a) - Number(b));
  // As pressure grows.
  if (result.xName === 'MB/s') xs.reverse();
  const columns = [...new Set(result.points.map(({ series, measure }) => `${series}, ${measure}`))];
  return [
    [result.xName, ...columns],
    ...xs.map((x) => [
      String(x),
      ...columns.map((column) =>
        cell(result.points.find((p) => p.x === x && `${p.series}, ${p.measure}` === column)),
      ),
    ]),
  ];
}

function verdict({ reached }: Check): string {
  return reached === null ? 'not checked' : reached ? 'reached' : 'MISSED';
}

function checkLine(check: Check): string {
  const value = check.value === null ? '' : `${check.value.toFixed(3)}, `;
  return `${check.what}: ${value}${check.reach}`;
}

function paperLine({ what, value, unit, where, how }: PaperNumber): string {
  const said = { given: 'given', derived: 'derived from what is given', described: 'described in words' }[
    how
  ];
  return `${what}: ${figure(value).replace(/\.?0+$/, '')} ${unit} (${where}, ${said})`;
}

export function terminalTable(result: FigureResult): string {
  // One line a point: on a terminal the grid would be too wide.
  const [head, ...rows] = grid(result);
  const width = Math.max(...(head ?? []).map((name) => name.length)) + 1;
  const lines = rows.flatMap((row) =>
    row
      .slice(1)
      .flatMap((text, i) =>
        text === ''
          ? []
          : [`  ${`${head?.[0]} ${row[0]}`.padEnd(22)}${(head?.[i + 1] ?? '').padEnd(width)}${text}`],
      ),
  );
  return [
    `\n${result.title}`,
    `  ${settingText(result)}`,
    ...lines,
    ...result.notes.map((note) => `  ${note}`),
    ...result.checks.map((check) => `  ${verdict(check).padEnd(12)}${checkLine(check)}`),
    ...result.paper.map((one) => `  the paper: ${paperLine(one)}`),
    '',
  ].join('\n');
}

interface Saved extends FigureResult {
  machine: string;
  date: string;
}

function markdown(result: Saved): string {
  const rows = grid(result).map((row) => `| ${row.join(' | ')} |`);
  rows.splice(1, 0, `|${' --- |'.repeat(grid(result)[0]?.length ?? 0)}`);
  return [
    `## ${result.title}`,
    '',
    `Measured ${result.date}; ${settingText(result)}. [JSON](paper/${fileName(result.figure)}.json)`,
    '',
    ...result.charts.map((chart) => `![${chart.title}](paper/${chart.name}.svg)\n`),
    ...rows,
    '',
    ...(result.checks.length > 0 ? ['| reach | here | |', '| --- | --- | --- |'] : []),
    ...result.checks.map(
      (check) => `| ${check.what}: ${check.reach} | ${check.value?.toFixed(3) ?? ''} | ${verdict(check)} |`,
    ),
    '',
    ...result.notes.map((note) => `- ${note}`),
    '',
    ...(result.paper.length > 0
      ? ['The paper:', '', ...result.paper.map((one) => `- ${paperLine(one)}`), '']
      : []),
  ].join('\n');
}

const fileName = (name: string): string => (name.startsWith('table') ? name : `figure-${name}`);

/** Writes one figure's files, and the page afresh. */
export function writeDocumentation(result: FigureResult): void {
  mkdirSync(directory, { recursive: true });
  const saved: Saved = { ...result, machine: machine(), date: new Date().toISOString().slice(0, 10) };
  writeFileSync(join(directory, `${fileName(result.figure)}.json`), `${JSON.stringify(saved, null, 1)}\n`);
  for (const chart of result.charts) writeFileSync(join(directory, `${chart.name}.svg`), renderChart(chart));
  writePage();
}

/** From what all figures have written so far. */
function writePage(): void {
  const results = readdirSync(directory)
    .filter((name) => name.endsWith('.json'))
    .map((name) => JSON.parse(readFileSync(join(directory, name), 'utf8')) as Saved)
    .sort((a, b) => order.indexOf(a.figure) - order.indexOf(b.figure));
  writeFileSync(page, [introduction(results), ...results.map(markdown)].join('\n'));
}

/** What nobody has measured yet is said, not left out. */
function missing(results: readonly { figure: string }[]): string {
  const names = order.filter((name) => !results.some((result) => result.figure === name));
  return names.length === 0 ? '' : `\nNot measured at this size yet: ${names.join(', ')}.\n`;
}

function machine(): string {
  const gib = Math.round(totalmem() / 2 ** 30);
  return `${cpus().length} CPUs (${cpus()[0]?.model ?? 'unknown'}), ${gib} GiB, Linux ${release().split('-')[0]}, Node ${process.versions.node}`;
}

function introduction(results: Saved[]): string {
  const where = [...new Set(results.map((result) => result.machine))].sort();
  return `# The paper's evaluation, here

What \`npm run bench:paper -- --write\` gave, beside the numbers of Deshpande et al., *Scatter-Gather Live Migration of
Virtual Machines*. This page is written by it. The paper's machines had 5 GB guests, 1 Gb/s Ethernet and destinations of
12 to 26 GB; here hosts are network namespaces of one machine, each behind a link of its own, and a destination is put
under pressure by a memory cgroup with compressed swap, a neighbour that thrashes, and a CPU quota, calibrated with a
bare writer. *Line time* is the guest's bytes over the goodput of a raw socket in the same run; ×N means N line times.
Charts show line times, so that guests of other sizes compare; values are medians. Of the paper's numbers *given* ones
stand in its text, *derived* ones follow from it, and *described* ones are said in words only; what only its pictures
show is left out.

Measured on: ${where.join('; ')}.
${missing(results)}`;
}
