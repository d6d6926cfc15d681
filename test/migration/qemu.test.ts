/**
 * A guest of an unmodified QEMU: Debian's kernel with a program that checks its own memory moves from QEMU to QEMU in
 * every mode, by the commands as one types them. One guest, one journey: what a hop breaks, the guest itself says on its
 * serial line. Then the ways in which a move fails: the guest must run on where it was.
 */
import { createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { modes } from '../../src/index.js';
import { command, forEachTest, type Line } from '../support/command-line.js';
import * as commands from '../support/qemu/commands.js';
import { guestArguments, problemOf, Qemu, qemuObstacle } from '../support/qemu/rig.mjs';

const obstacle = qemuObstacle();
if (obstacle) console.warn(`skipped: guests of QEMU's: ${obstacle}`);

const memoryMb = 160;
/** One that the destination must have too. */
const device = ['-device', 'virtio-rng-pci'];
type AQemu = InstanceType<typeof Qemu>;

describe.skipIf(obstacle !== null)('a guest of QEMU', () => {
  const place = forEachTest();
  let here: AQemu;
  /** What the guest wrote where it was before. */
  const before: string[] = [];
  let args: string[] = [];

  beforeAll(async () => {
    args = [...guestArguments({ memoryMb }), ...device];
    here = await Qemu.start({ args });
    await here.ticks(20, 120_000);
  }, 240_000);
  afterAll(async () => {
    await here?.stop();
  });

  const account = () => problemOf([...before, here.serial]);
  const destinationOf = (qemu: AQemu, ...more: string[]) =>
    commands.destinationOf(qemu, place.secretFile, ...more);
  const sourceOf = (qemu: AQemu, port: unknown, ...more: string[]) =>
    commands.sourceOf(qemu, port, place.secretFile, ...more);

  /** Moves it, and goes along. */
  async function hop(mode: string, ...more: string[]): Promise<{ report: Line; arrival: Line }> {
    const there = await Qemu.start({ args, incoming: true });
    const destination = destinationOf(there);
    const { port } = await destination.next('listening');
    const via = mode.startsWith('scatter') ? ['--via', await commands.stageFor(place.secretFile)] : [];
    const source = sourceOf(here, port, '--mode', mode, ...via, ...more);
    const [report, arrival] = await Promise.all([source.next('report'), destination.next('report')]);
    expect([await source.closed, await destination.closed]).toEqual([0, 0]);
    // Nobody needs the one that it left.
    await here.ended;
    before.push(here.serial);
    here.kill();
    here = there;
    return { report, arrival };
  }

  test.each(modes)('%s: its counter goes on, its sums are right, and it can leave again', async (mode) => {
    const { report } = await hop(mode);
    await here.ticks(40);
    expect(account()).toBeNull();
    expect(report).toMatchObject({ mode, state: 'completed', verified: true, heapBytes: memoryMb * 2 ** 20 });
  });

  test('post-copy over a slow link: it runs on pages that come when it asks for them', async () => {
    const { report } = await hop('post-copy', '--bandwidth', '8M');
    await here.ticks(20);
    expect(account()).toBeNull();
    expect((report['remoteFaults'] as { count: number }).count).toBeGreaterThan(0);
  });

  describe('before the commit', () => {
    /** A move that fails; the guest runs on where it was, as if nothing had happened. */
    async function stays(
      fail: (there: AQemu) => Promise<unknown>,
      options: { args?: string[] } = {},
    ): Promise<void> {
      const there = await Qemu.start({ args, incoming: true, ...options });
      try {
        await fail(there);
        await here.ticks(20);
        expect(account()).toBeNull();
        expect(there.serial).toBe('');
      } finally {
        await there.stop();
      }
    }

    test('the destination is killed in the rounds', async () => {
      await stays(async (there) => {
        const destination = destinationOf(there);
        const { port } = await destination.next('listening');
        const source = sourceOf(here, port, '--mode', 'pre-copy', '--bandwidth', '2M');
        await destination.next('arrival');
        destination.child.kill('SIGKILL');
        expect(await source.closed).toBe(1);
        expect(source.errors()).toMatch(/^memferry: (CHANNEL_LOST|PEER_LOST|CONNECT_FAILED): /);
      });
    });

    test('the QEMU there is killed in the rounds', async () => {
      await stays(async (there) => {
        const destination = destinationOf(there);
        const { port } = await destination.next('listening');
        const source = sourceOf(here, port, '--mode', 'hybrid', '--bandwidth', '2M');
        await destination.next('arrival');
        there.process.kill('SIGKILL');
        expect(await source.closed).toBe(1);
        expect(await destination.closed).not.toBe(0);
      });
    });

    test('the source is killed in the rounds; the next attempt is as the first', async () => {
      await stays(async (there) => {
        const destination = destinationOf(there);
        const { port } = await destination.next('listening');
        const source = sourceOf(here, port, '--mode', 'hybrid', '--bandwidth', '2M');
        await destination.next('arrival');
        source.child.kill('SIGKILL');
        expect(await destination.closed).toBe(1);
      });
      await hop('hybrid');
      await here.ticks(20);
      expect(account()).toBeNull();
    });

    test('it is called off', async () => {
      await stays(async (there) => {
        const destination = destinationOf(there);
        const { port } = await destination.next('listening');
        const source = sourceOf(here, port, '--mode', 'pre-copy', '--bandwidth', '2M');
        await destination.next('arrival');
        source.child.kill('SIGINT');
        expect(await source.closed).toBe(130);
      });
    });

    test.each(['pre-copy', 'post-copy'])('%s: the QEMU there does not like the state', async (mode) => {
      const other = guestArguments({ memoryMb });
      await stays(
        async (there) => {
          const destination = destinationOf(there);
          const { port } = await destination.next('listening');
          const source = sourceOf(here, port, '--mode', mode);
          expect(await source.closed).toBe(1);
          // Whichever is noticed first: its refusal, its end, or that of the connections.
          expect(source.errors()).toMatch(/PREPARE_FAILED|OWNER_GONE|CHANNEL_LOST/);
          expect(await destination.closed).toBe(1);
          // It may have loaded half of it, and must never run.
          await there.ended;
        },
        { args: other },
      );
    });

    test('the QEMU there is another machine', async () => {
      const other = guestArguments({ memoryMb: 128 });
      const there = await Qemu.start({ args: other, incoming: true });
      const destination = destinationOf(there);
      const { port } = await destination.next('listening');
      const source = sourceOf(here, port);
      expect(await source.closed).toBe(1);
      expect(source.errors()).toContain('another memory backends');
      await there.stop();
      await here.ticks(5);
      expect(account()).toBeNull();
    });
  });

  test('after the commit the pager is killed: the guest waits for its pages, and never reads zeros', async () => {
    const there = await Qemu.start({ args, incoming: true });
    const destination = destinationOf(there);
    const { port } = await destination.next('listening');
    sourceOf(here, port, '--mode', 'post-copy', '--bandwidth', '1M');
    await destination.next('resumed');
    await there.until(() => there.counter >= 0, 'a tick there');
    destination.child.kill('SIGKILL');
    await destination.closed;
    // It stands within a bound, where it comes to what it has not got, and then it can only wait for that: a second
    // without a word, of a guest that says several.
    let said = there.serial;
    let saidAt = performance.now();
    for (const end = saidAt + 20_000; performance.now() < saidAt + 1000; ) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      if (there.serial === said) continue;
      said = there.serial;
      saidAt = performance.now();
      expect(saidAt, 'the guest goes on without its pages').toBeLessThan(end);
    }
    expect(problemOf([...before, here.serial, `${said.slice(0, said.lastIndexOf('\n') + 1)}`])).toBeNull();
    await there.stop();
  });
});

