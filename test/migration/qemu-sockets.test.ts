/**
 * What can go wrong between memferry and the QEMUs themselves, with machines that have no guest but their firmware:
 * sockets of two QEMUs mixed up, memory that another one has too, a `cont` that comes too early or is refused.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createConnection, createServer, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, describe, expect, test } from 'vitest';
import {
  type ArrivalReport,
  listen,
  migrate,
  type QemuArrivalOptions,
  QemuDestination,
  QemuGuest,
} from '../../lib/index.js';
import { Qmp } from '../../lib/qemu/qmp.js';
import { Qemu, qemuObstacle } from '../support/qemu/rig.mjs';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const obstacle = qemuObstacle();
if (obstacle) console.warn(`skipped: QEMU's sockets: ${obstacle}`);

type AQemu = InstanceType<typeof Qemu>;
const secret = 'a secret that only this test knows';

describe.skipIf(obstacle !== null)('between memferry and QEMU', () => {
  const open: (() => unknown)[] = [];
  afterEach(async () => {
    for (const close of open.splice(0).reverse()) await close();
    await closeProxies();
  });

  function folder(under = tmpdir()): string {
    const made = mkdtempSync(join(under, 'memferry-sockets-'));
    open.push(() => rmSync(made, { recursive: true }));
    return made;
  }

  async function machine({
    incoming = false,
    memPath = '/dev/shm',
    more = [] as string[],
  } = {}): Promise<AQemu & { other: string }> {
    const other = join(folder(), 'other');
    const args = [
      ...['-accel', 'tcg', '-m', '64M', '-nodefaults', '-display', 'none'],
      ...['-object', `memory-backend-file,id=ram0,size=64M,share=on,mem-path=${memPath}`],
      ...['-machine', 'pc,memory-backend=ram0', '-qmp', `unix:${other},server=on,wait=off`],
      ...more,
    ];
    const qemu = await Qemu.start({ args, incoming });
    open.push(() => qemu.stop());
    return Object.assign(qemu, { other });
  }

  /** By the QMP socket that memferry does not have. */
  async function ask(qemu: { other: string }, command: string): Promise<unknown> {
    await using qmp = await Qmp.connect(qemu.other);
    return await qmp.execute(command);
  }
  const statusOf = async (qemu: { other: string }) =>
    ((await ask(qemu, 'query-status')) as { status: string }).status;

  /** In front of a QMP socket; `meet` sees each command first, and answers it itself where it gives true. `admits`: others. */
  async function qmpProxy(
    path: string,
    meet: (command: string, id: number, client: Socket) => boolean = () => false,
    admits = () => true,
  ): Promise<string> {
    const at = join(folder(), 'qmp');
    const server = createServer((client) => {
      if (!admits()) return void client.destroy();
      const qemu = createConnection(path);
      for (const [one, other] of [
        [client, qemu],
        [qemu, client],
      ] as const) {
        one.on('error', () => {});
        one.on('close', () => other.destroy());
      }
      qemu.pipe(client);
      createInterface({ input: client }).on('line', (line) => {
        const { execute, id } = JSON.parse(line) as { execute: string; id: number };
        if (!meet(execute, id, client)) qemu.write(`${line}\n`);
      });
    });
    await new Promise<void>((resolve) => server.listen(at, resolve));
    open.push(() => server.close());
    return at;
  }

  describe('the sockets of two QEMUs', () => {
    const refusal = { code: 'INVALID_ARGUMENT', message: expect.stringContaining('they are two QEMUs') };

    test('mixed up are refused at the source, and neither guest is touched', async () => {
      const [one, two] = await Promise.all([machine(), machine()]);
      await expect(QemuGuest.attach({ qmp: one.qmp, shim: two.shim })).rejects.toMatchObject(refusal);
      // Nor does it help when somebody else answers for it.
      const proxy = await qmpProxy(one.qmp);
      await expect(QemuGuest.attach({ qmp: proxy, shim: two.shim })).rejects.toMatchObject(refusal);
      expect([await statusOf(one), await statusOf(two)]).toEqual(['running', 'running']);
      // It is who speaks that counts, not who listens: a management may have made the socket.
      await using guest = await QemuGuest.attach({ qmp: proxy, shim: one.shim });
      expect(guest.pid).toBe(one.pid);
    });

    test('mixed up are refused at the destination', async () => {
      const [one, two] = await Promise.all([machine({ incoming: true }), machine({ incoming: true })]);
      await expect(new QemuDestination({ qmp: one.qmp, shim: two.shim }).check()).rejects.toMatchObject(
        refusal,
      );
      await new QemuDestination({ qmp: two.qmp, shim: two.shim }).check();
      expect([await statusOf(one), await statusOf(two)]).toEqual(['inmigrate', 'inmigrate']);
    });
  });

  test('memory that another QEMU runs in is no place to arrive in', async () => {
    const memPath = join(folder('/dev/shm'), 'ram');
    const source = await machine({ memPath });
    const there = await machine({ memPath, incoming: true });
    const destination = new QemuDestination({ qmp: there.qmp, shim: there.shim });
    await expect(destination.check()).rejects.toMatchObject({
      code: 'PREPARE_FAILED',
      facts: { names: ['ram0'], pid: source.pid },
    });
    // What a QEMU that has ended has left there is nobody's.
    await source.stop();
    await destination.check();
  });

  /** A migration from one machine to another, by a network that a test may stop. */
  async function journey(
    options: Partial<QemuArrivalOptions> = {},
    inFront = async (qmp: string): Promise<string> => qmp,
    inFrontHere = async (qmp: string): Promise<string> => qmp,
  ) {
    const [here, there] = await Promise.all([machine(), machine({ incoming: true })]);
    const destination = new QemuDestination({
      qmp: await inFront(there.qmp),
      shim: there.shim,
      ...options,
    });
    const listening = await listen({ port: 0, secret, accept: destination.accept });
    open.push(
      () => destination.close(),
      () => listening.close(),
    );
    const proxy = await TcpProxy.start(listening.port);
    const guest = await QemuGuest.attach({ qmp: await inFrontHere(here.qmp), shim: here.shim });
    open.push(() => guest.close());
    const go = async (): Promise<{ report: Promise<ArrivalReport>; done: Promise<unknown> }> => {
      const migration = migrate(guest, { to: `127.0.0.1:${proxy.port}`, mode: 'stop-and-copy', secret });
      open.push(() => migration[Symbol.asyncDispose]());
      migration.done.catch(() => {});
      const { value: arrival } = await listening[Symbol.asyncIterator]().next();
      arrival.complete.catch(() => {});
      return { report: arrival.complete, done: migration.done };
    };
    return { here, there, destination, proxy, go };
  }

  test('a QEMU whose guest had to be declined is as it was, and takes the next', async () => {
    const { here, there, proxy, go } = await journey();
    const before = await ask(there, 'query-migrate-capabilities');
    const temporary = process.env['TMPDIR'];
    process.env['TMPDIR'] = join(folder(), 'not-there');
    try {
      await using guest = await QemuGuest.attach({ qmp: here.other, shim: here.shim });
      const first = migrate(guest, { to: `127.0.0.1:${proxy.port}`, mode: 'post-copy', secret });
      first.evicted.catch(() => {});
      await expect(first.done).rejects.toThrow('not-there');
    } finally {
      if (temporary === undefined) delete process.env['TMPDIR'];
      else process.env['TMPDIR'] = temporary;
    }
    expect(await statusOf(there)).toBe('inmigrate');
    expect(await ask(there, 'query-migrate-capabilities')).toEqual(before);
    const { report, done } = await go();
    await done;
    expect(await report).toMatchObject({ verified: true, notRunning: null });
    expect(await statusOf(there)).toBe('running');
  });

  test('a disk past the page cache is refused with rounds by name, and leaves without, whatever was asked last', async () => {
    const image = join(folder(), 'image');
    writeFileSync(image, Buffer.alloc(2 ** 20));
    const disk = `driver=file,node-name=disk0,filename=${image},cache.direct=on`;
    const here = await machine({ more: ['-blockdev', disk] });
    await using guest = await QemuGuest.attach({ qmp: here.qmp, shim: here.shim });
    const { signal } = new AbortController();
    await guest.check({ signal, rounds: false });
    // As a base is asked for, which is then declined.
    const refused = guest.check({ signal, rounds: true });
    await expect(refused).rejects.toMatchObject({ code: 'GUEST_UNMOVABLE', facts: { names: ['disk0'] } });
    const { state } = await guest.pause({ signal });
    expect(state.length).toBeGreaterThan(1000);
    await guest.unpause();
    expect(await statusOf(here)).toBe('running');
  });

  test('a QEMU that hangs as it is told to stop, and is given up: its guest runs on when it comes to itself', async () => {
    const here = await machine();
    const giveUp = new AbortController();
    let stops = 0;
    const hangs = await qmpProxy(here.qmp, (command) => {
      if (command === 'stop' && ++stops === 1) {
        process.kill(here.pid, 'SIGSTOP');
        setTimeout(() => giveUp.abort(), 1500);
        // It has been asked twice about its migration by then, and waits with `cont`.
        setTimeout(() => process.kill(here.pid, 'SIGCONT'), 13_000);
      }
      return false;
    });
    await using guest = await QemuGuest.attach({ qmp: hangs, shim: here.shim });
    const warnings: Error[] = [];
    guest.on('warning', (warning: Error) => warnings.push(warning));
    await expect(guest.pause({ signal: giveUp.signal })).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(warnings.length).toBeGreaterThan(0);
    for (let look = 0; look < 10; look++) {
      expect(await statusOf(here)).toBe('running');
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    // Nobody took the state that it had been asked for: it has seen that by itself, or is told first.
    const { status } = (await ask(here, 'query-migrate')) as { status: string };
    expect(['failed', 'cancelled']).toContain(status);
    // And it may be asked again at once.
    const { state } = await guest.pause({ signal: new AbortController().signal });
    expect(state.length).toBeGreaterThan(1000);
    await guest.unpause();
    expect(await statusOf(here)).toBe('running');
  });

  test("somebody else's cont before GRANT: that QEMU is ended, and the guest runs on here", async () => {
    const { here, there, proxy, go } = await journey();
    const ready = proxy.at({ on: 'control', direction: 'down', name: 'ready' }, 'hold');
    const { report, done } = await go();
    await ready.reached;
    expect(await statusOf(there)).toBe('paused');
    await ask(there, 'cont').catch(() => {}); // it may be gone before it has answered
    const busy = { code: 'GUEST_BUSY', message: expect.stringContaining('before it was granted') };
    await expect(report).rejects.toMatchObject(busy);
    // The reason follows right behind: a source that sees only the cut does not wait for it until QEMU has ended.
    ready.release();
    await there.ended;
    await expect(done).rejects.toMatchObject(busy);
    await expect.poll(() => statusOf(here)).toBe('running');
  });

  describe('GRANT, and the QMP connection to the QEMU that it left ends', () => {
    test('as it is told to quit: it is told over another one', async () => {
      let turns = 0;
      const { here, go } = await journey({}, undefined, (qmp) =>
        qmpProxy(qmp, (command, _, client) => {
          if (command !== 'quit' || ++turns > 1) return false;
          client.destroy();
          return true;
        }),
      );
      const { done } = await go();
      await done;
      expect([await here.ended, turns]).toEqual([0, 2]);
    });

    test('and there is no other: it is killed, since its guest must never go on', async () => {
      const clients = new Set<Socket>();
      let alone = false;
      const { here, proxy, go } = await journey({}, undefined, (qmp) =>
        qmpProxy(
          qmp,
          (_command, _id, client) => {
            clients.add(client);
            return false;
          },
          () => !alone,
        ),
      );
      const granting = proxy.at({ on: 'control', direction: 'up', name: 'grant' }, 'hold');
      const { done } = await go();
      await granting.reached;
      alone = true;
      for (const client of clients) client.destroy();
      granting.release();
      await done;
      expect(await here.ended).toBe('SIGKILL');
    });
  });

  describe('GRANT, and QEMU does not let it run', () => {
    /** `turn`: of the `cont`s that have come. */
    async function withCont(
      meet: (turn: number, id: number, client: Socket) => boolean,
      options: Partial<QemuArrivalOptions> = {},
    ) {
      let turns = 0;
      const warnings: string[] = [];
      const all = await journey({ onWarning: (error) => warnings.push(error.message), ...options }, (qmp) =>
        qmpProxy(qmp, (command, id, client) => (command === 'cont' ? meet(++turns, id, client) : false)),
      );
      return { ...all, warnings, turns: () => turns };
    }
    const refuse = (id: number, client: Socket) => {
      client.write(
        `${JSON.stringify({ id, error: { class: 'GenericError', desc: 'the disk is locked' } })}\n`,
      );
      return true;
    };

    test('at first: it is asked again', async () => {
      const { there, go, turns, warnings } = await withCont((turn, id, client) =>
        turn <= 2 ? refuse(id, client) : false,
      );
      const { report, done } = await go();
      expect(await report).toMatchObject({ notRunning: null });
      await done;
      expect([turns(), await statusOf(there), warnings]).toEqual([3, 'running', []]);
    });

    test('because the connection is gone: it is asked over another one', async () => {
      const { there, go } = await withCont((turn, _, client) => {
        if (turn === 1) client.destroy();
        return turn === 1;
      });
      const { report, done } = await go();
      expect(await report).toMatchObject({ notRunning: null });
      await done;
      expect(await statusOf(there)).toBe('running');
    });

    test('at all: it is told in every way, and the guest stands there, whole, until the cause is gone', async () => {
      const { there, destination, go, warnings } = await withCont((_, id, client) => refuse(id, client), {
        resumeTimeoutMs: 300,
      });
      const { report, done } = await go();
      expect(await report).toMatchObject({ notRunning: expect.stringContaining('the disk is locked') });
      await done;
      await expect(destination.running).rejects.toMatchObject({ code: 'RESUME_FAILED' });
      expect(warnings).toEqual([expect.stringContaining("send 'cont' over QMP")]);
      expect(await statusOf(there)).toBe('paused');
      await ask(there, 'cont');
      expect(await statusOf(there)).toBe('running');
    });
  });
});
