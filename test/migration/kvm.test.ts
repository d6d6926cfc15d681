/**
 * examples/kvm: a VM's guest that counts moves between real processes while it writes. Both append what it puts out to
 * one file, so that a count that is missing, comes twice or comes from two owners shows there; and every byte of its
 * memory is compared with what its registers say that it has to be.
 */
import { spawn, spawnSync } from 'node:child_process';
import { accessSync, constants, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeAll, beforeEach, describe, expect, test as always } from 'vitest';
import { bounded } from '../support/host.js';
import { endKvmHosts, KvmHost } from '../support/kvm-host.js';
import { SECRET } from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const MiB = 2 ** 20;
const RAM = 4 * MiB;
const examples = fileURLToPath(new URL('../../examples/kvm/', import.meta.url));

function whyNot(): string | null {
  if (process.arch !== 'x64') return `the guest is a program for x86, not ${process.arch}`;
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
    return null;
  } catch (error) {
    return `no /dev/kvm: ${(error as Error).message}`;
  }
}
const missing = whyNot();
const test = (name: string, body: () => Promise<void>) =>
  missing === null ? always(name, body) : always.skip(`${name} (skipped: ${missing})`, () => {});

beforeAll(() => {
  if (missing !== null) return;
  const { status, stdout, stderr } = spawnSync(process.execPath, [join(examples, 'build.mjs')], {
    encoding: 'utf8',
  });
  if (status !== 0) throw new Error(`examples/kvm/build.mjs: ${stdout}${stderr}`);
}, 240_000);

let directory = '';
let consolePath = '';
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'memferry-kvm-'));
  consolePath = join(directory, 'console');
});
afterEach(async () => {
  try {
    await closeProxies();
    await endKvmHosts();
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
});

const start = (...names: string[]) => Promise.all(names.map((name) => KvmHost.start(name, consolePath)));
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

/** What was put out: 1, 2, 3 and so on. Gives how many. */
function expectEveryCountOnce(): number {
  const bytes = readFileSync(consolePath);
  const counts = new Uint32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength >> 2);
  expect(bytes.byteLength % 4).toBe(0);
  expect(counts.findIndex((count, index) => count !== index + 1)).toBe(-1);
  return counts.length;
}

interface Found {
  wrong: string[];
  state: string;
  failure: string;
  last: number;
}
async function expectRight(host: KvmHost, goOn = true): Promise<number> {
  const found = await host.call<Found>('check', { guest: 'g', goOn });
  expect(found).toMatchObject({ wrong: [], failure: '' });
  return found.last;
}

/** It runs: it counts further than it has. */
async function expectCounts(host: KvmHost): Promise<void> {
  const { last } = await host.call<Found>('status', { guest: 'g' });
  for (const end = performance.now() + 20_000; ; await sleep(10)) {
    const now = await host.call<Found>('status', { guest: 'g' });
    expect(now.failure).toBe('');
    if (now.last > last + 20) return;
    expect(performance.now()).toBeLessThan(end);
  }
}

/** Until it has gone over its memory once or more, so that no page is zeros any more. */
async function boot(host: KvmHost, ramBytes = RAM, counts = 60): Promise<void> {
  await host.call('boot', { guest: 'g', ramBytes });
  while ((await host.call<Found>('status', { guest: 'g' })).last < counts) await sleep(5);
}

function listen(host: KvmHost, options: object = {}, hang: string | null = null): Promise<number> {
  return host.call<number>('listen', { options: { secret: SECRET, ...options }, hang });
}

function move(host: KvmHost, port: number, options: object, rest: object = {}): Promise<void> {
  return host.call('migrate', {
    guest: 'g',
    options: { to: `127.0.0.1:${port}`, secret: SECRET, ...options },
    ...rest,
  });
}

