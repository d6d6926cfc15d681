/** libmemferry-shim.so in a real QEMU without a guest, asked as memferry asks it and as it should not be asked. */
import { spawn, spawnSync } from 'node:child_process';
import { fstatSync, mkdtempSync, rmSync, statSync } from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { closeDescriptors } from '../../src/fd-channel.js';
import { Shim } from '../../src/qemu/shim.js';
import { Qemu, qemuObstacle, shimObject } from '../support/qemu/rig.mjs';

const obstacle = qemuObstacle();
if (obstacle) console.warn(`skipped: the shim: ${obstacle}`);

const wpAsync = (1n << 15n) | (1n << 13n);
const backends = ['ram0,size=64M', 'ram1,size=32M'].flatMap((one) => [
  '-object',
  `memory-backend-file,id=${one},share=on,mem-path=/dev/shm`,
]);

describe.skipIf(obstacle !== null)('the shim', () => {
  let qemu: InstanceType<typeof Qemu>;
  beforeAll(async () => {
    const own = ['-object', 'memory-backend-ram,id=own,size=16M'];
    qemu = await Qemu.start({ args: ['-machine', 'none', '-display', 'none', ...backends, ...own] });
  });
  afterAll(() => qemu?.stop());

  /** What is said to `lines`, until the shim closes or `count` answers have come. */
  function say(lines: string | Buffer, count: number): Promise<string[]> {
    return new Promise((resolve) => {
      const socket = createConnection(qemu.shim);
      let text = '';
      const end = () => {
        socket.destroy();
        resolve(text.split('\n').filter((line) => line !== ''));
      };
      socket.setEncoding('utf8').on('data', (piece) => {
        text += piece;
        if (text.split('\n').length > count) end();
      });
      socket.once('close', end);
      socket.once('error', end);
      socket.write(lines);
    });
  }

  test('says who it is, and is believed only if the kernel says the same', async () => {
    using shim = await Shim.connect(qemu.shim);
    expect(shim.pid).toBe(qemu.pid);
    expect(shim.uid).toBe(0);
    expect(shim.pidfd).toBeGreaterThan(2);
  });

  test('gives the shared memory, and none that is private', async () => {
    using shim = await Shim.connect(qemu.shim);
    const { mappings, files } = await shim.memory();
    try {
      expect(mappings.map(({ lengthBytes }) => lengthBytes / 2 ** 20).sort()).toEqual([32, 64]);
      for (const { file, lengthBytes, address, offset } of mappings) {
        expect(fstatSync(files[file] as number).size).toBe(lengthBytes);
        expect(address % 4096n).toBe(0n);
        expect(offset).toBe(0);
      }
    } finally {
      closeDescriptors(files);
    }
  });

  test('keeps the userfaultfd: who asks again has the same one', async () => {
    {
      using shim = await Shim.connect(qemu.shim);
      const fds = [
        await shim.userfaultfd(wpAsync),
        await shim.userfaultfd(wpAsync),
        await shim.userfaultfd(8n),
      ];
      closeDescriptors(fds);
    }
    const answers = await say('1 userfaultfd a000\n1 userfaultfd 8\n', 2);
    expect(answers.map((answer) => JSON.parse(answer))).toMatchObject([
      { features: 'a000', new: false },
      { features: '8', new: false },
    ]);
  });

  test('a feature that no kernel has', async () => {
    using shim = await Shim.connect(qemu.shim);
    await expect(shim.userfaultfd(1n << 60n)).rejects.toMatchObject({ code: 'USERFAULTFD_UNAVAILABLE' });
  });

  test('bad requests get an answer, or the end, and harm nothing', async () => {
    const answers = await say(
      '2 hello\nhello\n1 hello there\n1 memory 5\n1 userfaultfd\n1 userfaultfd zz\n1 userfaultfd 1ffffffffffffffff\n1 quit\n\0\n',
      9,
    );
    expect(answers.map((answer) => JSON.parse(answer).errno)).toEqual([93, 71, 38, 38, 38, 22, 22, 38, 71]);
    expect(await say(Buffer.alloc(100_000, 120), 1)).toEqual([]);
    const flood = '1 hello\n'.repeat(1000);
    expect((await say(flood, 1000)).length).toBe(64);
    using shim = await Shim.connect(qemu.shim);
    expect(shim.pid).toBe(qemu.pid);
  });

  test('userfaultfds are bounded', async () => {
    const sets = Array.from({ length: 12 }, (_, bit) => `1 userfaultfd ${(1 << (bit % 9)).toString(16)}\n`);
    const answers = await say(sets.join(''), 12);
    expect(answers.filter((answer) => answer.includes('too many userfaultfds')).length).toBeGreaterThan(0);
  });

  test('one that says nothing does not keep others from being heard for long', async () => {
    const silent = createConnection(qemu.shim);
    silent.on('error', () => {});
    await new Promise((resolve) => silent.once('connect', resolve));
    using shim = await Shim.connect(qemu.shim);
    expect(shim.pid).toBe(qemu.pid);
    silent.destroy();
  });

  test('only its user and root may enter', () => {
    expect(statSync(qemu.shim).mode & 0o777).toBe(0o600);
  });
});

