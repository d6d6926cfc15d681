/** The `memferry` command as one types it: a process, its JSON line by line, and what it is told. */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomInt } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach } from 'vitest';

const main = fileURLToPath(new URL('../../lib/cli/main.js', import.meta.url));
export const counter = fileURLToPath(new URL('../../examples/counter/counter.mjs', import.meta.url));

const running = new Set<ChildProcess>();

/** A directory and a secret for each test of this file; its commands end with the test. */
export function forEachTest(): { directory: string; secretFile: string } {
  const place = { directory: '', secretFile: '' };
  beforeEach(() => {
    place.directory = mkdtempSync(join(tmpdir(), 'memferry-test-'));
    place.secretFile = join(place.directory, 'secret');
    writeFileSync(place.secretFile, 'a'.repeat(64), { mode: 0o600 });
  });
  afterEach(() => {
    for (const child of running) child.kill('SIGKILL');
    running.clear();
    rmSync(place.directory, { recursive: true, force: true });
  });
  return place;
}

/**
 * A loopback address for a port that has to be free again when its server is gone: on 127.0.0.1 somebody else's test may
 * get it meanwhile, or a dial in vain may have it as its own.
 */
export function loopbackOfItsOwn(): string {
  const [a, b, c] = Array.from({ length: 3 }, () => randomInt(1, 255));
  return `127.${a}.${b}.${c}`;
}

export type Line = Record<string, unknown>;

/** One command, its output line by line: each call of `next` waits for the next line of that type. */
export function command(...args: string[]) {
  const child = spawn(process.execPath, [main, ...args, '--json'], {
    stdio: ['pipe', 'pipe', 'pipe'],
  });
  running.add(child);
  let errors = '';
  child.stderr.setEncoding('utf8').on('data', (text) => {
    errors += text;
  });
  const unread: Line[] = [];
  const waiters: { type: string; resolve: (line: Line) => void }[] = [];
  const lines: Line[] = [];
  createInterface({ input: child.stdout }).on('line', (text) => {
    const line = JSON.parse(text) as Line;
    lines.push(line);
    const index = waiters.findIndex(({ type }) => type === line['type']);
    if (index >= 0) waiters.splice(index, 1)[0]?.resolve(line);
    else unread.push(line);
  });
  const closed = new Promise<number | null>((resolve) => {
    child.once('close', (code) => {
      running.delete(child);
      resolve(code);
    });
  });
  const next = (type: string): Promise<Line> => {
    const index = unread.findIndex((line) => line['type'] === type);
    if (index >= 0) return Promise.resolve(unread.splice(index, 1)[0] as Line);
    return Promise.race([
      new Promise<Line>((resolve) => waiters.push({ type, resolve })),
      closed.then((code) => Promise.reject(new Error(`ended with ${code} before '${type}': ${errors}`))),
    ]);
  };
  const ask = async (request: unknown) => {
    child.stdin.write(`${JSON.stringify(request)}\n`);
    const { reply, error } = await next('reply');
    return error ?? reply;
  };
  return { child, next, ask, closed, lines, errors: () => errors };
}
