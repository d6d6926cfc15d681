/** `memferry receive` and `memferry send` as one types them into two terminals, with the counter of examples/. */
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import { counter, forEachTest, loopbackOfItsOwn, command as run } from '../support/command-line.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

const place = forEachTest();
const command = (...args: string[]) => run(...args, '--secret-file', place.secretFile);

async function receiver(...args: string[]) {
  const there = command('receive', '--listen', '127.0.0.1:0', '--module', `counter=${counter}`, ...args);
  const { port } = await there.next('listening');
  return { ...there, port: port as number, to: `127.0.0.1:${port}` };
}

describe('a guest of one’s own', () => {
  test.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'])(
    'moves by %s and goes on counting',
    async (mode) => {
      const there = await receiver();
      const here = command('send', '--to', there.to, '--module', `counter=${counter}`, '--mode', mode);
      await here.next('started');
      expect(await here.ask({ add: 3 })).toBe(3);
      expect(await here.ask({ add: 5, slot: 1_000_000 })).toBe(5);
      expect(await there.ask('read')).toMatchObject({ code: 'NO_GUEST' });
      here.child.stdin.write('\n');
      const report = await here.next('report');
      expect(report).toMatchObject({ mode, verified: true, heapBytes: 64 * 2 ** 20 });
      expect(await here.closed).toBe(0);
      expect(here.lines.at(-1)).toEqual(report);
      await there.next('report');
      expect(await there.ask({ add: 4 })).toBe(7);
      expect(await there.ask({ add: 0, slot: 1_000_000 })).toBe(5);
      expect(await there.ask('history')).toEqual(['created', `moved to process ${there.child.pid}`]);
      there.child.kill('SIGINT');
      expect(await there.closed).toBe(0);
    },
  );

  test('moves at SIGUSR1, and --once ends the receiver with it', async () => {
    const there = await receiver('--once');
    const here = command('send', '--to', there.to, '--module', `counter=${counter}`);
    await here.next('started');
    here.child.kill('SIGUSR1');
    expect(await here.closed).toBe(0);
    expect(await there.closed).toBe(0);
    expect(there.lines.at(-1)).toMatchObject({ type: 'report', verified: true });
  });

  test('does not come, and a receiver that waits for it --once is interrupted', async () => {
    const there = await receiver('--once');
    there.child.kill('SIGINT');
    expect(await there.closed).toBe(130);
    expect(there.errors()).toMatch(/^memferry: CANCELLED: [^\n]*\n$/);
  });

  test('moves at the end of its input', async () => {
    const there = await receiver('--once');
    const here = command('send', '--to', there.to, '--module', `counter=${counter}`);
    here.child.stdin.end();
    expect(await here.closed).toBe(0);
    expect(await there.closed).toBe(0);
  });

  test('moves after a time, whatever its input does', async () => {
    const there = await receiver('--once');
    const here = command('send', '--to', there.to, '--module', `counter=${counter}`, '--after-ms', '50');
    here.child.stdin.end();
    expect(await here.closed).toBe(0);
    expect(await there.closed).toBe(0);
  });
});

describe('what is wrong is one line with a code', () => {
  test('nobody listens', async () => {
    const here = command('send', '--to', '127.0.0.1:9', '--module', `counter=${counter}`);
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: CONNECT_FAILED: [^\n]*\n$/);
  });

  test('a module that is not on the list', async () => {
    const there = await receiver();
    const here = command('send', '--to', there.to, '--module', `other=${counter}`);
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: MODULE_REFUSED: [^\n]*\n$/);
    there.child.kill('SIGINT');
    expect(await there.closed).toBe(0);
  });

  test('another file under the same name', async () => {
    const there = await receiver();
    const changed = join(place.directory, 'counter.mjs');
    // Outside the package its import would not be found, so that nothing but the file differs.
    const worker = new URL('../../lib/worker/index.js', import.meta.url).href;
    writeFileSync(
      changed,
      `import { defineGuest } from '${worker}';\n` +
        `export default defineGuest({ create: (c) => c.heap(65536 * 16), handle: () => 0 });\n`,
    );
    const here = command('send', '--to', there.to, '--module', `counter=${changed}`);
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: MODULE_REFUSED: [^\n]*SHA-256[^\n]*\n$/);
  });

  test('another secret', async () => {
    const there = await receiver();
    writeFileSync(place.secretFile, 'b'.repeat(64), { mode: 0o600 });
    const here = command('send', '--to', there.to, '--module', `counter=${counter}`);
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: AUTH_FAILED: [^\n]*\n$/);
  });

  test('a module that does not load', async () => {
    const here = command('send', '--to', '127.0.0.1:9', '--module', 'x=/nowhere.mjs');
    expect(await here.closed).toBeGreaterThan(0);
    expect(here.errors()).toMatch(/^memferry: [A-Z_]+: [^\n]*\n$/);
  });

  test('an open network without --plaintext', async () => {
    const here = command('receive', '--listen', '0.0.0.0:0', '--module', `counter=${counter}`);
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: PLAINTEXT_REQUIRED: [^\n]*\n$/);
  });
});

