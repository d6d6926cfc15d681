import { CommanderError } from 'commander';
import { describe, expect, test } from 'vitest';
import { section } from '../../src/cli/doctor.js';
import { describeProgress } from '../../src/cli/live-progress.js';
import { describeError, describeUsageError } from '../../src/cli/output.js';
import { describeEncodings, figure, table } from '../../src/demo/table.js';
import { memferryError } from '../../src/errors.js';

describe('errors', () => {
  test('are one line with the code, whatever the message looks like', () => {
    const error = memferryError('CONNECT_FAILED', 'nobody\n  listens');
    expect(describeError(error, false)).toEqual({
      text: 'memferry: CONNECT_FAILED: nobody listens\n',
      exitCode: 1,
    });
  });

  test('do not move the cursor of a terminal, whoever wrote them', () => {
    const error = memferryError('VMD_LOST', 'server \u001b[31mred\u0007\u009b2J ok\u00e9');
    expect(describeError(error, false).text).toBe('memferry: VMD_LOST: server ?[31mred??2J ok\u00e9\n');
  });

  test('of Node say their code once', () => {
    const error = Object.assign(new Error("ENOENT: no such file or directory, open '/x'"), {
      code: 'ENOENT',
    });
    expect(describeError(error, false).text).toBe("memferry: ENOENT: no such file or directory, open '/x'\n");
  });

  test('show the stack and its cause only to who asks', () => {
    const error = memferryError('PEER_LOST', 'gone', { cause: new Error('reset') });
    expect(describeError(error, false).text).not.toContain(' at ');
    expect(describeError(error, true).text).toMatch(/ at [\s\S]*caused by: Error: reset/);
  });

  test.each([
    ['INVALID_ARGUMENT', 2],
    ['UNSUPPORTED_PLATFORM', 3],
    ['USERFAULTFD_UNAVAILABLE', 3],
    ['MIGRATION_IN_DOUBT', 4],
    ['GUEST_LOST', 4],
    ['CANCELLED', 130],
    ['GUEST_BUSY', 1],
  ] as const)('%s has exit code %i', (code, exitCode) => {
    expect(describeError(memferryError(code, 'x'), false).exitCode).toBe(exitCode);
  });

  test('that are none of ours, or no errors at all, are told as well', () => {
    expect(describeError(new Error('x'), false)).toEqual({ text: 'memferry: ERROR: x\n', exitCode: 1 });
    expect(describeError('x', false)).toEqual({ text: 'memferry: ERROR: x\n', exitCode: 1 });
    expect(describeError(undefined, false)).toEqual({ text: 'memferry: ERROR: undefined\n', exitCode: 1 });
  });

  test('of the command line were told by the parser already', () => {
    expect(describeError(new CommanderError(1, 'commander.x', 'x'), false)).toEqual({
      text: '',
      exitCode: 2,
    });
    expect(describeError(new CommanderError(0, 'commander.help', 'x'), false)).toEqual({
      text: '',
      exitCode: 0,
    });
    expect(describeUsageError("error: unknown option '--x'\n(Did you mean --y?)\n")).toBe(
      "memferry: INVALID_ARGUMENT: unknown option '--x' (Did you mean --y?)\n",
    );
  });
});

describe('tables', () => {
  test('align text to the left and figures to the right', () => {
    const text = table(
      [
        { heading: 'name', text: true, cell: ({ name }: { name: string; value: number }) => name },
        { heading: 'ms', cell: ({ value }) => figure(value) },
      ],
      [
        { name: 'a', value: 1234.5 },
        { name: 'longer', value: 0.0123 },
      ],
    );
    expect(text.split('\n')).toEqual(['name       ms', '------  -----', 'a        1235', 'longer  0.012']);
  });

  test('figures have three digits that matter', () => {
    expect([0, 0.5, 5, 50.04, 500.4, Number.NaN].map(figure)).toEqual([
      '0',
      '0.500',
      '5.00',
      '50.0',
      '500',
      '-',
    ]);
  });
});

test('what is missing is told with its reason and its remedy', () => {
  const text = section('paging', [
    { name: 'userfaultfd', available: false, reason: 'EPERM', remedy: 'be root' },
    { name: 'WP_ASYNC', available: true, reason: '', remedy: '' },
  ]);
  expect(text).toContain('EPERM; be root');
  expect(text).toMatch(/userfaultfd +NO/);
  expect(text).toMatch(/WP_ASYNC +yes/);
});

describe('progress beside the bar', () => {
  const sample = {
    state: 'active' as const,
    elapsedMs: 10,
    round: 2,
    dirtyPagesPerSecond: null,
    bytesOnWire: 2 ** 20,
    bytesPerSecond: 2 ** 30,
    pagesPending: 1,
    pagesTotal: 2,
    expectedDowntimeMs: null,
    remoteFaults: 0,
    bytesSaved: { compression: 0, delta: 0 },
    pagesFromBase: 0,
    pagesDeduplicated: 0,
    waitingFor: null,
  };
  test('says what is known', () => {
    expect(describeProgress(sample)).toBe('active, round 2, 1024 MiB/s, 1.00 MiB sent');
    expect(
      describeProgress({ ...sample, dirtyPagesPerSecond: 500, expectedDowntimeMs: 2.5, remoteFaults: 3 }),
    ).toBe(
      'active, round 2, 1024 MiB/s, 1.00 MiB sent, 500 dirty pages/s, downtime ~2.50 ms, 3 remote faults',
    );
    expect(describeProgress({ ...sample, bytesSaved: { compression: 2 ** 20, delta: 2 ** 19 } })).toBe(
      'active, round 2, 1024 MiB/s, 1.00 MiB sent, 1.50 MiB saved',
    );
  });
});

describe('what encodings came to', () => {
  const nothing = { pages: 0, rawBytes: 0, encodedBytes: 0, cpuMs: 3 };
  test('a line for each that was used', () => {
    expect(describeEncodings({ compression: nothing, delta: nothing })).toEqual([]);
    expect(
      describeEncodings({
        compression: { pages: 512, rawBytes: 2 ** 21, encodedBytes: 2 ** 20, cpuMs: 12.34 },
        delta: { pages: 256, rawBytes: 2 ** 20, encodedBytes: 2 ** 14, cpuMs: 0.5 },
      }),
    ).toEqual([
      '  compressed: 512 pages of 2.00 MiB as 1.00 MiB, 12.3 ms of CPU',
      '  deltas: 256 pages of 1.00 MiB as 0.016 MiB, 0.500 ms of CPU',
    ]);
  });
});
