/**
 * Whatever connects to a real listener: strangers, liars and broken programs. Each is dealt with in bounded time,
 * nothing of it stays, and through all of it a good migration gets through with every byte right.
 */
import { randomBytes } from 'node:crypto';
import { connect } from 'node:net';
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { dataTokens } from '../../lib/control/tokens.js';
import { endHosts, type Host } from '../support/host.js';
import {
  done,
  expectIntact,
  expectNothingLeft,
  expectOneOwner,
  expectRuns,
  failure,
  hosts,
  type Inventory,
  inventory,
  listen,
  migrate,
  regionsOf,
  report,
  startGuest,
} from '../support/scenario.js';
import { closeStrangers, controlHello, Insider, offer, Stranger } from '../support/stranger.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';

/** The listener's own bounds for a handshake, a hello and a first message are 5 s. */
const LIMIT_MS = 20_000;
vi.setConfig({ testTimeout: 6 * LIMIT_MS });

let a: Host;
let b: Host;
let port: number;
let before: Inventory;

beforeEach(async () => {
  [a, b] = await hosts('a', 'b');
  port = await listen(b, { options: { maxBytes: 64 * 2 ** 20, peerTimeoutMs: 3000 } });
  await startGuest(a, regionsOf('allocate'));
  before = await inventory(b);
});
afterEach(async () => {
  closeStrangers();
  await closeProxies();
  await endHosts();
});

async function goodOneGetsThrough(): Promise<void> {
  await migrate(a, port, { mode: 'hybrid' }, { key: 'good' });
  expect(await report(a, 'good')).toMatchObject({ verified: true });
  await expectRuns(b);
  await expectIntact(a);
  await expectOneOwner([a, b]);
}

/** Asked by a stranger, for its versions: the cheapest question that takes the listener's whole front door. */
async function stillAnswers(): Promise<void> {
  const stranger = (await Stranger.connect(port)).send('MFERRYC1', controlHello(7, 9));
  const answer = await stranger.bytes(8);
  expect([answer.readUInt16LE(0), answer.readUInt16LE(4), answer.readUInt16LE(6)]).toEqual([2, 1, 1]);
  stranger.close();
}

