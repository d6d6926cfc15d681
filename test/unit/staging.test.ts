/** VMD servers and their clients over real loopback connections, pages being the native part's. */
import { connect, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { dial as dialControl } from '../../src/control/dial.js';
import { FrameKind, FrameSealer } from '../../src/control/frame.js';
import { directionKey, handshakeAsAcceptor } from '../../src/control/handshake.js';
import { stageRoles } from '../../src/staging/image-secret.js';
import { StageClient } from '../../src/staging/client.js';
import { openImage, openParkedImage } from '../../src/staging/image-opening.js';
import type { ImageSet } from '../../src/staging/image-set.js';
import { stageOn } from '../../src/staging/server.js';
import { TcpProxy } from '../support/tcp-proxy.js';
import { Loopback, readPreface, secret as pairSecret } from './control-pair.js';
import {
  connection,
  FakeServer,
  imageId,
  imageSecret,
  makeImage,
  newImage,
  parkedGuest,
  secret,
  until,
} from './fake-stage.js';

const open: { close(): Promise<unknown> }[] = [];
afterEach(async () => {
  for (const one of open.splice(0).reverse()) await one.close();
});
function owned<T extends { close(): Promise<unknown> }>(one: T): T {
  open.push(one);
  return one;
}
const serve = async (options: Parameters<typeof FakeServer.start>[0] = {}) =>
  owned(await FakeServer.start(options));
const dial = async (server: FakeServer, more = {}) =>
  owned(await StageClient.dial({ ...connection(more), ...server.address }));
const make = async (servers: FakeServer[], more = {}, link = {}) =>
  owned(
    await makeImage(
      servers.map(({ address }) => address),
      connection(link),
      newImage(more),
    ),
  );
const has = (server: FakeServer) => server.native.images.has(imageId);
const phaseAt = (server: FakeServer) => server.staging.status().held.find(({ id }) => id === imageId)?.phase;

/** A park that was committed, as its source leaves it. */
async function park(servers: FakeServer[], image = imageId): Promise<void> {
  const set = await make(servers, { kind: 'park', image });
  for (const server of servers) (server.native.images.get(image) as { whole: boolean }).whole = true;
  await set.putState(parkedGuest, Buffer.from('registers'));
  expect(await set.commit()).toEqual([]);
  const answers: string[] = [];
  const link = set.home.commitLink(image, { onMessage: ({ type }) => answers.push(type), onLost() {} });
  link.send({ type: 'prepare', epoch: 0 });
  await until(() => answers.includes('ready'));
  link.send({ type: 'grant', epoch: 0 });
  await until(() => answers.includes('resumed'));
  await set.close();
}
const claimant = async (servers: FakeServer[]) =>
  owned(
    await openParkedImage((servers[0] as FakeServer).address, connection(), {
      image: imageId,
      secret: imageSecret,
      access: 'read',
    }),
  );

describe('a VMD server', () => {
  it('makes an image, and gives the session whose tokens both ends know', async () => {
    const servers = [await serve({ name: 'one', rack: 'r1' }), await serve({ name: 'two' })];
    const set = await make(servers, { replicas: 2 });
    expect(set.servers.map(({ name, host, port }) => ({ name, host, port }))).toEqual(
      servers.map(({ address }, at) => ({ name: ['one', 'two'][at], ...address })),
    );
    for (const [at, server] of servers.entries()) {
      const image = server.native.images.get(imageId);
      const session = set.servers[at];
      expect(image?.regionPages).toEqual([128]);
      expect(image?.ordinal).toBe(at);
      const known = image?.sessions.get(session?.session as number);
      expect(known?.roles).toBe((1 << stageRoles.scatter) | (1 << stageRoles.probe));
      expect(tokenOf(known?.tokens, 63, stageRoles.scatter)).toEqual(
        tokenOf(session?.tokens, 63, stageRoles.scatter),
      );
      // A role that was not given has a place in the table, and no token that anyone knows.
      expect(tokenOf(known?.tokens, 0, stageRoles.gather)).not.toEqual(
        tokenOf(session?.tokens, 0, stageRoles.gather),
      );
    }
    // What one server shows when it passes pages on is what the other expects.
    const [first, second] = servers.map(({ native }) => native.images.get(imageId));
    const chain = first?.chains.get(1);
    expect(chain).toMatchObject({ ...servers[1]?.address });
    const table = second?.sessions.get(0xff00);
    expect(table?.roles).toBe(1 << stageRoles.chain);
    for (const attempt of [0, 1, 63]) {
      expect(tokenOf(table?.tokens, attempt, stageRoles.chain)).toEqual(
        Buffer.from(chain?.tokens.subarray(attempt * 32, attempt * 32 + 32) as Uint8Array),
      );
    }
    expect(set.home.announcement).toMatchObject({ name: 'one', rack: 'r1', memoryBytes: 64 * 2 ** 20 });
  });

  it('gives another session to whoever shows the image secret, and none to others', async () => {
    const server = await serve();
    await make([server]);
    const set = owned(
      await openImage([server.address], connection(), {
        image: imageId,
        secret: imageSecret,
        access: 'read',
      }),
    );
    const session = set.servers[0];
    expect(server.native.images.get(imageId)?.sessions.get(session?.session as number)?.roles).toBe(0b110);
    expect(set.info).toMatchObject({ kind: 'migration', phase: 'migrating', ordinal: 0, sealed: false });

    const other = await dial(server);
    const wrong = new Uint8Array(32);
    await expect(other.open(imageId, wrong, 'read')).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    await expect(other.commit(imageId)).rejects.toMatchObject({ code: 'VMD_REFUSED' });
    // The rest of the connection is fine.
    expect((await other.status()).held).toHaveLength(1);
  });

  it('makes an image again that its maker has let go of before anything came, and no other', async () => {
    const server = await serve();
    for (const kind of ['migration', 'park'] as const) {
      const image = Buffer.alloc(16, kind).toString('hex');
      const first = await make([server], { kind, image });
      expect(await first.dissolve()).toEqual([]);
      const again = await make([server], { kind, image, secret: new Uint8Array(32) });
      expect(server.native.images.size).toBe(1);
      // Now somebody else knows it, and asks for it later.
      await owned(
        await openImage([server.address], connection(), {
          ...{ image, secret: new Uint8Array(32), access: 'read' },
        }),
      ).close();
      expect(await again.dissolve()).toEqual([]);
      await expect(make([server], { kind, image })).rejects.toMatchObject({
        code: 'VMD_REFUSED',
        facts: { reason: 'exists' },
      });
    }
    const committed = await make([server]);
    expect(await committed.commit()).toEqual([]);
    expect(await committed.dissolve()).toEqual([]);
    await expect(make([server])).rejects.toMatchObject({ facts: { reason: 'exists' } });
  });

  it('does not answer a client with another secret', async () => {
    const server = await serve();
    const config = {
      ...connection({ secret: Buffer.from('another secret of some length') }),
      ...server.address,
    };
    await expect(StageClient.dial(config)).rejects.toMatchObject({ code: 'AUTH_FAILED' });
  });

  it('lets an uncommitted image go when its source has been away for the lease', async () => {
    const server = await serve();
    const set = await make([server], { leaseMs: 100 });
    await new Promise((resolve) => setTimeout(resolve, 200));
    expect(has(server)).toBe(true); // while a connection has it open
    await set.close();
    await until(() => !has(server));
    const late = await dial(server);
    await expect(late.open(imageId, imageSecret, 'read')).rejects.toMatchObject({
      code: 'VMD_LOST',
      reason: 'lease',
    });
  });

  it('never lets a committed one go by a lease', async () => {
    const servers = [await serve(), await serve()];
    const set = await make(servers, { leaseMs: 100 });
    expect(await set.commit()).toEqual([]);
    await set.close();
    const beside = await make([servers[0] as FakeServer], { image: 'ab'.repeat(16), leaseMs: 100 });
    await beside.close();
    // The other's lease, started later and as long, is over: this one's would be.
    await until(() => !servers[0]?.native.images.has('ab'.repeat(16)));
    expect(servers.map(has)).toEqual([true, true]);
    expect(servers.map(phaseAt)).toEqual(['committed', 'committed']);

    const end = owned(
      await openImage(
        servers.map(({ address }) => address),
        connection(),
        {
          image: imageId,
          secret: imageSecret,
          access: 'control',
        },
      ),
    );
    expect(await end.dissolve()).toEqual([]);
    expect(servers.map(has)).toEqual([false, false]);
  });

  it('opens the image again after a cut, before its lease is over, and repeats what was not answered', async () => {
    const server = await serve();
    const set = await make([server], { leaseMs: 2500 });
    await server.cut();
    expect(await set.seal(['0'.repeat(32)])).toEqual([]);
    expect(server.native.images.get(imageId)?.sealed).toBe(true);
    const before = server.accepted;
    await server.cut();
    // Nobody asks for anything: the client comes back by itself, as the lease runs.
    await until(() => server.accepted > before);
    const beside = await make([server], { image: 'ab'.repeat(16), leaseMs: 2500 });
    await beside.close();
    // The other's lease, started later and as long, is over: that of before the cut would be.
    await until(() => !server.native.images.has('ab'.repeat(16)));
    expect(has(server)).toBe(true);
  });

  it('says lost after a restart, and which server', async () => {
    const servers = [await serve({ name: 'one' }), await serve({ name: 'two' })];
    const set = await make(servers);
    await set.commit();
    await servers[1]?.restart();
    const failures = await set.seal(null);
    expect(failures).toMatchObject([{ ordinal: 1, name: 'two', error: { code: 'VMD_LOST' } }]);
    expect(set.failures).toHaveLength(1);
    expect(await set.dissolve()).toEqual([]);
    expect(servers.map(has)).toEqual([false, false]);

    const none = openImage(
      servers.map(({ address }) => address),
      connection(),
      {
        image: imageId,
        secret: imageSecret,
        access: 'read',
      },
    );
    await expect(none).rejects.toMatchObject({ code: 'VMD_LOST', reason: 'dissolve' });
  });

  it('goes on with the servers that are left', async () => {
    const servers = [await serve(), await serve()];
    const set = await make(servers);
    await set.commit();
    await servers[1]?.close();
    const opened = owned(
      await openImage(
        servers.map(({ address }) => address),
        connection(),
        {
          image: imageId,
          secret: imageSecret,
          access: 'read',
        },
      ),
    );
    expect(opened.failures).toMatchObject([{ ordinal: 1, error: { code: 'CONNECT_FAILED' } }]);
    expect(opened.servers.map(({ session }) => session > 0)).toEqual([true, false]);
    expect(opened.servers[1]?.tokens).toHaveLength(64 * 6 * 32);
    await set.close();
  });

  it('makes an image at all servers or at none', async () => {
    const small = await serve({ maxImages: 1, name: 'small' });
    await make([small], { image: 'cd'.repeat(16) });
    const servers = [await serve(), small, await serve()];
    await expect(make(servers)).rejects.toMatchObject({
      code: 'VMD_CAPACITY',
      server: 'small',
      facts: { fromPeer: true },
    });
    expect(servers.map(has)).toEqual([false, false, false]);
  });

  it('refuses what it has no room for, what is there already, and what makes no sense', async () => {
    const server = await serve({ memoryBytes: 16 * 2 ** 20 });
    const large = [{ name: 'heap', pages: 0, capacityPages: 2 ** 21 }];
    await expect(make([server], { regions: large })).rejects.toMatchObject({ code: 'VMD_CAPACITY' });
    await make([server]);
    await expect(make([server])).rejects.toMatchObject({ code: 'VMD_REFUSED', reason: 'exists' });
    const other = { image: '12'.repeat(16) };
    await expect(make([server], { ...other, pageSize: 2 ** 21 })).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
    });
    const short = [{ name: 'heap', pages: 9, capacityPages: 8 }];
    await expect(make([server], { ...other, regions: short })).rejects.toMatchObject({
      code: 'PROTOCOL_ERROR',
    });

    const client = await dial(server);
    const { secret: _secret, domainKey: _domainKey, ...rest } = newImage(other);
    const elsewhere = [
      { name: 'a', ...server.address },
      { name: 'b', host: '192.0.2.1', port: 7000 },
    ];
    const create = client.create({ ...rest, ordinal: 0, servers: elsewhere, replicas: 2 }, imageSecret);
    await expect(create).rejects.toMatchObject({ code: 'PLAINTEXT_REQUIRED' });
    const misplaced = client.create({ ...rest, ordinal: 2, servers: elsewhere }, imageSecret);
    await expect(misplaced).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    expect(server.native.images.size).toBe(1);
  });

  it('grows a region up to its capacity', async () => {
    const server = await serve();
    const set = await make([server]);
    await set.grow(0, 128);
    await expect(set.grow(0, 129)).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
  });

  it('bounds the sessions of an image by those that nobody has open', async () => {
    const server = await serve();
    await make([server]);
    for (let i = 0; i < 20; i++) {
      const client = await StageClient.dial({ ...connection(), ...server.address });
      await client.open(imageId, imageSecret, 'read');
      await client.close();
    }
    expect(server.native.images.get(imageId)?.sessions.size).toBe(16);
    // The maker's own is still there, and one too many of those that are in use is refused.
    expect(server.native.images.get(imageId)?.sessions.has(1)).toBe(true);
    const clients = await Promise.all(Array.from({ length: 16 }, () => dial(server)));
    const opened = await Promise.allSettled(clients.map((one) => one.open(imageId, imageSecret, 'read')));
    expect(opened.filter(({ status }) => status === 'rejected')).toMatchObject([
      { reason: { code: 'LIMIT_EXCEEDED' } },
    ]);
  });

  it('drops what an operator says, and its owner hears why', async () => {
    const server = await serve();
    const set = await make([server]);
    await set.commit();
    const operator = await dial(server);
    const { held } = await operator.status();
    expect(held).toMatchObject([
      { id: imageId, name: 'guest', kind: 'migration', phase: 'committed', pages: 64 },
    ]);
    expect(await operator.drop(imageId)).toBe(true);
    expect(await operator.drop(imageId)).toBe(false);
    expect(await set.seal(null)).toMatchObject([{ error: { code: 'VMD_LOST', reason: 'drop' } }]);
    // Its name is not used again: a late message would be about another guest.
    await expect(make([server])).rejects.toMatchObject({ code: 'VMD_REFUSED' });
  });

  it('answers everybody while the memory of what was dropped is given back, and its owner when it is', async () => {
    const server = await serve();
    const set = await make([server]);
    await set.commit();
    let givenBack = () => {};
    server.native.dropping = new Promise((resolve) => {
      givenBack = resolve;
    });
    const operator = await dial(server);
    let answered = false;
    const dropped = operator.drop(imageId).finally(() => {
      answered = true;
    });
    const other = await dial(server);
    expect((await other.status()).held).toEqual([]);
    expect(await other.drop('f'.repeat(32))).toBe(false);
    expect(answered).toBe(false);
    givenBack();
    expect(await dropped).toBe(true);
  });

  it('runs no timer when it has ended: not of what its clients had open', async () => {
    const server = await serve({ parkTtlMs: 50 });
    const client = await dial(server, { recoverTimeoutMs: 300 });
    await client.create(
      { ...rest(newImage({ leaseMs: 100 })), ordinal: 0, servers: [{ name: 'a', ...server.address }] },
      imageSecret,
    );
    const thrown: unknown[] = [];
    const onThrown = (error: unknown) => thrown.push(error);
    process.on('uncaughtException', onThrown);
    try {
      await server.close();
      await new Promise((resolve) => setTimeout(resolve, 400));
    } finally {
      process.off('uncaughtException', onThrown);
    }
    expect(thrown).toEqual([]);
    expect(server.native.dropped).toEqual([]);
  });

  it('takes binary parts with states alone, none that is too long', async () => {
    const server = await serve({ maxStateBytes: 1000 });
    const state = { type: 'state', request: 1, image: imageId, guest: parkedGuest };
    expect(await refused(server, state, 1000)).toBe(false);
    expect(await refused(server, state, 1001, 10_000)).toBe(true);
    expect(await refused(server, { type: 'status', request: 1 }, 1, 10_000)).toBe(true);
  });

  it('counts a state from its first byte, and takes none for which there is no room', async () => {
    const server = await serve();
    const others = owned(await makeImage([server.address], connection(), newImage()));
    const { freeBytes } = server.native.stats();
    const large = new Uint8Array(freeBytes / 2);
    await expect(
      others.putState(parkedGuest, new Uint8Array(server.staging.status().memoryBytes)),
    ).rejects.toMatchObject({ code: 'VMD_CAPACITY' });
    // Nor is one kept whose sender may not store it.
    const client = await dial(server);
    await expect(client.putState(imageId, parkedGuest, large)).rejects.toMatchObject({
      code: 'VMD_REFUSED',
    });
    expect(server.native.stats().freeBytes).toBe(freeBytes);
    const held = vi.spyOn(server.native, 'makeState');
    const stored = [others.putState(parkedGuest, large), others.putState(parkedGuest, large)];
    expect((await Promise.allSettled(stored)).map(({ status }) => status).sort()).toEqual([
      'fulfilled',
      'rejected',
    ]);
    expect(held).toHaveBeenCalledTimes(2);
    expect(server.native.stats().freeBytes).toBeLessThan(freeBytes / 2);
    await others.putState(parkedGuest, new Uint8Array(3));
    expect(server.native.stats().freeBytes).toBeGreaterThan(freeBytes - 1000);
    // One that is said again while the server still waits for the rest of the first.
    const over = await slowly(server);
    const again = owned(
      await openImage([over], connection(), { image: imageId, secret: imageSecret, access: 'control' }),
    );
    void again.putState(parkedGuest, large).catch(() => {});
    await until(() => server.native.stats().freeBytes < freeBytes / 2);
    const later = owned(
      await openImage([server.address], connection(), {
        image: imageId,
        secret: imageSecret,
        access: 'control',
      }),
    );
    await later.putState(parkedGuest, large);
    await later.putState(parkedGuest, new Uint8Array(3));
    await again.close();
    await until(() => server.native.stats().freeBytes > freeBytes - 1000);
    // One whose sender goes away before its first byte.
    const state = { type: 'state', request: 2, image: imageId, guest: parkedGuest };
    const peer = await announcing(server, state, large.length);
    await until(() => server.native.stats().freeBytes < freeBytes / 2);
    peer.destroy();
    await until(() => server.native.stats().freeBytes > freeBytes - 1000);
  });

  it('refuses a group that is none before it listens', async () => {
    const listened = vi.fn();
    const runtime = { pageSize: 4096, createStage: listened, listen: listened };
    for (const announce of ['10.0.0.1:7077', '239.255.77.77', '239.255.77.77:0']) {
      const options = { memoryBytes: 64 * 2 ** 20, announce };
      await expect(stageOn(runtime, options)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    }
    expect(listened).not.toHaveBeenCalled();
  });

  it('ends with its clients told', async () => {
    const server = await serve();
    const client = await dial(server, { recoverTimeoutMs: 300 });
    await client.create(
      { ...rest(newImage()), ordinal: 0, servers: [{ name: 'a', ...server.address }] },
      imageSecret,
    );
    await server.close();
    await server.close();
    expect(server.native.closed).toBe(true);
    expect(await client.closed).toMatchObject({ code: 'PEER_LOST' });
    await expect(client.status()).rejects.toMatchObject({ code: 'PEER_LOST' });
  });
});

