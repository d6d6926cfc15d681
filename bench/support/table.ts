/** Figures for people: one line each, in columns. */
import type { Result } from './result.js';

const columns = { trial: 10, case: 34, value: 18, floor: 10, ratio: 7 } as const;

function figure(value: number | null): string {
  if (value === null) return '-';
  const size = Math.abs(value);
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 1 ? 2 : 3);
}

export function heading(): string {
  return (
    'trial'.padEnd(columns.trial) +
    'case'.padEnd(columns.case) +
    'value'.padStart(columns.value) +
    'floor'.padStart(columns.floor) +
    'ratio'.padStart(columns.ratio) +
    '  reach\n'
  );
}

export function row(result: Result): string {
  const verdict = result.reached === null ? ' ' : result.reached ? '✓' : '✗';
  const reach = [result.reach, result.note].filter((text) => text !== null && text !== undefined).join('; ');
  return (
    result.trial.padEnd(columns.trial) +
    result.case.padEnd(columns.case) +
    `${figure(result.value)} ${result.unit}`.padStart(columns.value) +
    figure(result.floor).padStart(columns.floor) +
    figure(result.ratio).padStart(columns.ratio) +
    `  ${verdict} ${reach}\n`
  );
}