describe('strangers', () => {
  const id = '00'.repeat(16);
  const acts: [string, (stranger: Stranger) => void][] = [
    ['garbage', (s) => s.send(randomBytes(4096))],
    ['something of HTTP', (s) => s.send('GET / HTTP/1.1\r\nHost: x\r\n\r\n')],
    ['a preface that is cut short', (s) => s.send('MFERR').finish()],
    ['a control hello that is cut short', (s) => s.send('MFERRYC1', Buffer.alloc(20)).finish()],
    ['an empty range of versions', (s) => s.send('MFERRYC1', controlHello(3, 1))],
    ['a later version', (s) => s.send('MFERRYC1', controlHello(7, 9))],
    ['a wrong proof', (s) => s.send('MFERRYC1', controlHello(1, 1), randomBytes(32))],
    ['a data hello that is cut short', (s) => s.send('MFERRYD1', Buffer.from(id, 'hex')).finish()],
    ['a data hello of no migration', (s) => s.send('MFERRYD1', randomBytes(56))],
    ['a hello that goes on and on', (s) => s.send('MFERRYD1', randomBytes(300_000))],
  ];
  test.each(acts)('%s', async (_, act) => {
    const stranger = await Stranger.connect(port);
    act(stranger);
    await stranger.untilEnded(LIMIT_MS);
    stranger.close();
    await expectNothingLeft(b, before);
    await stillAnswers();
  });

  test('all of them at once, and the good one gets through', async () => {
    const strangers = await Promise.all(acts.map(() => Stranger.connect(port)));
    for (const [index, stranger] of strangers.entries()) acts[index]?.[1](stranger);
    await goodOneGetsThrough();
    await Promise.all(strangers.map((stranger) => stranger.untilEnded(LIMIT_MS)));
  });

  test('a later version is told which ones are spoken here', stillAnswers);

  test('silence is not waited for for ever', async () => {
    const silent = await Promise.all([Stranger.connect(port), Stranger.connect(port)]);
    silent[1]?.send('MFERRYC1');
    await Promise.all(silent.map((stranger) => stranger.untilEnded(LIMIT_MS)));
    for (const stranger of silent) stranger.close();
    await expectNothingLeft(b, before);
  });

  test('a thousand silent ones, and the good one gets through', async () => {
    const openings = [
      Buffer.alloc(0),
      Buffer.from('MFE'),
      Buffer.from('MFERRYC1'),
      Buffer.concat([Buffer.from('MFERRYC1'), controlHello(1, 1)]),
      Buffer.from('MFERRYD1 and no more'),
    ];
    const strangers: Stranger[] = [];
    for (let i = 0; i < 1000; i += 100) {
      const some = await Promise.all(Array.from({ length: 100 }, () => Stranger.connect(port)));
      for (const [k, stranger] of some.entries()) stranger.send(openings[k % openings.length] as Buffer);
      strangers.push(...some);
    }
    await goodOneGetsThrough();
    const { descriptors } = await inventory(b);
    // 256 unknown ones, 64 in the handshake, and what is between the two.
    expect(descriptors['socket'] ?? 0).toBeLessThan(400);
    for (const stranger of strangers) stranger.close();
  });

  test('a flood of new connections while the guest moves', async () => {
    let on = true;
    let made = 0;
    const flood = (async () => {
      while (on) {
        const socket = connect({ host: '127.0.0.1', port });
        socket.on('error', () => {});
        await new Promise((resolve) => socket.once('connect', resolve).once('close', resolve));
        socket.write(randomBytes(64));
        made++;
        if (made % 2 === 0) socket.destroy();
        else socket.once('end', () => socket.destroy());
      }
    })();
    await goodOneGetsThrough();
    on = false;
    await flood;
    expect(made).toBeGreaterThan(10);
  });
});

describe('secrets', () => {
  test('another secret is refused, and the guest runs on', async () => {
    await migrate(a, port, { mode: 'pre-copy', secret: 'another secret of the same kind' });
    expect((await failure(a)).code).toBe('AUTH_FAILED');
    await expectRuns(a);
    expect(b.events.some((event) => event.event === 'offer')).toBe(false);
    await expectNothingLeft(b, before);
    await goodOneGetsThrough();
  });

  test('a listener that does not know the secret gets no guest', async () => {
    const otherPort = await listen(b, { key: 'other', options: { secret: 'not what the source was told' } });
    await migrate(a, otherPort, { mode: 'pre-copy' });
    expect((await failure(a)).code).toBe('AUTH_FAILED');
    await expectRuns(a);
  });

  test('what listens is no memferry at all', async () => {
    const proxyToNobody = await TcpProxy.start(1);
    await migrate(a, proxyToNobody.port, { mode: 'pre-copy', connectTimeoutMs: 1500 });
    expect(['PEER_LOST', 'PROTOCOL_ERROR', 'CHANNEL_LOST', 'CONNECT_FAILED']).toContain(
      (await failure(a)).code,
    );
    await expectRuns(a);
  });
});

