/** The control channel over real loopback sockets: order, bounds, goodbyes, and peers that break every rule. */
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import type { Duplex } from 'node:stream';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ControlChannel } from '../../src/control/channel.js';
import { FrameKind, FrameSealer } from '../../src/control/frame.js';
import { directionKey } from '../../src/control/handshake.js';
import { anyMessage, type AnyMessage, Loopback, randomBytesFrom } from './control-pair.js';

let loopback: Loopback;

beforeEach(async () => {
  loopback = await Loopback.open();
});
afterEach(() => loopback.close());

/** An authenticated peer that then writes whatever the test wants; the channel is the acceptor. */
async function rawPeer(options = {}) {
  const [near, far] = await loopback.sessions();
  const sealer = new FrameSealer(directionKey(near.sessionKey, 'dialler'));
  const seal = (kind: FrameKind, ...payload: (string | Uint8Array)[]) =>
    Buffer.concat(
      sealer.seal(kind, ...payload.map((part) => (typeof part === 'string' ? Buffer.from(part) : part))),
    );
  const channel = new ControlChannel<AnyMessage, AnyMessage>(far, { incoming: anyMessage, ...options });
  return { socket: near.duplex, seal, channel, sessionKey: near.sessionKey };
}

const u32 = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
};

describe('messages', () => {
  it('arrive in order, both ways at once, with their binary parts', async () => {
    const [near, far] = await loopback.channels();
    const random = randomBytesFrom(7);
    const sizes = [0, 1, 65535, 65536, 65537, 1_000_000];
    for (const [from, to] of [
      [near, far],
      [far, near],
    ] as const) {
      void to;
      for (let i = 0; i < 40; i++) {
        const size = sizes[i % 8];
        const binary = size === undefined ? null : random(size);
        void from.send(
          { type: 'n', value: { i, sha: binary && createHash('sha256').update(binary).digest('hex') } },
          binary,
        );
      }
    }
    for (const channel of [near, far]) {
      for (let i = 0; i < 40; i++) {
        const received = await channel.receive();
        const { i: at, sha } = (received?.message.value ?? {}) as { i: number; sha: string | null };
        expect(at).toBe(i);
        expect(received?.binary && createHash('sha256').update(received.binary).digest('hex')).toBe(sha);
        expect(received?.binary?.length).toBe(sizes[i % 8]);
      }
    }
    await Promise.all([near.close(), far.close()]);
  });

  it('carry 64 MiB of state', { timeout: 30_000 }, async () => {
    const [near, far] = await loopback.channels();
    const state = Buffer.alloc(64 * 2 ** 20, 'execution state ');
    const [received] = await Promise.all([far.receive(), near.send({ type: 'state' }, state)]);
    expect(Buffer.compare(received?.binary ?? Buffer.alloc(0), state)).toBe(0);
  });

  it('that came right behind the handshake are not missed', async () => {
    const [near, far] = await loopback.sessions();
    const early = new ControlChannel<AnyMessage, AnyMessage>(near, { incoming: anyMessage });
    await early.send({ type: 'early' });
    await early.send({ type: 'bird' });
    await once(far.duplex, 'readable'); // they are there before anyone asks
    const late = new ControlChannel<AnyMessage, AnyMessage>(far, { incoming: anyMessage });
    expect((await late.receive())?.message.type).toBe('early');
    expect((await late.receive())?.message.type).toBe('bird');
  });

  it('that are too large are refused here, and the channel lives on', async () => {
    const [near, far] = await loopback.channels({ maxBinaryBytes: 1000 });
    await expect(near.send({ type: 'x', value: 'y'.repeat(256 * 1024) })).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
    });
    await expect(near.send({ type: 'x' }, new Uint8Array(1001))).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
      facts: { limit: 1000 },
    });
    await near.send({ type: 'x' }, new Uint8Array(1000));
    expect((await far.receive())?.binary).toHaveLength(1000);
  });

  it('wait in bounded queues when nobody receives', { timeout: 20_000 }, async () => {
    const fast = { pingIntervalMs: 20, peerTimeoutMs: 200 };
    const [near, far] = await loopback.channels(fast);
    const value = 'x'.repeat(200_000);
    const outcomes: Promise<string>[] = [];
    let refused = 0;
    for (let i = 0; i < 600; i++) {
      const outcome = near.send({ type: 'n', value }).then(
        () => 'sent',
        (error) => {
          refused++;
          return error.code as string;
        },
      );
      outcomes.push(outcome);
    }
    // Nobody receives for several peer timeouts: neither side may take the other for dead.
    await new Promise((resolve) => setTimeout(resolve, 1000));
    expect(near.reason).toBeNull();
    expect(far.reason).toBeNull();
    expect(refused).toBeGreaterThan(100);
    const accepted = 600 - refused;
    for (let received = 0; received < accepted; received++) expect(await far.receive()).not.toBeNull();
    const codes = await Promise.all(outcomes);
    expect(codes.filter((code) => code === 'sent')).toHaveLength(accepted);
    expect(codes.filter((code) => code === 'LIMIT_EXCEEDED')).toHaveLength(refused);
  });

  it('are not even looked at while 64 of them wait', async () => {
    let looked = 0;
    const counting = anyMessage.refine(() => ++looked > 0);
    const { socket, seal, channel } = await rawPeer({ incoming: counting });
    const turns = async (count: number) => {
      for (let turn = 0; turn < count; turn++) await new Promise((resolve) => setImmediate(resolve));
    };
    socket.write(Buffer.concat(Array.from({ length: 200 }, () => seal(FrameKind.Json, '{"type":"n"}'))));
    while (looked < 64) await turns(1);
    await turns(50);
    expect(looked).toBe(64);
    for (let taken = 1; taken <= 136; taken++) {
      await channel.receive();
      await turns(2);
      expect(looked).toBe(64 + taken);
    }
    for (let taken = 137; taken <= 200; taken++) expect(await channel.receive()).not.toBeNull();
  });
});