/** A peer that says that so many bytes come with a message, and sends none of them. */
async function announcing(server: FakeServer, message: object, bytes: number): Promise<Duplex> {
  const session = await dialControl({
    ...{ ...server.address, secret: Buffer.from(secret), plaintext: true, connectTimeoutMs: 10_000 },
  });
  const sealer = new FrameSealer(directionKey(session.sessionKey, 'dialler'));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(bytes);
  session.duplex.resume();
  const frame = sealer.seal(FrameKind.JsonWithBinary, length, Buffer.from(JSON.stringify(message)));
  session.duplex.write(Buffer.concat(frame));
  owned({ close: async () => void session.duplex.destroy() });
  return session.duplex;
}

/** Whether its connection is ended for that within moments; where it has to be, they may be longer. */
async function refused(server: FakeServer, message: object, bytes: number, boundMs = 100): Promise<boolean> {
  const peer = await announcing(server, message, bytes);
  const ended = new Promise<boolean>((resolve) => peer.once('end', () => resolve(true)));
  const kept = new Promise<boolean>((resolve) => setTimeout(() => resolve(false), boundMs));
  const answer = await Promise.race([ended, kept]);
  peer.destroy();
  return answer;
}

/** To a server over a network of 2 MB a second. */
async function slowly(server: FakeServer): Promise<{ host: string; port: number }> {
  const near = owned(await Loopback.open());
  const carry = async (from: Socket, to: Socket) => {
    for await (const bytes of from) {
      to.write(bytes);
      await new Promise((resolve) => setTimeout(resolve, bytes.length / 2000));
    }
    to.end();
  };
  void (async () => {
    for (;;) {
      const socket = await near.accepted();
      const far = connect(server.address);
      for (const [from, to] of [
        [socket, far],
        [far, socket],
      ] as const) {
        from.on('error', () => to.destroy());
        carry(from, to).catch(() => to.destroy());
      }
    }
  })();
  return { host: '127.0.0.1', port: near.port };
}

