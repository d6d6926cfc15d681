/** Who gets past the handshake, and what everyone else is told; over real loopback sockets. */
import { once } from 'node:events';
import { Duplex, PassThrough } from 'node:stream';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { dial } from '../../src/control/dial.js';
import { readExactly } from '../../src/control/exact-read.js';
import { HandshakeGate } from '../../src/control/gate.js';
import {
  ACCEPTOR_HELLO_BYTES,
  ACCEPTOR_PROOF_BYTES,
  DIALLER_HELLO_BYTES,
  directionKey,
  handshakeAsAcceptor,
  handshakeAsDialler,
} from '../../src/control/handshake.js';
import { Loopback, never, randomBytesFrom, readPreface, secret } from './control-pair.js';

const other = Buffer.from('a secret that only one side was given');
let loopback: Loopback;

beforeEach(async () => {
  loopback = await Loopback.open();
});
afterEach(() => loopback.close());

describe('handshake', () => {
  it('gives both sides the same fresh key', async () => {
    const [near, far] = await loopback.sessions();
    const [again] = await loopback.sessions();
    expect(near.role).toBe('dialler');
    expect(far.role).toBe('acceptor');
    expect(near.version).toBe(1);
    expect(near.sessionKey).toHaveLength(32);
    expect(Buffer.from(near.sessionKey)).toEqual(Buffer.from(far.sessionKey));
    expect(Buffer.from(near.sessionKey)).not.toEqual(Buffer.from(again.sessionKey));
    expect(directionKey(near.sessionKey, 'dialler')).not.toEqual(directionKey(near.sessionKey, 'acceptor'));
  });

  it('refuses another secret, and tells both sides so', async () => {
    const [near, far] = await loopback.pair();
    const [dialled, accepted] = await Promise.allSettled([
      handshakeAsDialler(near, { secret: other }),
      handshakeAsAcceptor(far, { secret }),
    ]);
    expect(dialled).toMatchObject({
      reason: { code: 'AUTH_FAILED', message: expect.stringMatching(/refused/) },
    });
    expect(accepted).toMatchObject({ reason: { code: 'AUTH_FAILED' } });
    expect(near.destroyed).toBe(true);
    expect(far.destroyed).toBe(true);
  });

  it('refuses an acceptor that only reflects', async () => {
    // The attacker knows no secret and sends everything back: hello as hello, proof as proof.
    const [near, far] = await loopback.pair();
    const attack = (async () => {
      const hello = await readExactly(far, DIALLER_HELLO_BYTES, never);
      const answer = Buffer.alloc(ACCEPTOR_HELLO_BYTES);
      answer.writeUInt16LE(1, 0);
      answer.writeUInt16LE(1, 2);
      hello.copy(answer, 8, 4); // the dialler's own nonce
      far.write(answer);
      const proof = await readExactly(far, 32, never);
      far.write(Buffer.concat([Buffer.from([1, 0]), proof]));
    })();
    await expect(handshakeAsDialler(near, { secret })).rejects.toMatchObject({
      code: 'AUTH_FAILED',
      message: expect.stringMatching(/could not prove/),
    });
    await attack;
  });

  it('refuses a dialler that replays another connection', async () => {
    const [near, far] = await loopback.pair();
    const heard: Buffer[] = [];
    const write = near.write.bind(near);
    near.write = ((chunk: Buffer, ...rest: []) => {
      heard.push(Buffer.from(chunk));
      return write(chunk, ...rest);
    }) as typeof near.write;
    await Promise.all([handshakeAsDialler(near, { secret }), handshakeAsAcceptor(far, { secret })]);
    expect(heard.map((chunk) => chunk.length)).toEqual([DIALLER_HELLO_BYTES, 32]);

    const [replaying, victim] = await loopback.pair();
    for (const chunk of heard) replaying.write(chunk);
    await expect(handshakeAsAcceptor(victim, { secret })).rejects.toMatchObject({ code: 'AUTH_FAILED' });
  });

  it('keeps its proof from a stranger', async () => {
    const [near, far] = await loopback.pair();
    const refused = expect(handshakeAsAcceptor(far, { secret })).rejects.toMatchObject({
      code: 'AUTH_FAILED',
    });
    near.write(Buffer.concat([Buffer.from([1, 0, 1, 0]), Buffer.alloc(32, 7), Buffer.alloc(32, 9)]));
    await readExactly(near, ACCEPTOR_HELLO_BYTES, never);
    const reply = await readExactly(near, ACCEPTOR_PROOF_BYTES, never);
    expect(reply.readUInt16LE(0)).toBe(3);
    expect(reply.subarray(2)).toEqual(Buffer.alloc(32));
    await refused;
  });

  it('names both ranges when no version fits', async () => {
    const [near, far] = await loopback.pair();
    const [dialled, accepted] = await Promise.allSettled([
      handshakeAsDialler(near, { secret, versions: { lowest: 3, highest: 4 } }),
      handshakeAsAcceptor(far, { secret, versions: { lowest: 1, highest: 2 } }),
    ]);
    expect(dialled).toMatchObject({
      reason: {
        code: 'VERSION_MISMATCH',
        facts: { ours: { lowest: 3, highest: 4 }, theirs: { lowest: 1, highest: 2 } },
      },
    });
    expect(accepted).toMatchObject({ reason: { code: 'VERSION_MISMATCH' } });
  });

  it('takes the highest version that both speak, and notices a forced older one', async () => {
    const [near, far] = await loopback.pair();
    const [dialled] = await Promise.all([
      handshakeAsDialler(near, { secret, versions: { lowest: 1, highest: 3 } }),
      handshakeAsAcceptor(far, { secret, versions: { lowest: 2, highest: 9 } }),
    ]);
    expect(dialled.version).toBe(3);

    // Someone on the way lowers what the dialler offers.
    const [client, toClient] = await loopback.pair();
    const [toServer, server] = await loopback.pair();
    const results = Promise.allSettled([
      handshakeAsDialler(client, { secret, versions: { lowest: 1, highest: 3 } }),
      handshakeAsAcceptor(server, { secret, versions: { lowest: 1, highest: 3 } }),
    ]);
    const hello = Buffer.from(await readExactly(toClient, DIALLER_HELLO_BYTES, never));
    hello.writeUInt16LE(1, 2);
    toServer.write(hello);
    toClient.pipe(toServer);
    toServer.pipe(toClient);
    expect((await results).map((result) => (result as PromiseRejectedResult).reason.code)).toEqual([
      'AUTH_FAILED',
      'AUTH_FAILED',
    ]);
  });

  it('gives one deadline to silent peers and to those that trickle', { timeout: 30_000 }, async () => {
    const [near, far] = await loopback.pair();
    const trickle = setInterval(() => near.write(Buffer.from([1])), 20);
    const started = performance.now();
    await expect(handshakeAsAcceptor(far, { secret, timeoutMs: 300 })).rejects.toMatchObject({
      code: 'PEER_LOST',
      message: expect.stringMatching(/300 ms/),
    });
    clearInterval(trickle);
    expect(performance.now() - started).toBeLessThan(10_000);
    expect(far.destroyed).toBe(true);

    const [silent, dialling] = await loopback.pair();
    await expect(handshakeAsDialler(dialling, { secret, timeoutMs: 50 })).rejects.toMatchObject({
      code: 'PEER_LOST',
    });
    silent.destroy();
  });

  it('says that the peer went away in the middle', async () => {
    const [near, far] = await loopback.pair();
    near.end(Buffer.alloc(10));
    await expect(handshakeAsAcceptor(far, { secret })).rejects.toMatchObject({ code: 'PEER_LOST' });
  });

  it('ends by the signal', async () => {
    const [, far] = await loopback.pair();
    const abort = new AbortController();
    const accepting = handshakeAsAcceptor(far, { secret, signal: abort.signal });
    abort.abort(new Error('enough'));
    await expect(accepting).rejects.toThrow('enough');
    expect(far.destroyed).toBe(true);
  });

  it('survives garbage of every length', async () => {
    const random = randomBytesFrom(1);
    for (let round = 0; round < 60; round++) {
      const [near, far] = await loopback.pair();
      const acceptor = round % 2 === 0;
      const run = acceptor
        ? handshakeAsAcceptor(far, { secret, timeoutMs: 2000 })
        : handshakeAsDialler(far, { secret, timeoutMs: 2000 });
      near.end(random(round * 7));
      await expect(run).rejects.toMatchObject({
        code: expect.stringMatching(/^(PEER_LOST|PROTOCOL_ERROR|AUTH_FAILED|VERSION_MISMATCH)$/),
      });
      near.destroy();
    }
  });
});

