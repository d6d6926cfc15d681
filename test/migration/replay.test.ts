/**
 * A SQLite database moves to a host that has it as it was, and replays what was done since: exactly, and with a replay
 * that diverges on purpose. The database that arrives is the source's to the byte, whichever it was.
 */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { endHosts, type Host, type Settled } from '../support/host.js';
import { hosts, listen, migrate, report } from '../support/scenario.js';

const module = 'sqlite';
const url = new URL('../../lib/demo/sqlite-guest.js', import.meta.url).href;
const options = (directory: string) => ({ directory, maxBytes: 2 ** 30 });

let directory = '';
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'memferry-replay-'));
});
afterEach(async () => {
  await endHosts();
  await rm(directory, { recursive: true, force: true });
});

async function ask<T = unknown>(host: Host, request: object): Promise<T> {
  const answer = await host.call<Settled<T>>('request', { guest: 'db', request });
  if (!answer.ok) throw new Error(answer.error.message);
  return answer.value;
}

/** A database with a base of it in files, and the log of what was done since. */
async function database(a: Host): Promise<Uint8Array> {
  await a.call('startWorker', { guest: 'db', module, url });
  await ask(a, {
    op: 'exec',
    sql: 'CREATE TABLE accounts (id INTEGER PRIMARY KEY, balance INTEGER, note TEXT)',
  });
  await ask(a, { op: 'fill', databaseBytes: 24 * 2 ** 20 });
  await a.call('saveBase', { guest: 'db', options: options(directory) });
  const requests = Array.from({ length: 60 }, (_, i) => ({
    op: 'apply',
    id: `transaction ${i}`,
    statements: [
      { sql: `INSERT INTO accounts (balance, note) VALUES (${i}, hex(randomblob(200)))` },
      { sql: `UPDATE filler SET data = randomblob(65536) WHERE id = ${1 + ((i * 37) % 300)}` },
    ],
  }));
  for (const request of requests) await ask(a, request);
  return new Uint8Array(Buffer.from(requests.map((request) => JSON.stringify(request)).join('\n')));
}

const everything = { op: 'all', sql: 'SELECT * FROM accounts ORDER BY id' };
const blobs = {
  op: 'all',
  sql: 'SELECT id, hex(substr(data, 1, 32)) AS h, length(data) AS l FROM filler ORDER BY id',
};

describe.each(['hybrid', 'post-copy', 'stop-and-copy'])('%s', (mode) => {
  test.each([
    ['exact', false],
    ['diverging on purpose', true],
  ])('a replay that is %s', async (_, diverge) => {
    const [a, b] = await hosts('a', 'b');
    const replayLog = await database(a);
    const before = { rows: await ask(a, everything), blobs: await ask(a, blobs) };
    const port = await listen(b, { modules: { sqlite: url }, workerBase: { directory, diverge } });
    await migrate(a, port, { mode, base: 'always', replayLog }, { guest: 'db' });
    const { base, verified, heapBytes, bytesOnWire } = await report(a);
    expect(b.events.find(({ event }) => event === 'replay')).toMatchObject({ requests: 60 });
    expect(verified).toBe(true);
    expect(base).toMatchObject({ used: true, problem: null });
    expect(base?.replayMs).toBeGreaterThan(0);
    // The log has some KB; the transactions have written 4 MiB.
    expect(bytesOnWire).toBeLessThan((diverge ? 0.5 : 0.1) * heapBytes);
    expect(await ask(b, { op: 'integrity' })).toEqual(['ok']);
    expect({ rows: await ask(b, everything), blobs: await ask(b, blobs) }).toEqual(before);
    expect(await ask(b, { op: 'stats' })).toMatchObject({ appliedTransactions: 60 });
    await expect(ask(b, { op: 'all', sql: 'SELECT * FROM diverged' })).rejects.toThrow(/no such table/);
  });
});

