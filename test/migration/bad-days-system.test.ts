/**
 * What the machine refuses: permissions, memory, a network that is really gone. What cannot be done is refused
 * before anything happened to the guest, and what needs none of it still works.
 */
import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { afterEach, describe, expect, test } from 'vitest';
import { endHosts, Host } from '../support/host.js';
import {
  expectIntact,
  expectOneOwner,
  expectRuns,
  failure,
  hosts,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';

afterEach(async () => {
  await endHosts();
});

const root = process.getuid?.() === 0;
const setting = readFileSync('/proc/sys/vm/unprivileged_userfaultfd', 'utf8').trim();
const canBeDenied = root && setting === '0';
if (!canBeDenied) {
  console.warn(
    `skipped: hosts without permission for userfaultfd need root and vm.unprivileged_userfaultfd=0 ` +
      `(uid ${process.getuid?.()}, setting ${setting})`,
  );
}

const unprivileged = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups'];

describe.runIf(canBeDenied)('without permission for userfaultfd', () => {
  test.each<[string, { tracker?: string }]>([
    ['stop-and-copy', {}],
    ['pre-copy', { tracker: 'hash-diff' }],
    // Whichever this kernel lets such a user have: tracking needs less than paging.
    ['pre-copy', {}],
  ])('%s (%o) works between two such hosts', async (mode, options) => {
    const a = await Host.start('a', unprivileged);
    const b = await Host.start('b', unprivileged);
    const port = await listen(b);
    await startGuest(a, regionsOf('allocate'));
    await migrate(a, port, { mode, ...options });
    const figures = await report(a);
    expect(figures.verified).toBe(true);
    if (options.tracker) expect(figures.tracker).toBe(options.tracker);
    await expectRuns(b);
    await expectIntact(a);
    await expectOneOwner([a, b]);
  });

  test.each(['post-copy', 'hybrid'])(
    '%s to such a host is refused before the guest is paused',
    async (mode) => {
      const [a] = await hosts('a');
      const b = await Host.start('b', unprivileged);
      const port = await listen(b);
      await startGuest(a, regionsOf('allocate'));
      await migrate(a, port, { mode });
      expect((await failure(a)).code).toBe('USERFAULTFD_UNAVAILABLE');
      expect(a.steps('g')).toEqual([]);
      await expectRuns(a);
      await migrate(a, port, { mode: 'pre-copy' }, { key: 'again' });
      expect(await report(a, 'again')).toMatchObject({ verified: true });
      await expectRuns(b);
    },
  );
});

test.runIf(root)('a destination whose address space is used up declines, and lives', async () => {
  const [a, b] = await hosts('a', 'b');
  const port = await listen(b, { plain: true });
  await startGuest(a, regionsOf('allocate', 16_384));
  const status = readFileSync(`/proc/${b.pid}/status`, 'utf8');
  const bytes = Number(/^VmSize:\s+(\d+) kB/m.exec(status)?.[1]) * 1024 + 48 * 2 ** 20;
  execFileSync('prlimit', ['--pid', String(b.pid), `--as=${bytes}:`]);
  await migrate(a, port, { mode: 'pre-copy' });
  expect((await failure(a)).code).toBe('NO_MEMORY');
  expect(a.steps('g')).toEqual([]);
  await expectRuns(a);
  execFileSync('prlimit', ['--pid', String(b.pid), '--as=unlimited:']);
  await migrate(a, port, { mode: 'pre-copy' }, { key: 'again' });
  expect(await report(a, 'again')).toMatchObject({ verified: true });
});

/** Two network namespaces of our own with a cable between them. */
class Cable {
  readonly address = '10.77.31.2';
  readonly #names: [string, string];

  constructor() {
    const id = `mft${process.pid % 100_000}`;
    this.#names = [`${id}a`, `${id}b`];
    const [left, right] = this.#names;
    ip('netns', 'add', left);
    ip('netns', 'add', right);
    ip('link', 'add', 'v0', 'netns', left, 'type', 'veth', 'peer', 'name', 'v0', 'netns', right);
    for (const [name, address] of [
      [left, '10.77.31.1/24'],
      [right, `${this.address}/24`],
    ] as const) {
      ip('-n', name, 'addr', 'add', address, 'dev', 'v0');
      ip('-n', name, 'link', 'set', 'v0', 'up');
      ip('-n', name, 'link', 'set', 'lo', 'up');
    }
  }

  via(side: 0 | 1): string[] {
    return ['ip', 'netns', 'exec', this.#names[side]];
  }

  /** Packets vanish; nobody is told. */
  pull(): void {
    ip('-n', this.#names[0], 'link', 'set', 'v0', 'down');
  }

  plug(): void {
    ip('-n', this.#names[0], 'link', 'set', 'v0', 'up');
  }

  remove(): void {
    for (const name of this.#names) ip('netns', 'del', name);
  }
}

const ip = (...args: string[]) => execFileSync('ip', args, { stdio: ['ignore', 'ignore', 'pipe'] });

function cableOrNull(): Cable | null {
  try {
    return new Cable();
  } catch (error) {
    console.warn(`skipped: a network that can be pulled needs ip netns and veth: ${String(error)}`);
    return null;
  }
}

describe.runIf(root)('a cable is pulled', () => {
  test('in post-copy: both sides notice by themselves, wait, and go on', {
    timeout: 180_000,
  }, async (context) => {
    const cable = cableOrNull();
    if (!cable) return context.skip();
    try {
      const a = await Host.start('a', cable.via(0));
      const b = await Host.start('b', cable.via(1));
      const options = { host: cable.address, plaintext: true, recoverTimeoutMs: 90_000 };
      // Half a minute, by the push and by the guest's own faults, which nothing else holds back.
      const slow = { rate: { batch: 1, restMs: 50 }, options: { ...options, bandwidth: 2 ** 19 } };
      const port = await listen(b, slow);
      await startGuest(a, regionsOf('allocate', 4096));
      const to = { host: cable.address, port };
      await migrate(a, port, {
        to,
        mode: 'post-copy',
        plaintext: true,
        connectTimeoutMs: 5000,
        recoverTimeoutMs: 90_000,
      });
      await a.untilState('migration', 'main', 'postcopy-active');
      cable.pull();
      await Promise.all([
        a.untilState('migration', 'main', 'postcopy-paused', 60_000),
        b.untilState('arrival', 'main/g', 'postcopy-paused', 60_000),
      ]);
      cable.plug();
      await b.call('limit', { limits: { bandwidth: 0 } });
      expect(await report(a, 'main', 60_000)).toMatchObject({ state: 'completed', verified: true });
      await expectRuns(b);
      await expectOneOwner([a, b]);
    } finally {
      await endHosts();
      cable.remove();
    }
  });
});
