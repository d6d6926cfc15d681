/**
 * A Python interpreter from npm, unchanged, that moves in every mode while it is in the middle of everything: a
 * generator, an iterator, a closure, a sequence of random numbers. One guest takes all the trips, there and back.
 */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { afterEach, expect, test } from 'vitest';
import { endHosts, type Host } from '../support/host.js';
import { failure, hosts, listen, migrate, report, startStage, via } from '../support/scenario.js';

afterEach(endHosts);

const url = new URL('../../examples/python/python.mjs', import.meta.url).href;
/** Starting an interpreter takes seconds, on a busy machine tens of them. */
const LONG_MS = 120_000;

async function python<T>(host: Host, code: string): Promise<T> {
  const answer = await host.call<{ ok: boolean; value: T; error?: { message: string } }>(
    'request',
    { guest: 'py', request: { run: code } },
    LONG_MS,
  );
  if (!answer.ok) throw new Error(answer.error?.message);
  return answer.value;
}

const begin = `
import hashlib, random
random.seed(20131)
ballast = [random.randbytes(65536) for _ in range(640)]
expected = random.Random()
expected.setstate(random.getstate())
expected = [expected.random() for _ in range(100)]

def totals(step):
    total, note = 0, []
    try:
        while True:
            sent = yield total
            total += step if sent is None else sent
            note.append(total)
    finally:
        closed.append(note)

closed = []
running = totals(3)
next(running)

squares = {f'key {i}': i * i for i in range(20_000)}
items = iter(squares.items())
for _ in range(100): next(items)

def counter():
    n = 0
    def add(by):
        nonlocal n
        n += by
        return n
    return add
add = counter()

class Shape:
    __slots__ = ('sides', 'of')
    def __init__(self, sides): self.sides, self.of = sides, self
circle = Shape(0)

with open('notes.txt', 'w') as notes: notes.write('at first\\n')
digest = lambda: hashlib.sha256(b''.join(ballast)).hexdigest()
digest()
`;
const step = `
with open('notes.txt', 'a') as notes: notes.write('again\\n')
ballast[next(items)[1] % 640] = random.randbytes(0) + ballast[0]
[next(running), running.send(10), list(next(items)), add(2), random.random(), circle.of is circle, digest()]
`;

test('goes on in the middle of a generator, whatever the mode', async () => {
  const [a, b] = await hosts('a', 'b');
  const memory = { memoryBytes: 256 * 2 ** 20 };
  const servers = via(await startStage('one', memory), await startStage('two', memory));
  const ports = new Map<Host, number>();
  for (const host of [a, b]) ports.set(host, await listen(host, { modules: { python: url } }));
  await a.call('startWorker', { guest: 'py', module: 'python', url }, LONG_MS);
  await python(a, begin);
  const expected = await python<number[]>(a, 'expected');
  const modes = [
    'stop-and-copy',
    'pre-copy',
    'post-copy',
    'hybrid',
    'scatter',
    'scatter-pre-copy',
    'scatter-hybrid',
  ];
  let [here, there] = [a, b];
  let entry = 100;
  for (const [trip, mode] of modes.entries()) {
    const before = await python<string>(here, 'digest()');
    const key = `trip-${trip}`;
    const scattered = mode.startsWith('scatter') ? servers : {};
    await migrate(
      here,
      ports.get(there) as number,
      { mode, connectTimeoutMs: LONG_MS, prepareTimeoutMs: LONG_MS, ...scattered },
      { guest: 'py', key },
    );
    const told = await report(here, key, LONG_MS);
    expect(told, mode).toMatchObject({ verified: true });
    expect(told.heapBytes, mode).toBeGreaterThan(40 * 2 ** 20);
    await there.untilArrival(`main/py`, 'resumed', LONG_MS);
    expect(await python(there, 'digest()'), mode).toBe(before);
    const total = 3 + trip * 13;
    const [first, sent, item, added, random, itself] = await python<unknown[]>(there, step);
    expect([first, sent], mode).toEqual([total, total + 10]);
    expect(item, mode).toEqual([`key ${entry + 1}`, (entry + 1) ** 2]);
    expect([added, random, itself], mode).toEqual([2 * (trip + 1), expected[trip], true]);
    entry += 2;
    expect(await python(there, `open('notes.txt').read()`), mode).toBe(
      `at first\n${'again\n'.repeat(trip + 1)}`,
    );
    [here, there] = [there, here];
  }
  // What was suspended ends as it would have: its finally clause runs.
  expect(await python<number[][]>(here, 'running.close(); closed')).toHaveLength(1);
  expect(await python(here, 'import decimal; str(decimal.Decimal(1) / 7)')).toMatch(/^0\.142857/);
}, 600_000);

test('starts alike at every host: at a whole second as at any moment, installed anywhere', async () => {
  const start = async (before: string): Promise<string> => {
    const code = `${before}; const { default: python } = await import('${url}'); console.log(python.layout(await python.create()).join(' ')); process.exit()`;
    const { stdout } = await promisify(execFile)(process.execPath, ['--input-type=module', '--eval', code]);
    return stdout;
  };
  const here = await start(`process.argv[1] = '/here'`);
  expect(here).toMatch(/globals at \d+/);
  // Each of the two alone has moved nearly every address.
  expect(await start(`process.argv[1] = '/somewhere/else/altogether'`)).toBe(here);
  expect(await start(`process.argv[1] = '/here'; Date.now = () => 1_764_000_000_000`)).toBe(here);
}, 300_000);

test('names what cannot move before it begins, and runs on', async () => {
  const [a] = await hosts('a');
  await a.call('startWorker', { guest: 'py', module: 'python', url }, LONG_MS);
  const nobody = 9;
  const refusal = async (key: string) => {
    // Nobody listens there: a migration that had begun would end in another error.
    await migrate(a, nobody, { mode: 'hybrid' }, { guest: 'py', key });
    return failure(a, key, LONG_MS);
  };

  await python(a, `f = open('/tmp/journal', 'w')`);
  expect(await refusal('file')).toMatchObject({
    code: 'GUEST_BUSY',
    facts: { names: [`Python's open file /tmp/journal`] },
  });
  await python(a, 'f.close(); import js; later = js.setTimeout; parse = js.JSON');
  expect(await refusal('function')).toMatchObject({
    code: 'GUEST_UNMOVABLE',
    facts: {
      names: expect.arrayContaining([
        expect.stringMatching(/slot \d+: an externref to a host object \(function "setTimeout"\)$/),
      ]),
    },
  });
  await python(a, `del later, parse, js; import pyodide_js; pyodide_js.mountNodeFS('/mnt', '/tmp')`);
  expect(await refusal('mount')).toMatchObject({
    code: 'GUEST_BUSY',
    facts: { names: ['directory /tmp of the host, mounted at /mnt'] },
  });
  expect(await python(a, '6 * 7')).toBe(42);
}, 300_000);