describe('the end', () => {
  it('is clean after a goodbye: what was sent before still arrives', async () => {
    const [near, far] = await loopback.channels();
    void near.send({ type: 'last' }, Buffer.alloc(300_000, 1));
    const closing = near.close();
    expect((await far.receive())?.binary).toHaveLength(300_000);
    expect(await far.receive()).toBeNull();
    expect(await far.closed).toEqual({ error: null });
    await closing;
    await near.close();
    await far.close();
    await expect(near.send({ type: 'x' })).rejects.toMatchObject({ code: 'CHANNEL_LOST' });
  });

  it('is clean when both say goodbye at once', async () => {
    const [near, far] = await loopback.channels();
    await Promise.all([near.close(), far.close()]);
    expect([near.reason, far.reason]).toEqual([{ error: null }, { error: null }]);
  });

  it('iterates until the goodbye', async () => {
    const [near, far] = await loopback.channels();
    for (const type of ['a', 'b', 'c']) void near.send({ type });
    void near.close();
    const types: string[] = [];
    for await (const { message } of far) types.push(message.type);
    expect(types).toEqual(['a', 'b', 'c']);
  });

  it('without a goodbye is a lost peer, for everyone who waits', async () => {
    const [near, far] = await loopback.channels();
    const waiting = far.receive();
    near.destroy();
    await expect(waiting).rejects.toMatchObject({ code: 'PEER_LOST' });
    await expect(far.receive()).rejects.toMatchObject({ code: 'PEER_LOST' });
    await expect(far.send({ type: 'x' })).rejects.toMatchObject({ code: 'PEER_LOST' });
    expect(await far.closed).toMatchObject({ error: { code: 'PEER_LOST' } });
  });

  it('in the middle of a frame or of a binary part is a lost peer, and nothing half is delivered', async () => {
    for (const cut of ['frame', 'binary'] as const) {
      const { socket, seal, channel } = await rawPeer();
      if (cut === 'frame') socket.end(seal(FrameKind.Json, '{"type":"x"}').subarray(0, 12));
      else
        socket.end(
          Buffer.concat([
            seal(FrameKind.JsonWithBinary, u32(10), '{"type":"x"}'),
            seal(FrameKind.Chunk, '12345'),
          ]),
        );
      await expect(channel.receive()).rejects.toMatchObject({ code: 'PEER_LOST' });
    }
  });

  it('comes within its bound although the peer takes nothing', { timeout: 30_000 }, async () => {
    // Nothing else ends it in that time.
    const { channel, socket } = await rawPeer({ peerTimeoutMs: 60_000, stallTimeoutMs: 60_000 });
    socket.pause();
    void channel.send({ type: 'x' }, Buffer.alloc(32 * 2 ** 20));
    const started = performance.now();
    await channel.close();
    expect(performance.now() - started).toBeLessThan(20_000);
  });
});

