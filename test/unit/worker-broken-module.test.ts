/** A guest whose module is broken: said at the host that starts it, with the file, and what its code threw. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, expect, it } from 'vitest';
import { ArgumentError } from '../../lib/index.js';
import { WorkerGuest } from '../../lib/worker/index.js';

const folder = mkdtempSync(join(tmpdir(), 'memferry-broken-'));
afterAll(() => rmSync(folder, { recursive: true }));

it.each([
  ['does not parse', 'export default {{', 'SyntaxError', /SyntaxError/],
  ['throws as it is loaded', 'throw new TypeError("at the top")', 'TypeError', /TypeError: at the top/],
  [
    'throws in create',
    'export default { create() { throw new RangeError("no room"); }, handle() {} }',
    'RangeError',
    /RangeError: no room/,
  ],
  ['exports nothing', 'export const x = 1;', 'ArgumentError', /no default export made by defineGuest/],
])('%s', async (what, text, name, message) => {
  const path = join(folder, `${what.replaceAll(' ', '-')}.mjs`);
  writeFileSync(path, text);
  const error = await WorkerGuest.start({ module: { name: 'm', url: pathToFileURL(path) } }).then(
    () => null,
    (thrown: unknown) => thrown as ArgumentError,
  );
  expect(error).toBeInstanceOf(ArgumentError);
  expect(error?.code).toBe('INVALID_ARGUMENT');
  expect(error?.message).toMatch(message);
  expect(error?.message).toContain(path);
  expect(error?.cause).toBeInstanceOf(Error);
  expect(error?.cause).toMatchObject({
    name,
    stack: expect.stringContaining(name === 'ArgumentError' ? '' : name),
  });
});