describe('recorded and played again', () => {
  test('a whole control connection and its data connections mean nothing the second time', async () => {
    const proxy = await TcpProxy.start(port);
    proxy.record();
    await migrate(a, proxy.port, { mode: 'stop-and-copy' });
    expect(await report(a)).toMatchObject({ verified: true });
    const recorded = proxy.recorded();
    expect(recorded.map(({ role }) => role).sort()).toEqual(['control', 'data', 'data', 'demand']);
    const offers = b.events.filter((event) => event.event === 'offer').length;
    for (const { role, bytes } of recorded) {
      const stranger = (await Stranger.connect(port)).send(bytes);
      await stranger.untilEnded(LIMIT_MS);
      // The one answer to a wrong hello; nothing else.
      if (role !== 'control' && stranger.received.length > 0)
        expect(stranger.received.readUInt32LE(4)).toBe(2);
      stranger.close();
    }
    expect(b.events.filter((event) => event.event === 'offer')).toHaveLength(offers);
    await expectRuns(b);
  });

  test('a data hello is good once, also while its migration runs', async () => {
    const proxy = await TcpProxy.start(port);
    proxy.record();
    const held = proxy.at({ on: 'data', direction: 'up', name: 'pages', nth: 2 }, 'hold');
    await migrate(a, proxy.port, { mode: 'pre-copy', channels: 1 });
    await held.reached;
    for (const { role, bytes } of proxy.recorded()) {
      if (role === 'control') continue;
      const stranger = (await Stranger.connect(port)).send(bytes.subarray(0, 64));
      await stranger.untilEnded(LIMIT_MS);
      stranger.close();
    }
    held.release();
    expect(await report(a)).toMatchObject({ verified: true });
    await expectRuns(b);
  });
});

/** One bit on the way, or one piece twice: noticed, and never taken for the guest's memory. */
const pieces: [string, string, Point, { bandwidth?: number }?][] = [
  ['the offer', 'pre-copy', { on: 'control', direction: 'up', name: 'offer' }],
  ['the acceptance', 'pre-copy', { on: 'control', direction: 'down', name: 'accepted' }],
  ['the execution state', 'hybrid', { on: 'control', direction: 'up', name: 'state' }],
  ['READY', 'stop-and-copy', { on: 'control', direction: 'down', name: 'ready' }],
  ['pages of a round', 'pre-copy', { on: 'data', direction: 'up', name: 'pages' }],
  ['pages of a guest that stands', 'stop-and-copy', { on: 'data', direction: 'up', name: 'pages' }],
  ['pages of the push', 'post-copy', { on: 'data', direction: 'up', name: 'pages' }],
  ['zero pages', 'stop-and-copy', { on: 'data', direction: 'up', name: 'zero' }],
  ['a barrier', 'pre-copy', { on: 'data', direction: 'up', name: 'barrier' }],
  ["a barrier's answer", 'pre-copy', { on: 'data', direction: 'down', name: 'barrier-ack' }],
  ['the switch', 'post-copy', { on: 'data', direction: 'up', name: 'switch' }],
  [
    'a fault request',
    'post-copy',
    { on: 'demand', direction: 'down', name: 'fault-request' },
    // It asks before all is pushed.
    { bandwidth: 1e6 },
  ],
];

describe.each(pieces)('%s', (_, mode, where, more) => {
  test.each(['corrupt', 'repeat'] as const)('%s', async (deed) => {
    const proxy = await TcpProxy.start(port);
    const point = proxy.at(where, deed);
    await migrate(a, proxy.port, {
      mode,
      connectTimeoutMs: 3000,
      prepareTimeoutMs: 5000,
      inDoubtTimeoutMs: 8000,
      recoverTimeoutMs: 8000,
      ...more,
    });
    await point.reached;
    const result = await done(a, 'main', 30_000);
    if (result.ok) {
      // It was harmless, or it was repaired; then the bytes are right.
      expect(result.value).toMatchObject({ verified: true });
      await expectRuns(b);
      await expectOneOwner([a, b]);
    } else if (b.steps('g').includes('resume')) {
      // In doubt: it runs there, and could not say so in time.
      expect(['GUEST_LOST', 'PAGES_LOST', 'PROTOCOL_ERROR', 'PEER_LOST', 'MIGRATION_IN_DOUBT']).toContain(
        result.error.code,
      );
      expect(a.steps('g')).not.toContain('unpause');
    } else {
      const codes = ['PROTOCOL_ERROR', 'PEER_LOST', 'CHANNEL_LOST', 'AUTH_FAILED', 'MIGRATION_IN_DOUBT'];
      // Of a busy machine, which what went wrong left no time.
      expect([...codes, 'CONNECT_FAILED', 'PREPARE_TIMEOUT']).toContain(result.error.code);
      if (result.error.code !== 'MIGRATION_IN_DOUBT') {
        await expectRuns(a);
        await stillAnswers();
      }
    }
  });
});