describe('a binary part in pieces', () => {
  /** Keeps what it was given; `kept` is null once it was told that nobody wants it. */
  class Sink {
    kept: Buffer[] | null = [];
    write(chunk: Uint8Array): void {
      this.kept?.push(Buffer.from(chunk));
    }
    discard(): void {
      this.kept = null;
    }
  }
  const sunk = () => {
    const sinks: Sink[] = [];
    const sink = ({ type }: AnyMessage): Sink | null => {
      if (type === 'kept') return null;
      sinks.push(new Sink());
      return sinks.at(-1) ?? null;
    };
    return { sinks, sink };
  };
  /** A part of so many bytes, each its own number, and what was asked of it. */
  const source = (length: number) => {
    const asked = { reads: 0, largest: 0, done: 0 };
    const read = (at: number, bytes: number) => {
      asked.reads++;
      asked.largest = Math.max(asked.largest, bytes);
      return Uint8Array.from({ length: bytes }, (_, i) => at + i);
    };
    return { asked, length, read, done: () => void asked.done++ };
  };

  it('is read when the connection takes it, and goes where its message belongs', async () => {
    const { sinks, sink } = sunk();
    const [near, far] = await loopback.channels({}, { sink });
    for (const length of [0, 1, 65_536, 1_000_003]) {
      const part = source(length);
      const [received] = await Promise.all([far.receive(), near.send({ type: 'x' }, part)]);
      expect(received?.binary).toBe(null);
      expect(received?.sink).toBe(sinks.at(-1));
      const came = Buffer.concat(sinks.at(-1)?.kept ?? []);
      expect(came.length).toBe(length);
      expect(came.every((byte, at) => byte === (at & 255))).toBe(true);
      expect(part.asked).toMatchObject({ done: 1, reads: Math.ceil(length / 65_536) });
      expect(part.asked.largest).toBeLessThanOrEqual(65_536);
      const [kept] = await Promise.all([far.receive(), near.send({ type: 'kept' }, part)]);
      expect(kept).toMatchObject({ sink: null, binary: { length } });
    }
  });

  it('is let go of once, sent or not', async () => {
    const [near] = await loopback.channels({ maxBinaryBytes: 1000 });
    const [large, left, late] = [source(1001), source(1000), source(1)];
    await expect(near.send({ type: 'x' }, large)).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    near.destroy();
    await expect(near.send({ type: 'x' }, late)).rejects.toMatchObject({ code: 'CHANNEL_LOST' });
    const [stuck] = await loopback.sessions();
    const channel = new ControlChannel<AnyMessage, AnyMessage>(stuck, { incoming: anyMessage });
    // Nobody reads at the other end.
    for (let at = 0; at < 200; at++) void channel.send({ type: 'x' }, new Uint8Array(2 ** 20));
    void channel.send({ type: 'x' }, left);
    channel.destroy();
    await channel.closed;
    expect([large, left, late].map(({ asked }) => asked.done)).toEqual([1, 1, 1]);
    expect(left.asked.reads).toBe(0);
  });

  it('of which nothing more comes ends the connection, whatever else is said', async () => {
    const { sinks, sink } = sunk();
    const peer = await rawPeer({ sink, pingIntervalMs: 20, chunkTimeoutMs: 300 });
    peer.socket.resume();
    peer.socket.write(peer.seal(FrameKind.JsonWithBinary, u32(4), '{"type":"x"}'));
    const began = performance.now();
    for (let at = 0; at < 3; at++) {
      await new Promise((resolve) => setTimeout(resolve, 200));
      peer.socket.write(peer.seal(FrameKind.Chunk, 'a'));
    }
    const pings = setInterval(() => peer.socket.write(peer.seal(FrameKind.Ping)), 20);
    const { error } = await peer.channel.closed;
    clearInterval(pings);
    expect(error).toMatchObject({ code: 'PEER_LOST', message: expect.stringMatching(/binary part/) });
    expect(performance.now() - began).toBeGreaterThan(800);
    expect(sinks[0]?.kept).toBe(null);
  });

  it('counts as received until it is taken, wherever it went', async () => {
    const { sinks, sink } = sunk();
    const [near, far] = await loopback.channels({ maxBinaryBytes: 1000 }, { maxBinaryBytes: 1000, sink });
    for (let at = 0; at < 5; at++) void near.send({ type: 'x' }, source(600));
    await expect.poll(() => sinks.length).toBe(2);
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(sinks.length).toBe(2);
    for (let at = 0; at < 5; at++) expect((await far.receive())?.sink).toBe(sinks[at]);
  });

  it('that nobody will take is discarded: half of one, one that waits, one behind our own goodbye', async () => {
    const chunk = (peer: Awaited<ReturnType<typeof rawPeer>>, bytes: number) =>
      peer.seal(FrameKind.Chunk, Buffer.alloc(bytes));
    for (const how of ['half', 'waits', 'goodbye'] as const) {
      const { sinks, sink } = sunk();
      const peer = await rawPeer({ sink });
      if (how !== 'goodbye') peer.socket.resume();
      const iterated = peer.channel[Symbol.asyncIterator]();
      const first = iterated.next();
      peer.socket.write(peer.seal(FrameKind.Json, '{"type":"first"}'));
      await first;
      if (how === 'goodbye') {
        // Its goodbye waits behind what the peer does not take.
        void peer.channel.send({ type: 'x' }, new Uint8Array(32 * 2 ** 20));
        void peer.channel.close();
      }
      peer.socket.write(peer.seal(FrameKind.JsonWithBinary, u32(4), '{"type":"x"}'));
      peer.socket.write(chunk(peer, how === 'half' ? 3 : 4));
      await expect.poll(() => sinks.length).toBe(1);
      if (how === 'half') {
        await expect.poll(() => sinks[0]?.kept?.length).toBe(1);
        peer.channel.destroy();
      }
      if (how === 'waits') {
        await expect.poll(() => sinks[0]?.kept?.length).toBe(1);
        await iterated.return?.();
      }
      await expect.poll(() => sinks[0]?.kept).toBe(null);
      peer.channel.destroy();
    }
  });
});