describe('a destination that does not answer in time is asked on', () => {
  afterEach(closeProxies);
  const GRANT: Point = { on: 'control', direction: 'up', name: 'grant' };
  const RESUMED: Point = { on: 'control', direction: 'down', name: 'resumed' };

  /** Until `send` has said that it is in doubt. */
  async function inDoubt(cutAt: Point) {
    const there = await receiver();
    const proxy = await TcpProxy.start(there.port);
    proxy.at(cutAt, 'cut');
    const here = command('send', '--to', `127.0.0.1:${proxy.port}`, '--module', `counter=${counter}`);
    await here.next('started');
    expect(await here.ask({ add: 3, slot: 1_000_000 })).toBe(3);
    here.child.stdin.write('\n');
    await here.next('in-doubt');
    return { there, proxy, here };
  }

  // At once, since each takes half a minute to be in doubt.
  test('until it says whose the guest is, or one gives up', async () => {
    const taken = async () => {
      const { there, proxy, here } = await inDoubt(RESUMED);
      proxy.heal();
      expect(await here.next('report')).toMatchObject({ mode: 'hybrid', verified: true });
      expect(await here.closed, here.errors()).toBe(0);
      await there.next('report');
      expect(await there.ask({ add: 1, slot: 1_000_000 })).toBe(4);
    };
    const refused = async () => {
      const { proxy, here } = await inDoubt(GRANT);
      proxy.heal();
      expect(await here.next('failed')).toMatchObject({
        code: 'PEER_LOST',
        message: expect.stringMatching(/ let run on here$/),
      });
      // Somebody can still tell it.
      expect(await here.ask({ add: 1, slot: 1_000_000 })).toBe(4);
      here.child.stdin.write('\n');
      expect(await here.closed, here.errors()).toBe(0);
    };
    const givenUp = async () => {
      const { here } = await inDoubt(GRANT);
      here.child.kill('SIGINT');
      expect(await here.closed).toBe(4);
      expect(here.errors()).toMatch(
        /^memferry: MIGRATION_IN_DOUBT: [^\n]* Ctrl-C [^\n]*\nmemferry: MIGRATION_IN/,
      );
    };
    await Promise.all([taken(), refused(), givenUp()]);
  }, 90_000);
});

