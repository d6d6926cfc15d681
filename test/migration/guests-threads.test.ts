/**
 * Programs that start threads of their own over one shared memory. Z3, from npm, unchanged: every request runs in
 * pthreads of Emscripten's; one session takes all the trips, and is compared with one that stays where it is.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts, type Host } from '../support/host.js';
import { failure, hosts, listen, migrate, report, startStage, via } from '../support/scenario.js';

afterEach(endHosts);

const z3 = new URL('../support/guests/z3.mjs', import.meta.url).href;
const pool = new URL('../support/guests/pool.mjs', import.meta.url).href;
const modules = { z3, pool };
const LONG_MS = 120_000;
/** Nobody listens there: a migration that had begun would end in another error. */
const nobody = 9;

async function ask<T>(host: Host, request: object, guest = 'g'): Promise<T> {
  const answer = await host.call<{ ok: boolean; value: T; error?: { message: string } }>(
    'request',
    { guest, request },
    LONG_MS,
  );
  if (!answer.ok) throw new Error(answer.error?.message);
  return answer.value;
}

const start = (host: Host, module: keyof typeof modules, guest = 'g', data: object = {}) =>
  host.call('startWorker', { guest, module, url: modules[module], options: { data } }, LONG_MS);

async function move(from: Host, to: Host, key: string, port: number, options: object) {
  await migrate(
    from,
    port,
    { connectTimeoutMs: LONG_MS, prepareTimeoutMs: LONG_MS, ...options },
    { guest: 'g', key },
  );
  expect(await report(from, key, LONG_MS), key).toMatchObject({ verified: true });
  await to.untilArrival('main/g', 'resumed', LONG_MS);
}

async function refusal(host: Host, key: string) {
  await migrate(host, nobody, { mode: 'hybrid' }, { guest: 'g', key });
  return failure(host, key, LONG_MS);
}

/** Queens on a board, one in each row, of whom none attacks another. */
const size = 10;
const each = (count: number) => Array.from({ length: count }, (_, i) => i);
const squares = each(size * size).map((n) => ({
  row: Math.floor(n / size),
  column: n % size,
  name: `q${n}`,
}));
const attacks = squares.flatMap((one, n) =>
  squares
    .slice(n + 1)
    .filter(
      ({ row, column }) =>
        row === one.row || column === one.column || Math.abs(row - one.row) === Math.abs(column - one.column),
    )
    .map((other) => `(assert (or (not ${one.name}) (not ${other.name})))`),
);
const names = squares.map(({ name }) => name);
const rows = each(size).map((row) => names.slice(row * size, (row + 1) * size).join(' '));
const board = [
  ...names.map((name) => `(declare-const ${name} Bool)`),
  ...rows.map((row) => `(assert (or ${row}))`),
  ...attacks,
].join('\n');
/** One more way to place them, and never again. Which it is depends on all that the solver has learnt before. */
async function next(host: Host, guest: string): Promise<string> {
  const found = await ask<string>(host, { run: `(check-sat) (get-value (${names.join(' ')}))` }, guest);
  const placed = [...found.matchAll(/\((q\d+) true\)/g)].map(([, name]) => name);
  expect(placed, found).toHaveLength(size);
  await ask(host, { run: `(assert (not (and ${placed.join(' ')})))` }, guest);
  return placed.join(' ');
}

test('Z3 goes on where it was, there and back, and runs in threads at both sides', async () => {
  const [a, b] = await hosts('a', 'b');
  // Room for all that Z3 has reserved, though it has written to little of it.
  const memory = { memoryBytes: 1536 * 2 ** 20 };
  const servers = via(await startStage('one', memory), await startStage('two', memory));
  const ports = new Map<Host, number>();
  for (const host of [a, b]) ports.set(host, await listen(host, { modules }));
  await start(a, 'z3');
  await start(b, 'z3', 'still');
  for (const [host, guest] of [
    [a, 'g'],
    [b, 'still'],
  ] as const) {
    await ask(host, { run: board }, guest);
    for (let i = 0; i < 3; i++) await next(host, guest);
  }
  expect(await ask(a, { op: 'threads' })).toBeGreaterThan(0);

  let [here, there] = [a, b];
  for (const mode of ['hybrid', 'scatter']) {
    const before = await ask<{ sha256: string; bytes: number }>(here, { op: 'digest' });
    expect(before.bytes).toBe(2 ** 31);
    const scattered = mode.startsWith('scatter') ? servers : {};
    await move(here, there, mode, ports.get(there) as number, { mode, ...scattered });
    expect(await ask(there, { op: 'digest' }), mode).toEqual(before);
    // The destination has started no thread yet: the first of them works on the memory that came.
    expect(await ask(there, { op: 'threads' }), mode).toBe(0);
    for (let i = 0; i < 3; i++) expect(await next(there, 'g'), mode).toBe(await next(b, 'still'));
    expect(await ask(there, { op: 'threads' }), mode).toBeGreaterThan(0);
    [here, there] = [there, here];
  }
}, 600_000);