describe.skipIf(obstacle !== null)('a QEMU that cannot be moved is refused, by name', () => {
  const place = forEachTest();
  const ram = [
    '-object',
    'memory-backend-file,id=ram0,size=64M,share=on,mem-path=/dev/shm',
    '-machine',
    'pc,memory-backend=ram0',
  ];
  const bare = ['-accel', 'tcg', '-m', '64M', '-nodefaults', '-display', 'none', '-S'];

  async function refused(args: string[], extra: string[] = []): Promise<string> {
    const qemu = await Qemu.start({ args: [...bare, ...args], extra });
    try {
      const to = ['--to', '127.0.0.1:9', '--secret-file', place.secretFile];
      const source = command('qemu', 'source', '--qmp', qemu.qmp, '--shim', qemu.shim, ...to);
      expect(await source.closed).toBe(1);
      return source.errors();
    } finally {
      await qemu.stop();
    }
  }

  test('RAM of its own', async () => {
    expect(await refused([])).toMatch(
      /GUEST_UNMOVABLE: RAM that QEMU shares with nobody.*memory-backend-file/,
    );
  });

  test('a private backend', async () => {
    const own = ['-object', 'memory-backend-ram,id=ram0,size=64M', '-machine', 'pc,memory-backend=ram0'];
    expect(await refused(own)).toMatch(
      /GUEST_UNMOVABLE: RAM that QEMU shares with nobody cannot be moved \(ram0\)/,
    );
  });

  test('vhost-user: its backend writes RAM from another process', async () => {
    const path = join(place.directory, 'vhost-user');
    const backend = await vhostUserBackend(path);
    try {
      const network = [
        '-chardev',
        `socket,id=c0,path=${path}`,
        '-netdev',
        'type=vhost-user,id=vu0,chardev=c0',
      ];
      const errors = await refused(ram, [...network, '-device', 'virtio-net-pci,netdev=vu0']);
      expect(errors).toMatch(/GUEST_UNMOVABLE: .*vu0 \(its backend writes RAM from another process\)/);
    } finally {
      backend.close();
    }
  });

  test('without the shim', async () => {
    const qemu = await Qemu.start({ args: [...bare, ...ram], preload: '' });
    const to = ['--to', '127.0.0.1:9', '--secret-file', place.secretFile];
    const source = command('qemu', 'source', '--qmp', qemu.qmp, '--shim', qemu.shim, ...to);
    expect(await source.closed).toBe(1);
    expect(source.errors()).toMatch(/CONNECT_FAILED: nobody answers at .*LD_PRELOAD=.*libmemferry-shim\.so/);
    await qemu.stop();
  });

  test('a destination that does not wait for a guest', async () => {
    const qemu = await Qemu.start({ args: [...bare, ...ram] });
    const sockets = ['--qmp', qemu.qmp, '--shim', qemu.shim, '--secret-file', place.secretFile];
    const destination = command('qemu', 'destination', '--listen', '127.0.0.1:0', ...sockets);
    expect(await destination.closed).toBe(1);
    expect(destination.errors()).toMatch(/GUEST_BUSY: QEMU is 'prelaunch': start one that waits/);
    await qemu.stop();
  });
});

/** As much of a vhost-user backend as QEMU needs to start: it answers what has to be answered, with nothing. */
async function vhostUserBackend(path: string): Promise<Server> {
  const headerBytes = 12;
  const getFeatures = 1;
  const isAnswer = 1 << 2;
  const server = createServer((socket) => {
    socket.on('error', () => {});
    let held = Buffer.alloc(0);
    socket.on('data', (piece) => {
      held = Buffer.concat([held, piece]);
      while (held.length >= headerBytes && held.length >= headerBytes + held.readUInt32LE(8)) {
        const request = held.readUInt32LE(0);
        held = held.subarray(headerBytes + held.readUInt32LE(8));
        if (request !== getFeatures) continue;
        const answer = Buffer.alloc(headerBytes + 8);
        answer.writeUInt32LE(request, 0);
        answer.writeUInt32LE(1 | isAnswer, 4);
        answer.writeUInt32LE(8, 8);
        answer.writeBigUInt64LE(1n << 32n, headerBytes);
        socket.write(answer);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  return server;
}