test('a base of another life, with a log that means nothing to it: only the hashes count', async () => {
  const [a, b] = await hosts('a', 'b');
  await database(a);
  const rows = await ask(a, everything);
  const port = await listen(b, { modules: { sqlite: url }, workerBase: { directory, diverge: false } });
  const replayLog = new Uint8Array(Buffer.from('this is no request'));
  await migrate(a, port, { base: 'always', replayLog }, { guest: 'db' });
  const { base, verified } = await report(a);
  expect(verified).toBe(true);
  expect(base?.used).toBe(true);
  expect(base?.problem).toMatch(/replay/);
  expect(await ask(b, everything)).toEqual(rows);
});

describe('as it promises to pay', () => {
  // What differs from the base is 4 MiB and more; all of it some 40.
  const bandwidth = 256 * 1024;

  test('a log of which nobody knows how long it takes is applied when it is quick', async () => {
    const [a, b] = await hosts('a', 'b');
    const replayLog = await database(a);
    const rows = await ask(a, everything);
    const port = await listen(b, { modules: { sqlite: url }, workerBase: { directory, diverge: false } });
    await migrate(a, port, { mode: 'hybrid', replayLog, bandwidth }, { guest: 'db' });
    const { base, verified, heapBytes, bytesOnWire } = await report(a);
    expect(verified).toBe(true);
    expect(base).toMatchObject({ used: true, reason: 'saves', replay: 'applied', problem: null });
    expect(bytesOnWire).toBeLessThan(0.1 * heapBytes);
    expect(await ask(b, everything)).toEqual(rows);
  }, 60_000);

  test('one that is slow is called off, whatever was said of it, and the base is compared as it is', async () => {
    const [a, b] = await hosts('a', 'b');
    const replayLog = await database(a);
    const rows = await ask(a, everything);
    // 60 requests, a minute in all.
    const workerBase = { directory, diverge: false, restMs: 1000, replayMs: 1 };
    const port = await listen(b, { modules: { sqlite: url }, workerBase });
    await migrate(a, port, { mode: 'hybrid', replayLog, bandwidth: 4 * bandwidth }, { guest: 'db' });
    const { base, verified, heapBytes, bytesOnWire } = await report(a);
    expect(verified).toBe(true);
    expect(base).toMatchObject({ used: true, reason: 'saves', replay: 'skipped', problem: null });
    expect(base?.waitMs).toBeLessThan(30_000);
    expect(bytesOnWire).toBeLessThan(0.5 * heapBytes);
    expect(await ask(b, everything)).toEqual(rows);
  }, 60_000);
});

test('a replay that never ends, and heeds no signal, costs its time-out and not the base', async () => {
  const [a, b] = await hosts('a', 'b');
  const replayLog = await database(a);
  const rows = await ask(a, everything);
  const workerBase = { directory, diverge: false, hang: true };
  const port = await listen(b, { modules: { sqlite: url }, workerBase });
  await migrate(a, port, { base: 'always', baseTimeoutMs: 1500, replayLog }, { guest: 'db' });
  const { verified, base } = await report(a);
  expect({ verified, base }).toMatchObject({ verified: true, base: { used: true, replay: 'skipped' } });
  expect(await ask(b, everything)).toEqual(rows);
});

test('a second copy that the host has no room for: its base is what it is', async () => {
  const [a, b] = await hosts('a', 'b');
  const replayLog = await database(a);
  const rows = await ask(a, everything);
  const workerBase = { directory, diverge: false };
  const room = { maxBytes: 40 * 2 ** 20 };
  const port = await listen(b, { modules: { sqlite: url }, workerBase, options: room });
  await migrate(a, port, { base: 'always', replayLog }, { guest: 'db' });
  const { base, heapBytes } = await report(a);
  expect(heapBytes).toBeGreaterThan(room.maxBytes / 2);
  expect(base).toMatchObject({ used: true, replayMs: 0 });
  expect(b.events.some(({ event }) => event === 'replay')).toBe(false);
  expect(await ask(b, everything)).toEqual(rows);
});

test('a log, and no base for it', async () => {
  const [a, b] = await hosts('a', 'b');
  const replayLog = await database(a);
  const nowhere = join(directory, 'nothing');
  const port = await listen(b, {
    modules: { sqlite: url },
    workerBase: { directory: nowhere, diverge: false },
  });
  await migrate(a, port, { base: 'always', replayLog }, { guest: 'db' });
  expect(await report(a)).toMatchObject({ verified: true, base: null });
});
