/** MicroVMs restored lazily from the VMD and from running migrations, and a running one that leaves. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  FirecrackerApi,
  type FirecrackerHost,
  firecrackerControl,
  type Guest,
  listen,
  type MicroVm,
  microVmArrivals,
  microVmGuest,
  migrate,
  type ParkTicket,
  park,
  serveSnapshot,
  snapshotGuest,
  stage,
  unpark,
} from '../../lib/index.js';
import { FakeFirecracker, type FakeState } from '../support/fake-firecracker.js';
import { FakeMicroVm, makeSnapshot } from '../support/micro-vm.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const secret = 'a secret that only this test knows';
const bytes = 32 * 2 ** 20;
const pages = bytes / 4096;

describe('a microVM', () => {
  let folder: string;
  let files: { memory: string; state: string };
  const open: (() => unknown)[] = [];

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'memferry-microvm-'));
    files = { memory: join(folder, 'memory'), state: join(folder, 'vmstate') };
    makeSnapshot(files.memory, bytes);
    const state: FakeState = { flags: ['--bytes', bytes, '--regions', 2], expect: [] };
    writeFileSync(files.state, JSON.stringify(state));
  });
  afterEach(async () => {
    for (const close of open.splice(0).reverse()) await close();
    rmSync(folder, { recursive: true });
  });

  const servers = async (count: number) => {
    const all = await Promise.all(
      Array.from({ length: count }, (_, index) =>
        stage({ secret, memoryBytes: 4 * bytes, name: `I${index + 1}` }),
      ),
    );
    open.push(...all.map((one) => () => one.close()));
    return all;
  };
  const parked = async (count = 1): Promise<{ ticket: ParkTicket; close: () => Promise<unknown> }> => {
    const all = await servers(count);
    using guest = await snapshotGuest('box', files);
    const via = all.map(({ port }) => `127.0.0.1:${port}`);
    const { ticket } = await park(guest, { secret, via });
    return { ticket, close: () => Promise.all(all.map((one) => one.close())) };
  };
  const firecracker = async (name: string, state?: FakeState) => {
    const fake = await new FakeFirecracker(join(folder, `${name}.api`), state).listen();
    open.push(() => fake.close());
    return fake;
  };
  const hostOf = (fake: FakeFirecracker): FirecrackerHost => {
    const api = new FirecrackerApi(fake.socketPath);
    const stateFile = `${fake.socketPath}.state`;
    return {
      socketPath: `${fake.socketPath}.uffd`,
      async load(state, { socketPath, signal }) {
        writeFileSync(stateFile, state);
        await api.loadSnapshot(stateFile, socketPath, { signal });
      },
      resume: () => api.resume(),
    };
  };
  const right = async (fake: FakeFirecracker) =>
    expect(await fake.microVm?.obey('verify')).toMatchObject({ wrong: 0 });

  it.each([1, 2])('is restored lazily from a VMD of %i servers, by one claim', async (count) => {
    const { ticket } = await parked(count);
    const fake = await firecracker('a');
    const unparked = await unpark(ticket, {
      secret,
      gatherLimit: 20e6,
      accept: microVmArrivals(hostOf(fake)),
    });
    open.push(() => unparked[Symbol.asyncDispose]());
    await expect.poll(() => fake.running).toBe(true);
    expect(fake.calls).toEqual(['PUT /snapshot/load', 'PATCH /vm Resumed']);
    // Long before all of it is here.
    expect(await fake.microVm?.obey('random 300 1')).toMatchObject({ wrong: 0 });
    await fake.microVm?.obey(`remove ${pages - 600} 500`);
    await fake.microVm?.obey('write 40 10 3');
    await right(fake);
    const second = await firecracker('b');
    await expect(unpark(ticket, { secret, accept: microVmArrivals(hostOf(second)) })).rejects.toMatchObject({
      name: 'StagingError',
    });
    expect(second.running).toBe(false);
    expect(await unparked.complete).toMatchObject({ heapBytes: bytes });
    await unparked[Symbol.asyncDispose]();
    await right(fake);
  });

  it('that Firecracker refuses stays parked, and is claimed again', async () => {
    const { ticket } = await parked();
    const fake = await firecracker('a');
    fake.refuseLoad = true;
    let abandoned = 0;
    const refusing = { ...hostOf(fake), abandon: () => void abandoned++ };
    await expect(unpark(ticket, { secret, accept: microVmArrivals(refusing) })).rejects.toMatchObject({
      code: 'PREPARE_FAILED',
      message: expect.stringContaining('the state is not what it should be'),
    });
    // Whoever started it is told to end it.
    expect([fake.running, abandoned]).toEqual([false, 1]);
    // Memory of another size, though it loads.
    const small: FakeFirecracker = await firecracker('c');
    const host = hostOf(small);
    await expect(
      unpark(ticket, {
        secret,
        accept: microVmArrivals({
          ...host,
          load: (_, context) =>
            host.load(Buffer.from(JSON.stringify({ flags: ['--bytes', bytes / 2], expect: [] })), context),
        }),
      }),
    ).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    // Nobody comes to the socket.
    await expect(
      unpark(ticket, {
        secret,
        accept: microVmArrivals({ ...host, connectTimeoutMs: 100, load: async () => {} }),
      }),
    ).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
    fake.refuseLoad = false;
    await using unparked = await unpark(ticket, { secret, accept: microVmArrivals(hostOf(fake)) });
    await right(fake);
    await unparked.complete;
  });

  it('fails rather than read zeros when the VMD is lost', async () => {
    const { ticket, close } = await parked();
    const fake = await firecracker('a');
    const unparked = await unpark(ticket, {
      secret,
      gatherLimit: 1e6,
      recoverTimeoutMs: 500,
      accept: microVmArrivals(hostOf(fake)),
    });
    open.push(() => unparked[Symbol.asyncDispose]());
    const lost = expect(unparked.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
    await close();
    await fake.microVm?.obey('verify').catch(() => {});
    await lost;
    expect(await fake.microVm?.exit).toMatchObject({ signal: 'SIGBUS' });
  });

  it.each(['stop-and-copy', 'pre-copy', 'post-copy', 'hybrid'] as const)(
    'is restored from a running migration: %s',
    async (mode) => {
      const fake = await firecracker('a');
      const listening = await listen({
        host: '127.0.0.1',
        port: 0,
        secret,
        accept: microVmArrivals(hostOf(fake)),
      });
      open.push(() => listening.close());
      using guest = await snapshotGuest('box', files);
      const migration = migrate(guest, { to: `127.0.0.1:${listening.port}`, mode, secret });
      const { value: arrival } = await listening[Symbol.asyncIterator]().next();
      await migration.evicted;
      await expect.poll(() => fake.running).toBe(true);
      expect(await fake.microVm?.obey('random 300 1')).toMatchObject({ wrong: 0 });
      await fake.microVm?.obey('remove 700 300');
      await right(fake);
      await arrival.complete;
      await listening.close();
      await right(fake);
    },
  );

  it('whose host fails once it is served is given up, and the source keeps it', async () => {
    const fake = await firecracker('a');
    const calls: string[] = [];
    const listening = await listen({
      ...{ host: '127.0.0.1', port: 0, secret },
      accept: microVmArrivals({
        ...hostOf(fake),
        onMicroVm: () => {
          throw new Error('the host wants no more');
        },
        abandon: () => void calls.push('abandon'),
      }),
    });
    open.push(() => listening.close());
    using guest = await snapshotGuest('box', files);
    const migration = migrate(guest, { to: `127.0.0.1:${listening.port}`, mode: 'stop-and-copy', secret });
    await expect(migration.done).rejects.toMatchObject({
      code: 'PREPARE_FAILED',
      message: expect.stringContaining('the host wants no more'),
    });
    await expect.poll(() => calls).toEqual(['abandon']);
    expect(fake.running).toBe(false);
    // Its host ends it as it likes.
    expect(fake.microVm?.child.signalCode).toBe(null);
  });

  it('that is not granted is ended with all that it has, and the source runs on', async () => {
    const fake = await firecracker('a');
    const listening = await listen({
      ...{ host: '127.0.0.1', port: 0, secret, grantTimeoutMs: 1000 },
      accept: microVmArrivals(hostOf(fake)),
    });
    const proxy = await TcpProxy.start(listening.port);
    open.push(
      () => listening.close(),
      () => closeProxies(),
    );
    const granting = proxy.at({ on: 'control', direction: 'up', name: 'grant' }, 'cut');
    using snapshot = await snapshotGuest('box', files);
    let runs = true;
    const guest: Guest = {
      ...snapshot,
      pause: (options) => {
        runs = false;
        return snapshot.pause(options);
      },
      unpause: () => {
        runs = true;
      },
    };
    const migration = migrate(guest, {
      ...{ to: `127.0.0.1:${proxy.port}`, mode: 'stop-and-copy', secret, inDoubtTimeoutMs: 20_000 },
    });
    const failed = expect(migration.done).rejects.not.toMatchObject({ code: 'MIGRATION_IN_DOUBT' });
    await granting.reached;
    // All of it is there, and whoever told it to resume would have two of the guest.
    expect(fake.microVm?.child.signalCode).toBe(null);
    await expect.poll(() => fake.microVm?.child.signalCode).toBe('SIGKILL');
    expect([fake.calls, runs]).toEqual([['PUT /snapshot/load'], false]);
    proxy.heal();
    await failed;
    expect(runs).toBe(true);
  });

  it('whose claim is not granted is ended, and the guest stays parked', async () => {
    const { ticket } = await parked();
    const fake = await firecracker('a');
    const host = hostOf(fake);
    const controller = new AbortController();
    const load = async (...args: Parameters<FirecrackerHost['load']>) => {
      await host.load(...args);
      controller.abort();
    };
    const accept = microVmArrivals({ ...host, load });
    await expect(unpark(ticket, { secret, accept, signal: controller.signal })).rejects.toMatchObject({
      code: 'CANCELLED',
    });
    expect(await fake.microVm?.exit).toMatchObject({ signal: 'SIGKILL' });
    const second = await firecracker('b');
    await using unparked = await unpark(ticket, { secret, accept: microVmArrivals(hostOf(second)) });
    await unparked.complete;
    await right(second);
  });

  it('whose pages are lost is told of each, touched or not, and has the others', async () => {
    const fake = await firecracker('a');
    let microVm: MicroVm | undefined;
    const listening = await listen({
      ...{ host: '127.0.0.1', port: 0, secret, recoverTimeoutMs: 500 },
      accept: microVmArrivals({ ...hostOf(fake), onMicroVm: (served) => (microVm = served) }),
    });
    const proxy = await TcpProxy.start(listening.port);
    open.push(
      () => listening.close(),
      () => closeProxies(),
    );
    using guest = await snapshotGuest('box', files);
    const migration = migrate(guest, {
      ...{ to: `127.0.0.1:${proxy.port}`, mode: 'post-copy', secret, bandwidth: 4e6, recoverTimeoutMs: 500 },
    });
    const failed = expect(migration.done).rejects.toBeInstanceOf(Error);
    const { value: arrival } = await listening[Symbol.asyncIterator]().next();
    await expect.poll(() => fake.running).toBe(true);
    const lost = expect(arrival.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
    proxy.cut();
    await lost;
    // It stands still.
    await expect(microVm?.ended).rejects.toMatchObject({ code: 'PAGES_LOST' });
    const settled = () => {
      const { pagesInstalled = 0, pagesLost = 0 } = microVm?.stats() ?? {};
      expect(pagesLost).toBeGreaterThan(0);
      return pagesInstalled + pagesLost;
    };
    await expect.poll(settled, { timeout: 20_000 }).toBe(pages);
    await failed;
  });

  it('waits for Firecracker whatever strangers say before it', async () => {
    const { ticket } = await parked();
    const fake = await firecracker('a');
    const host = hostOf(fake);
    const refused: string[] = [];
    let heard = () => {};
    const strangerHeard = new Promise<void>((resolve) => {
      heard = resolve;
    });
    const stranger = (path: string) =>
      connect(path)
        .on('error', () => {})
        .end('no mappings');
    const accept = microVmArrivals({
      ...host,
      load: async (state, context) => {
        stranger(context.socketPath);
        await strangerHeard;
        await host.load(state, context);
      },
      onRefused: ({ code }, { pid }) => {
        refused.push(`${code} ${pid === process.pid}`);
        heard();
      },
    });
    await using unparked = await unpark(ticket, { secret, accept });
    expect(refused).toEqual(['PROTOCOL_ERROR true']);
    await right(fake);
    await unparked.complete;
  });

  it('of which only strangers come says what they said', async () => {
    const { ticket } = await parked();
    const accept = microVmArrivals({
      socketPath: join(folder, 'nobody.uffd'),
      connectTimeoutMs: 500,
      load: async (_, { socketPath }) =>
        void connect(socketPath)
          .on('error', () => {})
          .end('no mappings'),
      resume: () => {},
    });
    await expect(unpark(ticket, { secret, accept })).rejects.toMatchObject({
      code: 'CONNECT_FAILED',
      message: expect.stringContaining('made no sense'),
    });
  });

  it('that does not resume after GRANT is reported so', async () => {
    const fake = await firecracker('a');
    const listening = await listen({
      ...{ host: '127.0.0.1', port: 0, secret },
      accept: microVmArrivals({
        ...hostOf(fake),
        resume: async () => {
          throw new Error('no resources');
        },
      }),
    });
    open.push(() => listening.close());
    using guest = await snapshotGuest('box', files);
    const migration = migrate(guest, { to: `127.0.0.1:${listening.port}`, mode: 'stop-and-copy', secret });
    const { value: arrival } = await listening[Symbol.asyncIterator]().next();
    expect(await arrival.complete).toMatchObject({ notRunning: expect.stringContaining('no resources') });
    await migration.done;
  });

  it.each([[['--fork']], [['--fork', '--memfd']]])('of a fork leaves while it runs: %s', async (flags) => {
    const socketPath = join(folder, 'first.uffd');
    let served: (microVm: MicroVm) => void = () => {};
    const connected = new Promise<MicroVm>((resolve) => {
      served = resolve;
    });
    const server = await serveSnapshot({
      socketPath,
      snapshot: files.memory,
      prePaging: 'all',
      onMicroVm: (microVm) => served(microVm),
    });
    open.push(() => server.close());
    const source = await firecracker('source', {
      flags: ['--bytes', bytes, ...flags],
      expect: ['expect 100 50 5', 'expect 4000 10 6'],
    });
    source.microVm = new FakeMicroVm(['--socket', socketPath, '--bytes', bytes, ...flags]);
    source.running = true;
    expect(await source.microVm.answer()).toEqual({ loaded: true });
    const microVm = await connected;
    expect(await microVm.ended).toMatchObject({ end: 'complete' });
    await source.microVm.obey('write 100 50 5');
    const region = microVm.toRegion();
    open.push(() => region.close());
    const guest = microVmGuest('box', region, firecrackerControl(new FirecrackerApi(source.socketPath)));

    const fake = await firecracker('destination');
    const listening = await listen({
      host: '127.0.0.1',
      port: 0,
      secret,
      accept: microVmArrivals(hostOf(fake)),
    });
    open.push(() => listening.close());
    const migration = migrate(guest, {
      to: `127.0.0.1:${listening.port}`,
      mode: 'pre-copy',
      secret,
      holdSwitchover: true,
    });
    const writing = source.microVm.obey('write 4000 10 6');
    const { value: arrival } = await listening[Symbol.asyncIterator]().next();
    await writing;
    migration.switchover();
    await migration.evicted;
    expect(source.calls).toEqual(['PATCH /vm Paused', 'PUT /snapshot/create']);
    await expect.poll(() => fake.running).toBe(true);
    await right(fake);
    await arrival.complete;
    await migration.done;
  });
});