describe('gate', () => {
  it('lets the one through that speaks, whatever a thousand silent peers do', {
    timeout: 30_000,
  }, async () => {
    const gate = new HandshakeGate(64);
    let most = 0;
    const dropped: Promise<unknown>[] = [];
    for (let i = 0; i < 1000; i++) {
      const [, far] = await loopback.pair();
      dropped.push(gate.accept(far, { secret, timeoutMs: 20_000 }).catch((error: unknown) => error));
      most = Math.max(most, gate.pending);
    }
    expect(most).toBe(64);
    const [near, far] = await loopback.pair();
    const [dialled] = await Promise.all([handshakeAsDialler(near, { secret }), gate.accept(far, { secret })]);
    expect(dialled.role).toBe('dialler');
    gate.close();
    const codes = (await Promise.all(dropped)).map((error) => (error as { code: string }).code);
    expect(codes.filter((code) => code === 'LIMIT_EXCEEDED')).toHaveLength(1001 - 64);
    expect(codes.filter((code) => code === 'CANCELLED')).toHaveLength(63);
    expect(gate.pending).toBe(0);
  });

  it('forgets a connection whatever becomes of it', async () => {
    const gate = new HandshakeGate();
    const [near, far] = await loopback.pair();
    await Promise.all([handshakeAsDialler(near, { secret }), gate.accept(far, { secret })]);
    const [gone, left] = await loopback.pair();
    const refused = gate.accept(left, { secret });
    expect(gate.pending).toBe(1);
    gone.destroy();
    await expect(refused).rejects.toMatchObject({ code: 'PEER_LOST' });
    expect(gate.pending).toBe(0);
  });

  it('bounds a wrap like its own handshake', async () => {
    const gate = new HandshakeGate();
    const [, far] = await loopback.pair();
    const stuck = gate.accept(far, { secret, timeoutMs: 50, wrap: () => new Promise(() => {}) });
    await expect(stuck).rejects.toMatchObject({ code: 'PEER_LOST' });
    expect(far.destroyed).toBe(true);
    expect(gate.pending).toBe(0);
  });
});

