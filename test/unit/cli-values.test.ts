import { resolve } from 'node:path';
import { Command } from 'commander';
import { describe, expect, test } from 'vitest';
import { parseRequest } from '../../src/cli/guest-console.js';
import { addServerFlags, type ServerFlags, serverOptions } from '../../src/cli/leaving-guest.js';
import {
  byteCount,
  namedModule,
  namedModules,
  positiveNumber,
  readableModules,
  regionImages,
  wholeNumber,
} from '../../src/cli/parse-values.js';

test('modules are looked for before anybody waits for guests', async () => {
  const [here, there] = [new URL(import.meta.url).pathname, '/nope/b.mjs'];
  expect(await readableModules([{ name: 'a', path: here }])).toEqual({ a: new URL(import.meta.url) });
  const both = [
    { name: 'a', path: here },
    { name: 'b', path: there },
  ];
  await expect(readableModules(both)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining(there),
  });
});

describe('whole numbers', () => {
  test('within the bounds pass', () => {
    expect(wholeNumber(1, 16)('1')).toBe(1);
    expect(wholeNumber(1, 16)('16')).toBe(16);
  });
  test.each(['0', '17', '-1', '1.5', '1e1', '', 'x', ' 3'])('%j is refused', (text) => {
    expect(() => wholeNumber(1, 16)(text)).toThrow('whole number from 1 to 16');
  });
});

describe('numbers above 0', () => {
  test('may have a fraction', () => expect(positiveNumber('0.5')).toBe(0.5));
  test.each(['0', '-1', 'NaN', 'Infinity', ''])('%j is refused', (text) => {
    expect(() => positiveNumber(text)).toThrow('above 0');
  });
});

describe('bytes', () => {
  test.each([
    ['65536', 65536],
    ['100M', 100e6],
    ['1.5Gi', 1.5 * 2 ** 30],
    ['64KiB', 65536],
    ['2 mb', 2e6],
    ['2Ti', 2 ** 41],
    ['0', 0],
  ])('%s', (text, value) => expect(byteCount(text)).toBe(value));
  test.each(['', 'M', '-1', '1P', '1.M', '0x10', '1Mi i'])('%j is refused', (text) => {
    expect(() => byteCount(text)).toThrow('write bytes');
  });
  test.each(['0.4', '0.0001k'])('%j is not 0, which would be no limit', (text) => {
    expect(() => byteCount(text)).toThrow('at least one byte');
  });
});

describe('the rate of the link', () => {
  const optionsOf = (...words: string[]) => {
    const command = addServerFlags(new Command().exitOverride().configureOutput({ writeErr: () => {} }));
    return serverOptions(command.parse(words, { from: 'user' }).opts<ServerFlags>());
  };
  test.each([
    ['125M', 125e6],
    ['2TiB/s', 2 ** 41],
    ['1Gi/s', 2 ** 30],
    ['1.25g/S', 1.25e9],
  ])('%s', (text, value) =>
    expect(optionsOf('--link-rate', text)).toMatchObject({ linkBytesPerSecond: value }),
  );
  test('is not known where it is not said', () => {
    expect(optionsOf()).not.toHaveProperty('linkBytesPerSecond');
  });
  test.each(['fast', '125 Mbit', ''])('%j is refused', (text) => {
    expect(() => optionsOf('--link-rate', text)).toThrow('write bytes');
  });
});

describe('modules', () => {
  test('have a name and a path from here', () => {
    expect(namedModule('a-1=./x=y.mjs')).toEqual({ name: 'a-1', path: resolve('./x=y.mjs') });
  });
  test.each(['', 'a', '=x', 'a=', 'a b=x', `${'a'.repeat(65)}=x`])('%j is refused', (text) => {
    expect(() => namedModule(text)).toThrow('NAME=PATH');
  });
  test('a name stands for one module', () => {
    const one = namedModules('a=x', undefined);
    expect(namedModules('b=y', one)).toHaveLength(2);
    expect(() => namedModules('a=y', one)).toThrow('two modules named a');
    expect(() => regionImages('a=y', one)).toThrow('two images named a');
  });
});

test('a typed line is JSON, or else itself', () => {
  expect(parseRequest('{"add": 1}')).toEqual({ add: 1 });
  expect(parseRequest('read')).toBe('read');
  expect(parseRequest('{"add"')).toBe('{"add"');
});
