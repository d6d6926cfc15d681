/** `send` keeps a guest of which nobody knows where it runs, and asks until somebody does. */
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { untilKnown } from '../../src/cli/in-doubt.js';
import { memferryError } from '../../src/errors.js';

const doubt = memferryError('MIGRATION_IN_DOUBT', 'no answer');
const code = (code: string) => expect.objectContaining({ code });
type Answer = 'source' | 'destination' | Error | Promise<never>;

let lines: object[];
let said: string;
let calls: number;
let interruption: AbortController;

beforeEach(() => {
  [lines, said, calls, interruption] = [[], '', 0, new AbortController()];
  vi.spyOn(process.stderr, 'write').mockImplementation((text) => {
    said += text;
    return true;
  });
});
afterEach(() => vi.restoreAllMocks());

/** `first`: how the migration ends; `answers`: of the destination, one a time that it is asked. */
function run(first: Error, answers: Answer[]): Promise<string> {
  const migration = {
    resolve: async () => {
      const answer = answers.shift() as Answer;
      if (answer instanceof Error) throw answer;
      return await answer;
    },
  };
  const outcome = async () => {
    if (++calls === 1) throw first;
    return 'report';
  };
  const output = { json: true, say() {}, line: (value: object) => void lines.push(value), result() {} };
  return untilKnown(migration, outcome, output, interruption.signal);
}

test('it runs there after all', async () => {
  expect(await run(doubt, [doubt, doubt, 'destination'])).toBe('report');
  expect(calls).toBe(2);
  expect(lines).toEqual([{ type: 'in-doubt', message: 'no answer' }]);
  expect(said).toMatch(/^memferry: MIGRATION_IN_DOUBT: no answer\. [^\n]*Ctrl-C[^\n]*\n$/);
});

test('it was never taken', async () => {
  await expect(run(doubt, [doubt, 'source'])).rejects.toEqual(code('PEER_LOST'));
  expect(calls).toBe(1);
});

test('it is lost', async () => {
  await expect(run(doubt, [memferryError('GUEST_LOST', 'restarted')])).rejects.toEqual(code('GUEST_LOST'));
});

test('interrupted while the destination is asked', async () => {
  const running = run(doubt, [doubt, new Promise(() => {})]);
  setImmediate(() => interruption.abort());
  await expect(running).rejects.toBe(doubt);
});

test('interrupted before, it is not asked', async () => {
  interruption.abort();
  await expect(run(doubt, [])).rejects.toBe(doubt);
  expect(said).toBe('');
});

test('what else fails is told as it is', async () => {
  const error = memferryError('GUEST_BUSY', 'busy');
  await expect(run(error, [])).rejects.toBe(error);
  expect([lines, said]).toEqual([[], '']);
});