describe('dial', () => {
  const options = () => ({ host: '127.0.0.1', port: loopback.port, secret, connectTimeoutMs: 10_000 });

  it('opens with the preface and authenticates', async () => {
    const accepting = loopback.accepted().then(async (socket) => {
      await readPreface(socket);
      return handshakeAsAcceptor(socket, { secret });
    });
    const session = await dial(options());
    expect(session.remoteAddress).toBe('127.0.0.1');
    expect(Buffer.from(session.sessionKey)).toEqual(Buffer.from((await accepting).sessionKey));
  });

  it('speaks through the wrap, after the raw preface', async () => {
    // A toy cipher stands for TLS: what is on the wire must not be what the ends say.
    const scramble = async (raw: Duplex): Promise<Duplex> => {
      const flip = () =>
        new PassThrough({
          transform: (chunk: Buffer, _encoding, done) =>
            done(
              null,
              chunk.map((byte) => byte ^ 0x5a),
            ),
        });
      const out = flip();
      out.pipe(raw);
      return Duplex.from({ readable: raw.pipe(flip()), writable: out });
    };
    const seen: Buffer[] = [];
    const accepting = loopback.accepted().then(async (socket) => {
      await readPreface(socket);
      socket.on('data', (chunk: Buffer) => seen.push(chunk));
      return new HandshakeGate().accept(socket, { secret, wrap: scramble });
    });
    const session = await dial({ ...options(), wrap: scramble });
    await accepting;
    expect(session.version).toBe(1);
    expect(Buffer.concat(seen).subarray(0, 4)).toEqual(Buffer.from([1 ^ 0x5a, 0x5a, 1 ^ 0x5a, 0x5a]));
  });

  it('refuses plain text to other machines before it connects', async () => {
    await expect(dial({ ...options(), host: '192.0.2.1' })).rejects.toMatchObject({
      code: 'PLAINTEXT_REQUIRED',
    });
    await expect(dial({ ...options(), host: 'example.invalid' })).rejects.toMatchObject({
      code: 'PLAINTEXT_REQUIRED',
    });
  });

  it('says when nobody listens, when nobody answers, and when the caller has had enough', async () => {
    const closed = await Loopback.open();
    const { port } = closed;
    await closed.close();
    await expect(dial({ ...options(), port })).rejects.toMatchObject({
      code: 'CONNECT_FAILED',
      facts: { port },
    });

    const silent = dial({ ...options(), connectTimeoutMs: 50 });
    await expect(silent).rejects.toMatchObject({
      code: 'CONNECT_FAILED',
      message: expect.stringContaining('handshake within 50 ms'),
    });
    const stuck = dial({ ...options(), connectTimeoutMs: 50, wrap: () => new Promise(() => {}) });
    await expect(stuck).rejects.toMatchObject({ code: 'CONNECT_FAILED' });

    const abort = new AbortController();
    const dialling = dial({ ...options(), signal: abort.signal });
    abort.abort(new Error('enough'));
    await expect(dialling).rejects.toThrow('enough');
    await expect(dial({ ...options(), signal: abort.signal })).rejects.toThrow('enough');
  });

  it('closes its socket when the other side knows another secret', async () => {
    const accepting = loopback.accepted().then(async (socket) => {
      await readPreface(socket);
      const closed = once(socket, 'close');
      await handshakeAsAcceptor(socket, { secret: other }).catch(() => {});
      await closed;
    });
    await expect(dial(options())).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    await accepting;
  });
});
