/** The demo as a user runs it: real processes, from the compiled package. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, describe, expect, test } from 'vitest';

const main = fileURLToPath(new URL('../../lib/cli/main.js', import.meta.url));
const running = new Set<ChildProcess>();

afterEach(() => {
  for (const child of running) child.kill('SIGKILL');
  running.clear();
});

interface Run {
  child: ChildProcess;
  /** Every line of standard output, parsed. */
  lines: Record<string, unknown>[];
  /** Standard error so far. */
  errors: () => string;
  /** Resolves with the first line for which `wanted` holds. */
  line: (wanted: (line: Record<string, unknown>) => boolean) => Promise<Record<string, unknown>>;
  /**
   * Resolves when the process has ended and everyone that it started has: they share its standard error, which
   * closes with the last of them.
   */
  closed: Promise<{ code: number | null; signal: string | null }>;
}

function demo(...args: string[]): Run {
  const child = spawn(process.execPath, [main, 'demo', '--json', ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  running.add(child);
  const lines: Record<string, unknown>[] = [];
  let errors = '';
  child.stderr?.setEncoding('utf8').on('data', (text) => {
    errors += text;
  });
  const waiters: { wanted: (line: Record<string, unknown>) => boolean; resolve: (line: never) => void }[] =
    [];
  createInterface({ input: child.stdout as NodeJS.ReadableStream }).on('line', (text) => {
    const line = JSON.parse(text) as Record<string, unknown>;
    lines.push(line);
    for (const { wanted, resolve } of waiters) if (wanted(line)) resolve(line as never);
  });
  const closed = new Promise<{ code: number | null; signal: string | null }>((resolve) => {
    child.once('close', (code, signal) => {
      running.delete(child);
      resolve({ code, signal });
    });
  });
  const line = (wanted: (line: Record<string, unknown>) => boolean) => {
    const there = lines.find(wanted);
    if (there) return Promise.resolve(there);
    return Promise.race([
      new Promise<Record<string, unknown>>((resolve) => waiters.push({ wanted, resolve })),
      closed.then(({ code }) => Promise.reject(new Error(`ended early with code ${code}: ${errors}`))),
    ]);
  };
  return { child, lines, errors: () => errors, line, closed };
}

describe('one mode', () => {
  test.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid', 'scatter'])(
    '%s: nothing is lost, and the last line says so',
    async (mode) => {
      const run = demo('--mode', mode, '--heap-mb', '24');
      const { code } = await run.closed;
      expect(run.errors()).toBe('');
      expect(code).toBe(0);
      const report = run.lines.at(-1) as Record<string, never>;
      const number = expect.any(Number);
      expect(report).toMatchObject({
        mode,
        verified: true,
        heapBytes: number,
        pauseWaitMs: number,
        downtimeMs: number,
        downtimeParts: {
          scanMs: number,
          transferMs: number,
          stateMs: number,
          prepareMs: number,
          commitMs: number,
        },
        evictionMs: number,
        totalMs: number,
        bytesOnWire: number,
        pagesSent: number,
        pagesZero: number,
        pagesResent: number,
        compression: { pages: number, rawBytes: number, encodedBytes: number, cpuMs: number },
        delta: { pages: 0, rawBytes: 0, encodedBytes: 0, cpuMs: 0 },
        rounds: number,
        remoteFaults: { count: number, p50Us: number, p99Us: number, maxUs: number },
        client: { acknowledged: number, lost: 0, duplicated: 0, staleReads: 0, longestGapMs: number },
      });
      expect(report.heapBytes).toBeGreaterThanOrEqual(24 * 2 ** 20);
      expect((report.client as unknown as { acknowledged: number }).acknowledged).toBeGreaterThan(100);
      expect(report.bytesOnWire).toBeGreaterThan(20 * 2 ** 20);
    },
  );
});

test('compressed and with deltas: what each came to is in the report', async () => {
  const flags = ['--mode', 'pre-copy', '--heap-mb', '24', '--compress', 'zstd', '--delta-cache', '64Mi'];
  const run = demo(...flags);
  const { code } = await run.closed;
  expect(run.errors()).toBe('');
  expect(code).toBe(0);
  const report = run.lines.at(-1) as { verified: boolean } & Record<
    'compression' | 'delta',
    { pages: number; rawBytes: number; encodedBytes: number; cpuMs: number }
  >;
  expect(report.verified).toBe(true);
  for (const { pages, rawBytes, encodedBytes, cpuMs } of [report.compression, report.delta]) {
    expect(pages).toBeGreaterThan(0);
    expect(encodedBytes).toBeLessThan(rawBytes);
    expect(cpuMs).toBeGreaterThan(0);
  }
});

test('every mode in turn, there and back', async () => {
  const run = demo('--heap-mb', '24');
  const { code } = await run.closed;
  expect(run.errors()).toBe('');
  expect(code).toBe(0);
  const reports = run.lines.filter(({ type }) => type === 'report');
  expect(reports.map(({ mode, from, to }) => `${mode} ${from}${to}`)).toEqual([
    'stop-and-copy AB',
    'pre-copy BA',
    'post-copy AB',
    'hybrid BA',
    'post-copy AB',
    'scatter BA',
    'scatter-pre-copy AB',
    'scatter-hybrid BA',
  ]);
  for (const { mode, slow, intermediaries, directPages } of reports) {
    const scatters = String(mode).startsWith('scatter');
    expect(intermediaries).toHaveLength(scatters ? 2 : 0);
    if (scatters) expect(slow).toBe(true);
    expect(directPages).toBeGreaterThan(0);
  }
  expect(run.lines.at(-1)).toMatchObject({
    type: 'summary',
    verified: true,
    client: { lost: 0, duplicated: 0 },
  });
}, 150_000);

test('a host that dies ends it with one line', async () => {
  const run = demo('--mode', 'hybrid', '--heap-mb', '256');
  await run.line(({ text }) => String(text).startsWith('filling'));
  // In the order in which they were forked: host A, host B, the client.
  const children = readFileSync(`/proc/${run.child.pid}/task/${run.child.pid}/children`, 'utf8').split(' ');
  process.kill(Number(children[1]), 'SIGKILL');
  expect(await run.closed).toMatchObject({ code: 1 });
  expect(run.errors()).toMatch(/^memferry: (CONNECT_FAILED|PEER_LOST): [^\n]*\n$/);
});

describe('its processes end with it', () => {
  const filling = (line: Record<string, unknown>) => String(line['text']).startsWith('filling');

  test('when it is interrupted', async () => {
    const run = demo('--mode', 'hybrid', '--heap-mb', '256');
    await run.line(filling);
    run.child.kill('SIGINT');
    const { code } = await run.closed;
    expect(code).toBe(130);
    expect(run.errors()).toMatch(/^memferry: CANCELLED: .*\n$/);
  });

  test('when it is killed', async () => {
    const run = demo('--mode', 'hybrid', '--heap-mb', '256');
    await run.line(filling);
    run.child.kill('SIGKILL');
    const { signal } = await run.closed;
    expect(signal).toBe('SIGKILL');
  });

  test('when it is killed while the guest moves', async () => {
    const run = demo('--mode', 'post-copy', '--heap-mb', '64');
    await run.line(({ type, state }) => type === 'state' && state === 'postcopy-active');
    run.child.kill('SIGKILL');
    await run.closed;
  });
});

test('a mode that does not exist is one line and exit code 2', async () => {
  const run = demo('--mode', 'teleport');
  expect(await run.closed).toMatchObject({ code: 2 });
  expect(run.errors()).toMatch(/^memferry: INVALID_ARGUMENT: [^\n]*stop-and-copy[^\n]*\n$/);
});