describe('a guest that comes back', () => {
  test('leaves a stale copy, and finds it; what was asked meanwhile is replayed', async () => {
    const kept = join(place.directory, 'kept');
    const log = join(place.directory, 'log');
    const far = await receiver();
    const here = command(
      ...['send', '--to', far.to, '--module', `counter=${counter}`, '--keep-stale-copy', kept],
    );
    await here.next('started');
    expect(await here.ask({ add: 3 })).toBe(3);
    here.child.stdin.write('\n');
    expect(await here.closed).toBe(0);
    // The way back is another guest of the same name and module: what it was is in the directory.
    writeFileSync(log, '{"add": 4}\n{"add": 5, "slot": 1000}\n');
    const home = await receiver('--once', '--base', kept, '--base-for-any', '--replay-ms', '1000');
    const back = command(
      ...['send', '--to', home.to, '--module', `counter=${counter}`, '--use-base', 'always', '--replay', log],
    );
    await back.next('started');
    expect(await back.ask({ add: 7 })).toBe(7);
    expect(await back.ask({ add: 5, slot: 1000 })).toBe(5);
    back.child.stdin.write('\n');
    const report = await back.next('report');
    expect(report).toMatchObject({ verified: true, base: { used: true, problem: null } });
    expect((report['base'] as { pagesSame: number }).pagesSame).toBeGreaterThan(16_000);
    expect(await back.closed).toBe(0);
    expect(await home.next('report')).toMatchObject({ type: 'report', verified: true });
    far.child.kill('SIGINT');
    expect(await far.closed).toBe(0);
  });

  test('nobody leaves before the stale copy is written', async () => {
    const here = command(
      ...['send', '--to', '127.0.0.1:1', '--module', `counter=${counter}`],
      ...['--keep-stale-copy', place.directory, '--leave-when-evicted'],
    );
    expect(await here.closed).toBe(2);
    expect(here.errors()).toContain('INVALID_ARGUMENT: --leave-when-evicted');
  });

  test('a log that is not there yet may be written until the guest goes', async () => {
    const there = await receiver();
    const log = join(place.directory, 'log');
    const here = command('send', '--to', there.to, '--module', `counter=${counter}`, '--replay', log);
    await here.next('started');
    here.child.stdin.write('\n');
    expect(await here.next('failed')).toMatchObject({ code: 'INVALID_ARGUMENT' });
    writeFileSync(log, '{"add": 4}\n');
    here.child.stdin.write('\n');
    expect(await here.closed, here.errors()).toBe(0);
    there.child.kill('SIGINT');
    expect(await there.closed).toBe(0);
  });
});

describe('a guest that cannot leave', () => {
  test.each([
    [2, 'INVALID_ARGUMENT', ['--to', 'nonsense']],
    [1, 'PLAINTEXT_REQUIRED', ['--to', '10.0.0.1:7000']],
    [2, 'INVALID_ARGUMENT', ['--downtime-limit-ms', '1e12']],
    [2, 'INVALID_ARGUMENT', ['--replay', '/nowhere/log']],
    [2, 'INVALID_ARGUMENT', ['--replicas', '2']],
    [2, 'INVALID_ARGUMENT', ['--mode', 'scatter', '--via', 'nonsense']],
    [1, 'PLAINTEXT_REQUIRED', ['--mode', 'scatter', '--via', '10.0.0.1:7100']],
    [1, 'AUTH_FAILED', ['--secret-file', '/nowhere']],
  ])('is not started: %i %s %j', async (exit, code, wrong) => {
    const right = ['--to', '127.0.0.1:9', '--secret-file', place.secretFile];
    const here = run('send', '--module', `counter=${counter}`, ...right, ...wrong);
    expect(await here.closed).toBe(exit);
    expect(here.errors()).toMatch(new RegExp(`^memferry: ${code}: [^\\n]*\\n$`));
    expect(here.lines).toEqual([]);
  });

  test('runs on, and leaves when it is told again', async () => {
    const to = `${loopbackOfItsOwn()}:7000`;
    const here = command('send', '--to', to, '--module', `counter=${counter}`);
    await here.next('started');
    expect(await here.ask({ add: 3 })).toBe(3);
    for (const sign of [() => here.child.stdin.write('\n'), () => here.child.kill('SIGUSR1')]) {
      sign();
      expect(await here.next('failed')).toMatchObject({ guest: 'counter', code: 'CONNECT_FAILED' });
      expect(await here.ask({ add: 1 })).toBeGreaterThan(3);
    }
    const there = await receiver('--listen', to, '--once');
    // More than one sign is one.
    for (let times = 0; times < 5; times++) here.child.kill('SIGUSR1');
    expect(await here.closed, here.errors()).toBe(0);
    expect(await there.closed).toBe(0);
  });

  test('ends with its input, when nobody can tell it again', async () => {
    const here = command('send', '--to', '127.0.0.1:9', '--module', `counter=${counter}`);
    await here.next('started');
    here.child.stdin.write('\n');
    await here.next('failed');
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: CONNECT_FAILED: [^\n]*\n$/);
  });
});