test('Z3 is named while a thread of it runs, and moves when it is done', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { modules });
  await start(a, 'z3');
  // Pigeons and one hole too few: long beyond this test's patience.
  const holes = 14;
  const sits = (pigeon: number, hole: number) => `p${pigeon}h${hole}`;
  const hard = [
    ...each(holes + 1).flatMap((p) => each(holes).map((h) => `(declare-const ${sits(p, h)} Bool)`)),
    ...each(holes + 1).map(
      (p) =>
        `(assert (or ${each(holes)
          .map((h) => sits(p, h))
          .join(' ')}))`,
    ),
    ...each(holes).flatMap((h) =>
      each(holes + 1).flatMap((p) =>
        each(p).map((other) => `(assert (not (and ${sits(p, h)} ${sits(other, h)})))`),
      ),
    ),
  ].join('\n');
  await ask(a, { run: hard });
  await ask(a, { op: 'begin', run: '(check-sat)' });
  const { code, facts } = await refusal(a, 'running');
  expect(code).toBe('GUEST_BUSY');
  const { names: running } = facts as unknown as { names: string[] };
  expect(running).toContainEqual(
    expect.stringMatching(/^a running thread of its own \(em-pthread-\d+, .*z3-built\.js\)$/),
  );
  expect(running).toContainEqual(expect.stringMatching(/^pthread \d+ of Z3$/));
  expect(await ask(a, { op: 'interrupt' })).toMatch(/unknown|canceled|interrupted/);
  await move(a, b, 'done', port, { mode: 'hybrid' });
  expect(await ask(b, { run: '(reset) (declare-const x Int) (assert (< 2 x 4)) (check-sat) (eval x)' })).toBe(
    'sat\n3\n',
  );
  // A time limit's clock is a thread that waits inside WebAssembly, where nothing can be known of it.
  await ask(b, { run: '(set-option :timeout 60000) (check-sat)' });
  expect((await refusal(b, 'clock')).code).toBe('GUEST_BUSY');
}, 300_000);

describe('a program with a pool of threads', () => {
  test.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid', 'scatter', 'scatter-hybrid'])(
    'moves with its memory, which a thread has grown, and its threads work there: %s',
    async (mode) => {
      const [a, b] = await hosts('a', 'b');
      const servers = mode.startsWith('scatter') ? via(await startStage('one')) : {};
      const port = await listen(b, { modules });
      await start(a, 'pool');
      expect(await ask(a, { op: 'ask', message: { op: 'grow', pages: 31 } })).toBe(1);
      await ask(a, { op: 'poke', at: 2 ** 19 - 1, value: 77 });
      await ask(a, { op: 'add', by: 3 });
      await move(a, b, mode, port, { mode, ...servers });
      expect(await ask(b, { op: 'bytes' })).toBe(2 ** 21);
      expect(await ask(b, { op: 'peek', at: 2 ** 19 - 1 })).toBe(77);
      expect((await ask<number[]>(b, { op: 'add', by: 4 })).sort()).toEqual([10, 6]);
      expect(await ask(b, { op: 'sum' })).toBe(14);
    },
    120_000,
  );

  test.each(['start', 'tell', 'quietly'])(
    'nothing is given to a thread of the destination before it runs: %s',
    async (adopt) => {
      const [a, b] = await hosts('a', 'b');
      const port = await listen(b, { modules });
      await start(a, 'pool', 'g', { adopt });
      await ask(a, { op: 'add', by: 3 });
      await migrate(a, port, { mode: 'hybrid', prepareTimeoutMs: LONG_MS }, { guest: 'g' });
      const { message } = await failure(a, 'main', LONG_MS);
      expect(message).toMatch(/a thread of its own that gets work while the guest stands still/);
      expect(b.states('arrival', 'main/g')).not.toContain('resumed');
      expect(await ask(a, { op: 'sum' })).toBe(6);
    },
    120_000,
  );

  test('a thread that runs at the destination makes it decline, before the first page', async () => {
    const [a, b] = await hosts('a', 'b');
    const port = await listen(b, { modules });
    await start(a, 'pool', 'g', { busyThere: true });
    await ask(a, { op: 'add', by: 3 });
    await migrate(a, port, { mode: 'hybrid', prepareTimeoutMs: LONG_MS }, { guest: 'g' });
    const { message } = await failure(a, 'main', LONG_MS);
    expect(message).toMatch(/a running thread of its own \(pool, .*pool-thread\.mjs\)/);
    expect(b.states('arrival', 'main/g')).not.toContain('active');
    expect(await ask(a, { op: 'sum' })).toBe(6);
  }, 120_000);
});