describe('a request', () => {
  it('that moves an execution state has the time that its bytes need', { timeout: 60_000 }, async () => {
    const server = await serve();
    // Four seconds each way.
    const state = Buffer.alloc(8 * 2 ** 20, 7);
    const link = connection({ requestTimeoutMs: 2000 });
    const set = owned(await makeImage([await slowly(server)], link, newImage({ kind: 'park' })));
    (server.native.images.get(imageId) as { whole: boolean }).whole = true;
    await set.putState(parkedGuest, state);
    const answers: string[] = [];
    const { send } = set.home.commitLink(imageId, {
      onMessage: ({ type }) => answers.push(type),
      onLost() {},
    });
    send({ type: 'prepare', epoch: 0 });
    await until(() => answers.includes('ready'));
    send({ type: 'grant', epoch: 0 });
    await until(() => answers.includes('resumed'));
    await set.close();
    const opened = { image: imageId, secret: imageSecret, access: 'read' } as const;
    const claimed = owned(await openParkedImage(await slowly(server), link, opened));
    expect(Buffer.compare((await claimed.claim()).state, state)).toBe(0);
  });

  it('ends with its client, and with the caller who gives up', async () => {
    const server = await serve();
    const abort = new AbortController();
    const client = await dial(server, { signal: abort.signal });
    await client.create(
      { ...rest(newImage()), ordinal: 0, servers: [{ name: 'a', ...server.address }] },
      imageSecret,
    );
    await server.close();
    // The server is gone: this waits for it to come back.
    const waiting = client.seal(imageId, null);
    await new Promise((resolve) => setTimeout(resolve, 20));
    abort.abort();
    await expect(waiting).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(await client.closed).toBeNull();
    const never = StageClient.dial({ ...connection({ signal: abort.signal }), ...server.address });
    await expect(never).rejects.toMatchObject({ code: 'CANCELLED' });
  });

  it('is bounded in time, and names the server', async () => {
    const loopback = owned(await Loopback.open());
    const silent = (async () => {
      const socket = await loopback.accepted();
      await readPreface(socket);
      await handshakeAsAcceptor(socket, { secret: pairSecret });
    })();
    const client = owned(
      await StageClient.dial({
        host: '127.0.0.1',
        port: loopback.port,
        name: 'the silent one',
        secret: pairSecret,
        requestTimeoutMs: 150,
      }),
    );
    await silent;
    const started = performance.now();
    await expect(client.status()).rejects.toMatchObject({
      code: 'PEER_LOST',
      facts: { server: 'the silent one' },
    });
    await expect(client.firstAnnouncement()).rejects.toMatchObject({ code: 'PEER_LOST' });
    await client.close();
    await expect(client.status()).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(performance.now() - started).toBeLessThan(10_000);
  });
});