describe('a peer that falls silent', () => {
  const fast = { pingIntervalMs: 20, peerTimeoutMs: 300 };

  it('is declared lost, with no FIN to tell', { timeout: 30_000 }, async () => {
    const started = performance.now();
    // It keeps the connection open and says nothing more: a stopped process, or a cut cable.
    const { channel } = await rawPeer(fast);
    await expect(channel.receive()).rejects.toMatchObject({
      code: 'PEER_LOST',
      message: expect.stringMatching(/said nothing/),
    });
    expect(performance.now() - started).toBeGreaterThan(290);
    expect(performance.now() - started).toBeLessThan(10_000);
  });

  it('is not one that merely has nothing to say', async () => {
    const [near, far] = await loopback.channels(fast);
    await new Promise((resolve) => setTimeout(resolve, 900)); // three timeouts of nothing but pings
    await near.send({ type: 'still here' });
    expect((await far.receive())?.message.type).toBe('still here');
  });

  it('is not ourselves: a thread that did not run blames nobody', async () => {
    const [near, far] = await loopback.channels(fast);
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 1000); // both ends stand still, as in a page fault
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect([near.reason, far.reason]).toEqual([null, null]);
  });

  it('is declared lost when it is alive and takes nothing', { timeout: 10_000 }, async () => {
    const { channel, socket, seal } = await rawPeer({ ...fast, stallTimeoutMs: 400 });
    const alive = setInterval(() => socket.write(seal(FrameKind.Ping)), 20);
    socket.pause();
    await expect(channel.send({ type: 'x' }, Buffer.alloc(32 * 2 ** 20))).rejects.toMatchObject({
      code: 'PEER_LOST',
      message: expect.stringMatching(/taken nothing/),
    });
    clearInterval(alive);
  });
});