const direct = ['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const;
const scattered = ['scatter', 'scatter-pre-copy', 'scatter-hybrid'] as const;
const rounds = (mode: string) => mode.includes('pre-copy') || mode.includes('hybrid');

describe('a guest of KVM moves there and back', () => {
  for (const mode of [...direct, ...scattered]) {
    test(mode, async () => {
      const [a, b, c] = (await start('a', 'b', ...(mode.startsWith('scatter') ? ['c'] : []))) as [
        KvmHost,
        KvmHost,
        KvmHost?,
      ];
      const via = c
        ? {
            via: [
              `127.0.0.1:${await c.call<number>('stage', { options: { secret: SECRET, memoryBytes: 64 * MiB } })}`,
            ],
          }
        : {};
      await boot(a);
      for (const [from, to] of [
        [a, b],
        [b, a],
      ] as const) {
        const port = await listen(to);
        // Slowly, so that the guest writes while its pages are sent.
        const pace = mode === 'pre-copy' ? { bandwidth: 8 * MiB, compress: 'off' } : {};
        await move(from, port, { mode, maxRounds: 5, ...pace, ...via });
        const done = await from.until('done');
        expect(done).toMatchObject({ ok: true, value: { mode, verified: true } });
        // KVM's own log it was that found what the guest wrote, and the guest wrote.
        expect(done.value?.['tracker']).toBe(rounds(mode) ? 'kvm-log' : null);
        if (mode === 'pre-copy') expect(done.value?.['pagesResent']).toBeGreaterThan(0);
        expect((await to.until('complete')).ok).toBe(true);
        await expectCounts(to);
        await expectRight(to);
        await expect(from.call('status', { guest: 'g' })).rejects.toThrow(/closed/);
        await from.call('end', { guest: 'g' });
        await to.call('closeListener');
      }
      const last = await expectRight(a, false);
      expect(expectEveryCountOnce()).toBe(last);
    });
  }
});

describe('a failure before the commit', () => {
  test('the destination is killed: the guest runs on as if nothing had happened', async () => {
    const [a, b] = (await start('a', 'b')) as [KvmHost, KvmHost];
    await boot(a);
    await move(a, await listen(b, {}, 'prepare'), { mode: 'hybrid' });
    await b.until('prepare'); // the source's guest stands by now
    await b.kill();
    expect((await a.until('done')).ok).toBe(false);
    await expectCounts(a);
    await expectRight(a);

    // Later it moves all the same.
    const [c] = (await start('c')) as [KvmHost];
    a.told.length = 0;
    await move(a, await listen(c), { mode: 'hybrid' });
    expect(await a.until('done')).toMatchObject({ ok: true, value: { verified: true } });
    await expectCounts(c);
    const last = await expectRight(c, false);
    expect(expectEveryCountOnce()).toBe(last);
  });

  test('cancelled in the middle of the rounds', async () => {
    const [a, b] = (await start('a', 'b')) as [KvmHost, KvmHost];
    await boot(a);
    // Slower than the guest writes: it never converges.
    await move(a, await listen(b), {
      mode: 'pre-copy',
      bandwidth: 100_000,
      downtimeLimitMs: 1,
      compress: 'off',
    });
    await a.until('state', ({ state }) => state === 'active');
    await sleep(200);
    await a.call('cancel');
    expect(await a.until('done')).toMatchObject({ ok: false, error: { code: 'CANCELLED' } });
    await expectCounts(a);
    await expectRight(a, false);
    expectEveryCountOnce();
  });
});

test('a source that is killed in the middle of post-copy: the guest is lost, the host is not', async () => {
  const [a, b] = (await start('a', 'b')) as [KvmHost, KvmHost];
  await boot(a, 16 * MiB);
  const proxy = await TcpProxy.start(await listen(b, { recoverTimeoutMs: 300 }));
  // Or it fetches all of its memory itself, however late this test is.
  const asking = proxy.at({ on: 'demand', direction: 'down', name: 'fault-request', nth: 3 }, 'hold');
  await move(a, proxy.port, {
    mode: 'post-copy',
    bandwidth: 100_000,
    compress: 'off',
  });
  await b.until('resumed');
  await asking.reached;
  await a.kill();
  await b.until('lost');
  expect(await b.until('complete')).toMatchObject({ ok: false, error: { code: 'PAGES_LOST' } });
  const state = async () => (await b.call<Found>('status', { guest: 'g' })).state;
  await expect.poll(state, { timeout: 20_000 }).not.toBe('runs');
  // Nothing that it put out was wrong, and it puts out nothing more.
  const counts = expectEveryCountOnce();
  await sleep(300);
  expect(expectEveryCountOnce()).toBe(counts);
});

test('what the VMM writes and nobody marks is found by the other tracker', async () => {
  const [a, b] = (await start('a', 'b')) as [KvmHost, KvmHost];
  await boot(a);
  const options = { mode: 'pre-copy', holdSwitchover: true };
  await move(a, await listen(b), options, { tracker: { marks: undefined } });
  await a.until('state', ({ state }) => state === 'pre-switchover');
  // Everything has been sent at least once; from here on only the log, the marks or another tracker can know of it.
  await a.call('scribble', { guest: 'g', at: 77, value: 39 });
  await a.call('switchover');
  expect(await a.until('done')).toMatchObject({ ok: true, value: { tracker: 'kvm-log', verified: true } });
  expect(await b.call('peek', { guest: 'g', at: 77 })).toBe(39);
});

test('a VMM that breaks its word, and does not mark what it wrote, is found out by the digests', async () => {
  const [a, b] = (await start('a', 'b')) as [KvmHost, KvmHost];
  await boot(a);
  await move(a, await listen(b), { mode: 'pre-copy', holdSwitchover: true });
  await a.until('state', ({ state }) => state === 'pre-switchover');
  await a.call('scribble', { guest: 'g', at: 77, value: 39 });
  await a.call('switchover');
  expect(await a.until('done')).toMatchObject({ ok: false, error: { code: 'VERIFICATION_FAILED' } });
});

test('a state that is not one is refused, and the host lives', async () => {
  const [a] = (await start('a')) as [KvmHost];
  await boot(a);
  const state = await a.call<Uint8Array>('pause', { guest: 'g' });
  const changed = (change: (view: DataView, bytes: Uint8Array) => unknown) => {
    const bytes = Uint8Array.from(state);
    const other = change(new DataView(bytes.buffer), bytes);
    return other instanceof Uint8Array ? other : bytes;
  };
  const states: Uint8Array[] = [
    new Uint8Array(0),
    new Uint8Array(24),
    changed((_, all) => new Uint8Array([...all, 0])),
  ];
  for (let length = 1; length < state.length; length += 97) states.push(state.slice(0, length));
  states.push(
    changed((view) => view.setUint8(0, 1)), // no state at all
    changed((view) => view.setUint32(4, 2, true)), // of another version
    changed((view) => view.setUint32(8, 0, true)), // no sections
    changed((view) => view.setUint32(8, 0xffffffff, true)),
    changed((view) => view.setBigUint64(16, BigInt(RAM) * 2n, true)), // of a guest with more RAM
    changed((view) => view.setUint32(24, 77, true)), // a section that nobody knows
    changed((view) => view.setUint32(24, 2, true)), // one twice
    changed((view) => view.setUint32(28, 0xffffffff, true)), // longer than all
    changed((view) => view.setUint32(28, 143, true)),
  );
  expect(await a.call('refuses', { guest: 'g', states })).toEqual([]);

  // Whatever the heads of its sections say.
  const heads: number[] = [];
  const view = new DataView(state.buffer, state.byteOffset, state.byteLength);
  for (let at = 24; at < state.length; at += 8 + view.getUint32(at + 4, true)) heads.push(at);
  let seed = 1;
  const random = (below: number) => {
    seed = (Math.imul(seed, 1103515245) + 12345) >>> 0;
    return (seed >>> 8) % below;
  };
  const odd = Array.from({ length: 300 }, () =>
    changed((_, all) => {
      const at = (heads[random(heads.length)] as number) + random(8);
      all[at] = (all[at] as number) ^ (1 + random(255));
    }),
  );
  expect(await a.call('refuses', { guest: 'g', states: odd })).toEqual([]);
  // Values are KVM's to refuse: a run state and events that there are not; and registers that are none to be moved.
  const section = (kind: number) => heads.find((at) => view.getUint32(at, true) === kind) as number;
  const values = [
    changed((all) => all.setUint32(section(8) + 8, 77, true)),
    changed((all) => all.setUint32(section(9) + 8 + 20, 0xffffffff, true)),
    changed((all) => all.setUint32(section(6) + 8, 0x1b, true)),
  ];
  expect(await a.call('refuses', { guest: 'g', states: values })).toEqual([]);

  await a.call('load', { guest: 'g', state });
  await a.call('run', { guest: 'g' });
  await expectCounts(a);
  await expectRight(a, false);
  expectEveryCountOnce();
});

test('running and pausing again and again loses no kick', async () => {
  const [a] = (await start('a')) as [KvmHost];
  await boot(a);
  for (let i = 0; i < 300; i++) {
    await a.call('run', { guest: 'g' });
    await a.call('pause', { guest: 'g' }); // bounded: a kick that is lost is a failure
  }
  await a.call('run', { guest: 'g' });
  await expectCounts(a);
  await expectRight(a, false);
  expectEveryCountOnce();
});

test('the commands of examples/kvm/README.md run as they are written', async () => {
  const readme = readFileSync(join(examples, 'README.md'), 'utf8');
  const commands = [...readme.matchAll(/^node (examples\/kvm\/build\/js\/\S+\.js)(.*)$/gm)].map(
    ([, file, args]) => [file as string, ...(args as string).trim().split(/\s+/)],
  );
  expect(commands.map(([file]) => file)).toEqual([
    'examples/kvm/build/js/destination.js',
    'examples/kvm/build/js/source.js',
  ]);
  expect(readme).toContain('\nnode examples/kvm/build.mjs\n');
  const run = (command: string[]) => {
    const child = spawn(process.execPath, command, {
      cwd: join(examples, '../..'),
      env: { ...process.env, XDG_RUNTIME_DIR: directory },
    });
    let output = '';
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding('utf8').on('data', (text) => {
        output += text;
      });
    }
    const said = async (text: string) => {
      while (!output.includes(text)) {
        if (child.exitCode !== null) throw new Error(`${command.join(' ')} ended: ${output}`);
        await sleep(20);
      }
    };
    const ended = new Promise<number | null>((resolve) => child.once('close', resolve));
    return { child, said, ended, output: () => output };
  };
  const [there, here] = [run(commands[0] as string[]), null as ReturnType<typeof run> | null];
  let source = here;
  try {
    await bounded(there.said('listening'), 20_000, there.output);
    source = run(commands[1] as string[]);
    expect(await bounded(source.ended, 30_000, source.output), source.output()).toBe(0);
    expect(await bounded(there.ended, 30_000, there.output), there.output()).toBe(0);
    expect(source.output()).toMatch(/tracked by kvm-log, verified true/);
    expect(there.output()).toMatch(/every byte is as it has to be/);
  } finally {
    there.child.kill('SIGKILL');
    source?.child.kill('SIGKILL');
  }
});
