/** What `npm run bench:paper` is told on its command line. */
import { parseArgs } from 'node:util';

export interface PaperOptions {
  /** Names as the paper numbers them: '1', '9', '10', '11', 'table-1', '12', '13', '14', '15'; 'qemu' besides. */
  figures: string[];
  json: boolean;
  /** Writes docs/paper.md and docs/paper/. */
  write: boolean;
  /** Bytes of the guest; a gang's guests have a quarter of it each. */
  guestBytes: number;
  trials: number;
  /** Of every host's link, as tc writes it. */
  link: string;
  /** Of the pressure's steps, those with these positions (1 to 5). */
  steps: number[];
  /** Of a series over intermediaries or guests, those with these numbers. */
  counts: number[] | null;
}

export const usage = `usage: npm run bench:paper [-- FIGURE…] [options]
  FIGURE            1, 9, 10, 11, table-1, 12, 13, 14, 15 or qemu; all without
  --size BYTES      the guest's, as 1GiB or 64MiB (1GiB); figures 11, 13, 14 move guests of a quarter of it
  --trials N        the median of so many (3)
  --link RATE       of every host, as tc writes it (1gbit)
  --steps LIST      figures 1, 9, 10: which of the pressure's five steps (1,2,3,4,5)
  --counts LIST     figures 11, 13, 14, 15: which numbers of guests or intermediaries (all)
  --json            one JSON object a figure instead of tables
  --write           docs/paper.md and docs/paper/: what was measured, with charts
`;

export class UsageError extends Error {}

const units: Record<string, number> = { '': 1, k: 2 ** 10, m: 2 ** 20, g: 2 ** 30 };
const least = 16 * 2 ** 20;
const most = 4 * 2 ** 30;

/** `64MiB`, `1g`: powers of two; a multiple of four huge pages, so that a quarter of it is one too. */
function size(text: string): number {
  const match = /^(\d+)\s*(k|m|g)?(?:i?b)?$/i.exec(text.trim());
  const bytes = Number(match?.[1]) * (units[(match?.[2] ?? '').toLowerCase()] ?? Number.NaN);
  if (!(bytes >= least && bytes <= most) || bytes % (8 * 2 ** 20) !== 0) {
    throw new UsageError(`--size: write a multiple of 8MiB from 16MiB to 4GiB, not '${text}'`);
  }
  return bytes;
}

/** Of a rate as tc writes it. */
export function linkMbits(rate: string): number {
  const match = /^([\d.]+)([kmg]?)bit$/.exec(rate);
  const unit = { '': 1e-6, k: 1e-3, m: 1, g: 1e3 }[match?.[2] ?? ''] ?? Number.NaN;
  return Number(match?.[1]) * unit;
}

function numbers(flag: string, text: string, from: number, to: number): number[] {
  const list = text.split(',').map(Number);
  if (list.some((value) => !Number.isInteger(value) || value < from || value > to)) {
    throw new UsageError(`${flag}: write whole numbers from ${from} to ${to}, with commas between`);
  }
  return [...new Set(list)].sort((a, b) => a - b);
}

export function parseOptions(args: string[], known: readonly string[]): PaperOptions {
  let parsed: ReturnType<typeof parse>;
  try {
    parsed = parse(args);
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error));
  }
  const { values, positionals } = parsed;
  const figures = positionals.map((name) => name.toLowerCase().replace(/^(figure|fig)[-.]?/, ''));
  const unknown = figures.filter((name) => !known.includes(name));
  if (unknown.length > 0)
    throw new UsageError(`no figure ${unknown.join(', ')}; there are ${known.join(', ')}`);
  if (!/^\d+(\.\d+)?[kmg]?bit$/.test(values.link)) throw new UsageError(`--link: not a rate: ${values.link}`);
  if (!/^[1-9]\d?$/.test(values.trials)) throw new UsageError('--trials: write a number from 1 to 99');
  return {
    figures: figures.length > 0 ? figures : [...known],
    json: values.json,
    write: values.write,
    guestBytes: size(values.size),
    trials: Number(values.trials),
    link: values.link,
    steps: numbers('--steps', values.steps, 1, 5),
    counts: values.counts === undefined ? null : numbers('--counts', values.counts, 0, 5),
  };
}

function parse(args: string[]) {
  return parseArgs({
    args,
    allowPositionals: true,
    options: {
      json: { type: 'boolean', default: false },
      write: { type: 'boolean', default: false },
      size: { type: 'string', default: '1GiB' },
      trials: { type: 'string', default: '3' },
      link: { type: 'string', default: '1gbit' },
      steps: { type: 'string', default: '1,2,3,4,5' },
      counts: { type: 'string' },
    },
  });
}