describe('a parked guest', () => {
  it('goes to one of two that claim it at once', async () => {
    const servers = [await serve(), await serve()];
    await park(servers);
    expect(servers.map(phaseAt)).toEqual(['parked', 'parked']);
    const claimants = [await claimant(servers), await claimant(servers)];
    const outcomes = await Promise.allSettled(claimants.map((set) => set.claim()));
    const winner = outcomes.findIndex(({ status }) => status === 'fulfilled');
    const won = outcomes[winner] as PromiseFulfilledResult<Awaited<ReturnType<ImageSet['claim']>>>;
    const lost = outcomes[1 - winner] as PromiseRejectedResult;
    expect(won.value).toMatchObject({ epoch: 1, guest: parkedGuest });
    expect(Buffer.from(won.value.state).toString()).toBe('registers');
    expect(lost.reason).toMatchObject({ code: 'VMD_REFUSED', reason: 'claimed' });
    const [owner, other] = [claimants[winner], claimants[1 - winner]] as [ImageSet, ImageSet];
    await owner.grant();
    await owner.grant();
    await owner.othersTold();
    expect(servers.map(phaseAt)).toEqual(['resumed', 'committed']);
    await expect(other.claim()).rejects.toMatchObject({ reason: 'resumed' });
    await expect(other.dissolve()).rejects.toMatchObject({ reason: 'stale' });
    expect(servers.map(has)).toEqual([true, true]);
    expect(await owner.dissolve()).toEqual([]);
    expect(servers.map(has)).toEqual([false, false]);
  });

  it('is let go of nowhere when home refuses, not by a server either that was away before', async () => {
    const servers = [await serve(), await serve()] as const;
    await park([...servers]);
    const proxy = await TcpProxy.start(servers[1].address.port);
    owned(proxy);
    proxy.cut();
    const opened = { image: imageId, secret: imageSecret, access: 'read', required: 'home' } as const;
    const list = [servers[0].address, { host: '127.0.0.1', port: proxy.port }];
    const stranger = owned(await openImage(list, connection(), opened));
    expect(stranger.missing).toEqual([false, true]);
    const owner = await claimant([...servers]);
    await owner.claim();
    await owner.grant();
    proxy.heal();
    await expect(stranger.dissolve()).rejects.toMatchObject({ reason: 'stale' });
    // Whatever it had begun would have been done by now.
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect(servers.map(has)).toEqual([true, true]);
    // Its owner may, there too.
    expect(await owner.dissolve()).toEqual([]);
    expect(servers.map(has)).toEqual([false, false]);
  });

  it('is claimed again when a claimant goes away before its grant, not after', async () => {
    const servers = [await serve({ claimLeaseMs: 150 })];
    await park(servers);
    const first = await claimant(servers);
    const { epoch } = await first.claim({ claimant: 'aa'.repeat(16) });
    expect(epoch).toBe(1);
    const second = await claimant(servers);
    await expect(second.claim()).rejects.toMatchObject({ reason: 'claimed' });
    await first.close();
    await until(() => phaseAt(servers[0] as FakeServer) === 'parked');
    expect((await second.claim()).epoch).toBe(2);
    // The first one's claim is over for good.
    const again = await dial(servers[0] as FakeServer);
    await again.open(imageId, imageSecret, 'control');
    await expect(again.grant(imageId, 'aa'.repeat(16), 1)).rejects.toMatchObject({ reason: 'stale' });
    await second.grant();
    await second.close();
    await expect((await claimant(servers)).claim()).rejects.toMatchObject({ reason: 'resumed' });
    expect(phaseAt(servers[0] as FakeServer)).toBe('resumed');
  });

  it('stays with a claimant whose connection is cut and comes back', async () => {
    const servers = [await serve({ claimLeaseMs: 10_000 })];
    await park(servers);
    const first = await claimant(servers);
    await first.claim();
    await servers[0]?.cut();
    await first.grant();
    expect(phaseAt(servers[0] as FakeServer)).toBe('resumed');
  });

  it('is given back by release, and by rollback when whoever had it is dead', async () => {
    const servers = [await serve()];
    await park(servers);
    const first = await claimant(servers);
    await first.claim();
    await first.release();
    const second = await claimant(servers);
    expect((await second.claim()).epoch).toBe(2);
    await second.grant();
    const third = await claimant(servers);
    expect(third.info?.owner).toBe(2);
    await expect(third.claim()).rejects.toMatchObject({ reason: 'resumed' });
    // A word about another owner than the one that there is.
    await expect(third.claim({ rollback: 1 })).rejects.toMatchObject({ reason: 'resumed' });
    expect((await third.claim({ rollback: true })).epoch).toBe(3);
    await third.grant();
    await expect(second.grant()).rejects.toMatchObject({ reason: 'stale' });
    await expect(second.dissolve()).rejects.toMatchObject({ code: 'VMD_REFUSED' });
    expect(await third.dissolve()).toEqual([]);
  });

  it('goes by its time to live only when nobody has it open', async () => {
    const servers = [await serve({ parkTtlMs: 3000 })];
    await park(servers);
    const set = await claimant(servers);
    await park(servers, 'ab'.repeat(16));
    // The other's time, started later and as long, is over: this one's would be.
    await until(() => !servers[0]?.native.images.has('ab'.repeat(16)));
    expect(has(servers[0] as FakeServer)).toBe(true);
    await set.close();
    await until(() => !has(servers[0] as FakeServer));
    await expect(claimant(servers)).rejects.toMatchObject({ code: 'VMD_LOST', reason: 'ttl' });
  });

  it('is not to be had by a stranger to the image, from another server, or before it is parked', async () => {
    const servers = [await serve(), await serve()];
    const set = await make(servers, { kind: 'park' });
    const early = await claimant(servers);
    await expect(early.claim()).rejects.toMatchObject({ reason: 'uncommitted' });
    expect(await set.commit()).toEqual([]);
    const other = await dial(servers[1] as FakeServer);
    await other.open(imageId, imageSecret, 'read');
    await expect(other.claim(imageId, 'aa'.repeat(16))).rejects.toMatchObject({ reason: 'not-home' });
    const wrong = openParkedImage((servers[1] as FakeServer).address, connection(), {
      image: imageId,
      secret: imageSecret,
      access: 'read',
    });
    await expect(wrong).rejects.toMatchObject({ code: 'VMD_REFUSED', reason: 'not-home' });
  });
});