describe.skipIf(obstacle !== null)('the shim in other programs', () => {
  const directory = mkdtempSync(join(tmpdir(), 'shim-test-'));
  afterAll(() => rmSync(directory, { recursive: true, force: true }));
  const environment = (name: string, more = {}) => ({
    ...process.env,
    LD_PRELOAD: shimObject,
    MEMFERRY_SHIM_SOCKET: join(directory, name),
    ...more,
  });

  test('leaves one that is not meant alone', () => {
    const { stdout } = spawnSync('sh', ['-c', 'echo $MEMFERRY_SHIM_SOCKET'], {
      env: environment('a'),
      encoding: 'utf8',
    });
    expect(stdout.trim()).toBe(join(directory, 'a'));
    expect(() => statSync(join(directory, 'a'))).toThrow();
  });

  test('says its name to what it is meant for, and not to what that starts', () => {
    const { stdout } = spawnSync('env', [], {
      env: environment('b', { MEMFERRY_SHIM_PROGRAM: 'env' }),
      encoding: 'utf8',
    });
    expect(stdout.includes('MEMFERRY_SHIM_SOCKET')).toBe(false);
    expect(statSync(join(directory, 'b')).isSocket()).toBe(true);
  });

  test('a socket that a dead one left is taken over; one that lives, or is no socket, is not', async () => {
    const env = environment('c', { MEMFERRY_SHIM_PROGRAM: 'sleep' });
    spawnSync('sleep', ['0'], { env });
    expect(statSync(join(directory, 'c')).isSocket()).toBe(true);
    const living = spawn('sleep', ['30'], { env, stdio: 'ignore' });
    try {
      using shim = await connected(join(directory, 'c'));
      expect(shim.pid).toBe(living.pid);
      const { status, stderr } = spawnSync('sleep', ['0'], { env, encoding: 'utf8' });
      expect(status).toBe(1);
      expect(stderr).toMatch(/^memferry-shim: listen on .*\/c: Address already in use$/m);
    } finally {
      living.kill('SIGKILL');
    }
    const long = spawnSync('sleep', ['0'], {
      env: { ...env, MEMFERRY_SHIM_SOCKET: `/${'x'.repeat(200)}` },
      encoding: 'utf8',
    });
    expect(long.stderr).toMatch(/File name too long/);
  });
});

async function connected(path: string): Promise<Shim> {
  for (let turn = 0; turn < 600; turn++) {
    const shim = await Shim.connect(path).catch(() => null);
    if (shim) return shim;
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  throw new Error(`nobody at ${path}`);
}