describe('peers that know the secret and lie', () => {
  const id = () => randomBytes(16).toString('hex');
  test.each<[string, (insider: Insider) => void]>([
    ['no JSON', (i) => i.text('{"type": "offer", ')],
    ['an unknown message', (i) => i.say({ type: 'make-coffee' })],
    ['GRANT for nothing', (i) => i.say({ type: 'grant', epoch: 0 })],
    [
      'a length that no memory has',
      (i) => i.say(offer(id(), { lengthBytes: 2 ** 52, capacityBytes: 2 ** 52 })),
    ],
    ['more than there is', (i) => i.say(offer(id(), { lengthBytes: 2 ** 27, capacityBytes: 2 ** 27 }))],
    ['no length', (i) => i.say(offer(id(), { lengthBytes: 0 }))],
    ['a part of a page', (i) => i.say(offer(id(), { lengthBytes: 4097, capacityBytes: 8192 }))],
    ['a capacity below the length', (i) => i.say(offer(id(), { capacityBytes: 4096 }))],
    ['pages of another size', (i) => i.say(offer(id(), { pageSize: 8192 }))],
    ['a negative length', (i) => i.say(offer(id(), { lengthBytes: -4096 }))],
    ['too many channels', (i) => i.say(offer(id(), {}, { channels: 10_000 }))],
    [
      'no regions',
      (i) => i.say(offer(id(), {}, { guest: { name: 'x', module: null, description: null, regions: [] } })),
    ],
    ['another field', (i) => i.say(offer(id(), {}, { surprise: true }))],
    ['an id that is none', (i) => i.say(offer('../../etc/passwd'))],
    [
      'a proof of nothing',
      (i) => i.say({ type: 'resume-session', migrationId: id(), proof: '00'.repeat(32) }),
    ],
    ['a frame of 4 GiB', (i) => i.raw(Buffer.from([0xff, 0xff, 0xff, 0xff, 1]))],
    ['a frame of an unknown kind', (i) => i.raw(Buffer.from([1, 0, 0, 0, 99]))],
    ['a frame that does not authenticate', (i) => i.raw(Buffer.alloc(64, 1))],
    ['text as long as a frame may be', (i) => i.text(`{"type":"${'x'.repeat(200_000)}"}`)],
  ])('%s', async (_, act) => {
    const insider = await Insider.connect(port);
    act(insider);
    // Asking after an unknown migration is answered, and then nothing comes of it.
    if (_ !== 'a proof of nothing') await insider.untilEnded();
    insider.close();
    await expectNothingLeft(b, before, LIMIT_MS);
    expect(b.steps('g')).toEqual([]);
    await stillAnswers();
  });

  test('an offer, and silence afterwards', async () => {
    const insider = (await Insider.connect(port)).lives().say(offer(id()));
    await insider.hears('accepted');
    insider.silence();
    await insider.untilEnded();
    await b.untilStep('intruder', 'abandon');
    await expectNothingLeft(b, before, LIMIT_MS);
  });

  test('questions about migrations that nobody knows, over more connections than it takes', async () => {
    const most = 256 + 2 * 16;
    let held = 0;
    const asking: Insider[] = [];
    while (asking.length < most + 32) {
      const more = await Promise.all(Array.from({ length: 32 }, () => Insider.connect(port)));
      for (const insider of more) {
        held++;
        void insider.ended.then(() => held--);
        insider.say({ type: 'resume-session', migrationId: id(), proof: '00'.repeat(32) });
      }
      asking.push(...more);
      await Promise.all(more.map((insider) => Promise.race([insider.hears('"known":false'), insider.ended])));
    }
    await expect.poll(() => held).toBeLessThanOrEqual(most);
    for (const insider of asking) insider.close();
    await expectNothingLeft(b, before, LIMIT_MS);
    await stillAnswers();
  });

  test('an offer that comes late, as from a source whose VMD servers are slow, is taken', async () => {
    const insider = (await Insider.connect(port)).lives();
    await new Promise((resolve) => setTimeout(resolve, 6500));
    insider.say(offer(id()));
    await insider.hears('accepted');
    insider.close();
    await b.untilStep('intruder', 'abandon');
  });

  test('the same offer twice: the second is declined, the first one lives', async () => {
    const one = id();
    const first = (await Insider.connect(port)).lives().say(offer(one));
    await first.hears('accepted');
    const second = (await Insider.connect(port)).lives().say(offer(one));
    await second.hears('declined');
    await second.untilEnded();
    expect(b.steps('intruder')).toEqual([]);
    first.close();
    await b.untilStep('intruder', 'abandon');
  });

  test.each<[string, object]>([
    ['a second offer', offer('ab'.repeat(16))],
    ['growth beyond its capacity', { type: 'grow', region: 0, lengthBytes: 2 ** 40 }],
    ['growth of no region', { type: 'grow', region: 9, lengthBytes: 8192 }],
    ['PREPARE before its memory', { type: 'prepare', epoch: 0 }],
    ['a state without one', { type: 'state' }],
  ])('after its offer: %s', async (_, message) => {
    const insider = (await Insider.connect(port)).lives().say(offer(id()));
    await insider.hears('accepted');
    insider.say(message);
    await b.untilStep('intruder', 'abandon');
    await insider.untilEnded();
    expect(b.steps('intruder')).not.toContain('resume');
    await expectNothingLeft(b, before, LIMIT_MS);
    await stillAnswers();
  });

  test('GRANT before READY runs nothing', async () => {
    const insider = (await Insider.connect(port)).lives().say(offer(id()));
    await insider.hears('accepted');
    insider.say({ type: 'grant', epoch: 0 });
    insider.close();
    await b.untilStep('intruder', 'abandon');
    expect(b.steps('intruder')).not.toContain('resume');
  });

  test('pages outside its regions', async () => {
    const migrationId = id();
    const insider = (await Insider.connect(port)).lives().say(offer(migrationId));
    await insider.hears('accepted');
    const tokens = dataTokens(insider.sessionKey, Buffer.from(migrationId, 'hex'), 1, 1);
    const links = await Promise.all(
      [0, 0xffff].map(async (channel, index) => {
        const hello = Buffer.alloc(64);
        hello.write('MFERRYD1', 0, 'latin1');
        hello.write(migrationId, 8, 'hex');
        hello.writeUInt16LE(1, 24);
        hello.writeUInt16LE(channel, 26);
        hello.set(tokens.subarray(index * 32, index * 32 + 32), 32);
        const link = (await Stranger.connect(port)).send(hello);
        expect((await link.bytes(8)).readUInt32LE(4)).toBe(1);
        return link;
      }),
    );
    // One zero page at 2^40, with a checksum that fits: see native/wire/frame.h.
    const header = Buffer.alloc(48);
    header.writeUInt32LE(0x3146464d, 0);
    header.writeUInt16LE(2, 4);
    header.writeBigUInt64LE(2n ** 40n, 16);
    header.writeBigUInt64LE(1n, 24);
    const { hash } = await import('../../lib/index.js');
    header.writeBigUInt64LE(hash(new Uint8Array(header.subarray(0, 40))), 40);
    links[0]?.send(header);
    await b.untilStep('intruder', 'abandon');
    await insider.untilEnded();
    for (const link of links) await link.untilEnded(LIMIT_MS);
    await expectNothingLeft(b, before, LIMIT_MS);
    await goodOneGetsThrough();
  });
});