describe('a peer that breaks the rules', () => {
  const violations: Record<string, (peer: Awaited<ReturnType<typeof rawPeer>>) => Buffer | Buffer[]> = {
    'sends a message that the schema does not allow': ({ seal }) =>
      seal(FrameKind.Json, '{"type":"x","more":1}'),
    'sends a message of another shape': ({ seal }) => seal(FrameKind.Json, '[null]'),
    'sends text that is not JSON': ({ seal }) => seal(FrameKind.Json, '{"type":'),
    'sends deeply nested JSON': ({ seal }) => seal(FrameKind.Json, '['.repeat(200_000)),
    'sends bytes that are not UTF-8': ({ seal }) => seal(FrameKind.Json, Buffer.from([0xff, 0xfe, 0xfd])),
    'sends a chunk that it did not announce': ({ seal }) => seal(FrameKind.Chunk, 'x'),
    'sends more than it announced': ({ seal }) => [
      seal(FrameKind.JsonWithBinary, u32(3), '{"type":"x"}'),
      seal(FrameKind.Chunk, 'four'),
    ],
    'sends a message inside a binary part': ({ seal }) => [
      seal(FrameKind.JsonWithBinary, u32(3), '{"type":"x"}'),
      seal(FrameKind.Json, '{"type":"x"}'),
    ],
    'says goodbye inside a binary part': ({ seal }) => [
      seal(FrameKind.JsonWithBinary, u32(3), '{"type":"x"}'),
      seal(FrameKind.Bye),
    ],
    'says goodbye for a reason that is not one': ({ seal }) => seal(FrameKind.Bye, '[]'),
    'sends a frame of unknown kind': () => Buffer.from([0, 0, 0, 0, 77]),
    'sends a frame without end': () => Buffer.from([0xff, 0xff, 0xff, 0xff, FrameKind.Json]),
    'sends a ping with a payload': () => Buffer.from([1, 0, 0, 0, FrameKind.Ping]),
    'repeats a frame': ({ seal }) => {
      const ping = seal(FrameKind.Ping);
      return [ping, ping];
    },
    'leaves a frame out': ({ seal }) => {
      seal(FrameKind.Ping);
      return seal(FrameKind.Ping);
    },
    'swaps two frames': ({ seal }) => {
      const [first, second] = [seal(FrameKind.Json, '{"type":"a"}'), seal(FrameKind.Json, '{"type":"b"}')];
      return [second, first];
    },
    'reflects our own frames': ({ sessionKey }) =>
      Buffer.concat(new FrameSealer(directionKey(sessionKey, 'acceptor')).seal(FrameKind.Ping)),
    'knows another key': () => Buffer.concat(new FrameSealer(Buffer.alloc(32)).seal(FrameKind.Ping)),
  };

  for (const [name, violate] of Object.entries(violations)) {
    it(`${name}: PROTOCOL_ERROR, nothing delivered`, async () => {
      const peer = await rawPeer();
      peer.socket.resume();
      peer.socket.write(Buffer.concat([violate(peer)].flat()));
      await expect(peer.channel.receive()).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
      await peer.channel.close();
      expect(peer.channel.reason?.error?.code).toBe('PROTOCOL_ERROR');
    });
  }

  it('announces too much: LIMIT_EXCEEDED before a byte is allocated', async () => {
    const { socket, seal, channel } = await rawPeer({ maxBinaryBytes: 1000 });
    const before = process.memoryUsage().arrayBuffers;
    socket.write(seal(FrameKind.JsonWithBinary, u32(0xffffffff), '{"type":"x"}'));
    await expect(channel.receive()).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
      facts: { bytes: 0xffffffff },
    });
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(64 * 2 ** 20);
  });

  it('sends a binary part where there is none, or more than that message may have', async () => {
    const admits = ({ type }: AnyMessage) => (type === 'x' ? 3 : null);
    const first = await rawPeer({ admits });
    first.socket.write(first.seal(FrameKind.JsonWithBinary, u32(3), '{"type":"x"}'));
    first.socket.write(first.seal(FrameKind.Chunk, 'abc'));
    expect(await first.channel.receive()).toMatchObject({
      message: { type: 'x' },
      binary: Buffer.from('abc'),
    });
    first.socket.write(first.seal(FrameKind.JsonWithBinary, u32(4), '{"type":"x"}'));
    await expect(first.channel.receive()).rejects.toMatchObject({
      code: 'LIMIT_EXCEEDED',
      facts: { bytes: 4, limit: 3 },
    });
    for (const bytes of [0, 1]) {
      const other = await rawPeer({ admits });
      other.socket.write(other.seal(FrameKind.JsonWithBinary, u32(bytes), '{"type":"y"}'));
      await expect(other.channel.receive()).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    }
  });

  it('changes any bit of a frame', async () => {
    const length = (await rawPeer()).seal(FrameKind.Json, '{"type":"x"}').length;
    for (let at = 0; at < length; at++) {
      const { socket, seal, channel } = await rawPeer();
      const frame = seal(FrameKind.Json, '{"type":"x"}');
      frame[at] = (frame[at] as number) ^ (1 << (at % 8));
      socket.end(frame);
      // A length that has grown waits for bytes that do not come: then it is the end that is wrong.
      await expect(channel.receive()).rejects.toMatchObject({
        code: expect.stringMatching(/PROTOCOL_ERROR|PEER_LOST/),
      });
      channel.destroy();
    }
  });

  it('is told what was wrong', async () => {
    const [near, far] = await loopback.sessions();
    const strict = new ControlChannel<AnyMessage, AnyMessage>(near, { incoming: anyMessage });
    const careless = new ControlChannel<AnyMessage, unknown>(far, { incoming: anyMessage });
    await careless.send({ type: 'x', surplus: true });
    await expect(strict.receive()).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
    await expect(careless.receive()).rejects.toMatchObject({
      code: 'PROTOCOL_ERROR',
      message: expect.stringMatching(/peer ended the connection.*surplus/),
    });
  });

  it('throws random bytes, raw and inside good frames', async () => {
    const random = randomBytesFrom(42);
    for (let round = 0; round < 80; round++) {
      const { socket, seal, channel } = await rawPeer();
      socket.resume();
      const bytes = random(1 + round * 13);
      const kind = 1 + (round % 5);
      const framed = round % 2 === 1 && kind !== FrameKind.Ping && bytes.length > 4;
      socket.write(framed ? seal(kind, bytes) : bytes);
      socket.end();
      await expect(channel.receive()).rejects.toMatchObject({
        code: expect.stringMatching(/^(PROTOCOL_ERROR|PEER_LOST|LIMIT_EXCEEDED)$/),
      });
      await channel.close();
    }
  });
});

it('leaves no socket and no timer behind', async () => {
  const [near, far] = await loopback.channels();
  await near.send({ type: 'x' });
  await Promise.all([near.close(), far.close()]);
  const [left, right] = await loopback.sessions();
  const one = new ControlChannel<AnyMessage, AnyMessage>(left, { incoming: anyMessage });
  const other = new ControlChannel<AnyMessage, AnyMessage>(right, { incoming: anyMessage });
  const gone = (duplex: Duplex) => (duplex.closed ? Promise.resolve() : once(duplex, 'close'));
  one.destroy();
  await other.closed;
  await Promise.all([gone(left.duplex), gone(right.duplex)]);
  expect(left.duplex.destroyed && right.duplex.destroyed).toBe(true);
});