describe('an image of a guest that moved', () => {
  it('is claimed only by rollback, and only when all of it is at the servers', async () => {
    const server = await serve();
    const set = await make([server]);
    await set.commit();
    const image = server.native.images.get(imageId) as { whole: boolean };
    const other = owned(
      await openImage([server.address], connection(), {
        image: imageId,
        secret: imageSecret,
        access: 'read',
      }),
    );
    expect(other.info?.owner).toBe(0);
    await expect(other.claim()).rejects.toMatchObject({ reason: 'resumed' });
    await expect(other.claim({ rollback: true })).rejects.toMatchObject({ reason: 'incomplete' });
    image.whole = true;
    await expect(other.claim({ rollback: true })).rejects.toMatchObject({ reason: 'incomplete' });
    await set.putState(parkedGuest, new Uint8Array(3));
    image.whole = false;
    await expect(other.claim({ rollback: true })).rejects.toMatchObject({ reason: 'incomplete' });
    image.whole = true;
    expect((await other.claim({ rollback: true })).epoch).toBe(1);
  });
});

function rest<T extends { secret: Uint8Array; domainKey: Uint8Array | null }>({
  secret: _secret,
  domainKey: _domainKey,
  ...others
}: T): Omit<T, 'secret' | 'domainKey'> {
  return others;
}

function tokenOf(table: Uint8Array | undefined, attempt: number, role: number): Buffer {
  const at = (attempt * 6 + role) * 32;
  return Buffer.from((table as Uint8Array).subarray(at, at + 32));
}
