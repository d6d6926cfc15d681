/** Values on the command line: numbers within bounds, sizes with their units, modes, NAME=PATH pairs. */
import { pathToFileURL } from 'node:url';
import { resolve } from 'node:path';
import { InvalidArgumentError } from 'commander';
import { sha256OfModule } from '../worker/module-file.js';

export function wholeNumber(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < least || value > most) {
      throw new InvalidArgumentError(`write a whole number from ${least} to ${most}.`);
    }
    return value;
  };
}

/** Permissions. */
export function octal(text: string): number {
  if (!/^0?[0-7]{1,3}$/.test(text)) throw new InvalidArgumentError('write permissions in octal, as 660.');
  return Number.parseInt(text, 8);
}

export function positiveNumber(text: string): number {
  const value = Number(text);
  if (!(value > 0) || !Number.isFinite(value)) throw new InvalidArgumentError('write a number above 0.');
  return value;
}

/** `12.5` or `12.5%`: of a hundred. */
export function percent(text: string): number {
  const value = Number(text.replace(/%$/, ''));
  if (text.trim() === '' || !(value >= 0 && value <= 100)) {
    throw new InvalidArgumentError('write a number from 0 to 100.');
  }
  return value;
}

const units: Record<string, number> = {
  '': 1,
  k: 1e3,
  m: 1e6,
  g: 1e9,
  ki: 2 ** 10,
  mi: 2 ** 20,
  gi: 2 ** 30,
  t: 1e12,
  ti: 2 ** 40,
};

/** `100M`, `1.5Gi`, `65536`: bytes. */
export function byteCount(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?$/i.exec(text.trim());
  const unit = units[(match?.[2] ?? '').toLowerCase()];
  if (!match || unit === undefined) throw new InvalidArgumentError('write bytes, as 65536, 100M or 1.5Gi.');
  const bytes = Math.round(Number(match[1]) * unit);
  // 0 is for no limit, in most places.
  if (bytes === 0 && Number(match[1]) > 0) throw new InvalidArgumentError('write at least one byte.');
  return bytes;
}

/** `100M`, `1Gi/s`: bytes a second. */
export function byteRate(text: string): number {
  return byteCount(text.trim().replace(/\/s$/i, ''));
}

const durationUnits: Record<string, number> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 };
/** Timers of the platform end here. */
const longestMs = 24 * 86_400_000;

/** `30s`, `15m`, `12h`, `7d`: milliseconds. */
export function duration(text: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)$/i.exec(text.trim());
  const ms = Math.round(Number(match?.[1]) * (durationUnits[(match?.[2] ?? '').toLowerCase()] ?? Number.NaN));
  if (!(ms > 0) || ms > longestMs) {
    throw new InvalidArgumentError('write a time with its unit, as 90s, 15m, 12h or 7d, at most 24d.');
  }
  return ms;
}

export interface NamedModule {
  name: string;
  path: string;
}

/** `NAME=PATH`; the path as from here. */
export function namedModule(text: string): NamedModule {
  const match = /^([A-Za-z0-9._-]{1,64})=(.+)$/s.exec(text);
  if (!match)
    throw new InvalidArgumentError('write NAME=PATH, the name of letters, digits, dots and dashes.');
  return { name: match[1] as string, path: resolve(match[2] as string) };
}

export function namedModules(text: string, before: NamedModule[] | undefined): NamedModule[] {
  return oneMore('modules', namedModule(text), before);
}

/** Found here, not when a guest is refused for it. @throws INVALID_ARGUMENT */
export async function readableModules(named: readonly NamedModule[]): Promise<Record<string, URL>> {
  const modules = named.map(({ name, path }): [string, URL] => [name, pathToFileURL(path)]);
  for (const [, url] of modules) await sha256OfModule(url);
  return Object.fromEntries(modules);
}

/** `REGION=FILE`: the image of a region. */
export function regionImages(text: string, before: NamedModule[] | undefined): NamedModule[] {
  return oneMore('images', namedModule(text), before);
}

function oneMore(what: string, one: NamedModule, before: NamedModule[] | undefined): NamedModule[] {
  if (before?.some(({ name }) => name === one.name)) {
    throw new InvalidArgumentError(`there are two ${what} named ${one.name}.`);
  }
  return [...(before ?? []), one];
}
