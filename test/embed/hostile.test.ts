/**
 * Whatever connects to a destination in C: strangers, and insiders that break the rules. Each is dealt with in bounded
 * time, is told what was wrong where it can be, and afterwards a good guest gets through with every byte right.
 */
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type AddressInfo, createServer } from 'node:net';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { sealSecret } from '../../src/staging/image-secret.js';
import { endHosts } from '../support/host.js';
import { hosts, migrate, regionsOf, report, startGuest, startStages } from '../support/scenario.js';
import { closeStrangers, controlHello, Insider, offer, Stranger } from '../support/stranger.js';
import { CDestination, endDestinations } from './c-destination.js';

const LIMIT_MS = 14_000;
const id = () => randomBytes(16).toString('hex');
let c: CDestination;

beforeEach(async () => {
  c = await CDestination.start({ 'max-bytes': 64 * 2 ** 20, 'peer-timeout-ms': 8000 });
});
afterEach(async () => {
  closeStrangers();
  await endDestinations();
  await endHosts();
});

async function goodOneGetsThrough(): Promise<void> {
  const [a] = await hosts('a');
  await startGuest(a, regionsOf('allocate'));
  await migrate(a, c.port, { mode: 'hybrid' });
  expect(await report(a)).toMatchObject({ verified: true });
  await c.until('complete');
  await c.expectSameAs(a, 1);
}

test('strangers, all at once', async () => {
  const acts: ((stranger: Stranger) => void)[] = [
    (s) => s.send(randomBytes(4096)),
    (s) => s.send('GET / HTTP/1.1\r\nHost: x\r\n\r\n'),
    (s) => s.send('MFERR').finish(),
    (s) => s.send('MFERRYC1', Buffer.alloc(20)).finish(),
    (s) => s.send('MFERRYC1', controlHello(3, 1)),
    (s) => s.send('MFERRYC1', controlHello(7, 9)),
    (s) => s.send('MFERRYC1', controlHello(1, 1), randomBytes(32)),
    (s) => s.send('MFERRYC1'),
    (s) => s.send('MFERRYD1', randomBytes(56)),
    () => {},
  ];
  const strangers = await Promise.all(acts.map(() => Stranger.connect(c.port)));
  for (const [index, stranger] of strangers.entries()) acts[index]?.(stranger);
  await goodOneGetsThrough();
  await Promise.all(strangers.map((stranger) => stranger.untilEnded(LIMIT_MS)));
});

test('a hundred silent ones in the handshake, and the good one gets through', async () => {
  const strangers = await Promise.all(Array.from({ length: 100 }, () => Stranger.connect(c.port)));
  for (const stranger of strangers) stranger.send('MFERRYC1', controlHello(1, 1));
  await goodOneGetsThrough();
});

test.each([
  ['versions that nobody speaks', controlHello(9, 9)],
  ['a wrong proof', Buffer.concat([controlHello(1, 1), randomBytes(32)])],
])('%s, and never a pause: no connection outlasts its refusal', async (_, refused) => {
  const strangers = await Promise.all([1, 2, 3].map(() => Stranger.connect(c.port)));
  for (const stranger of strangers) stranger.send('MFERRYC1', refused).flood();
  await Promise.all(strangers.map((stranger) => stranger.untilEnded(LIMIT_MS)));
  await goodOneGetsThrough();
  const last = await Stranger.connect(c.port);
  last.send('MFERRYC1', refused).flood();
  await last.bytes(1);
  c.say('close');
  await c.until('closed');
});

test('growth is bounded as what is offered is', async () => {
  const insider = (await Insider.connect(c.port)).say(offer(id(), { capacityBytes: 2 ** 50 }));
  await insider.hears('accepted');
  insider.say({ type: 'grow', region: 0, lengthBytes: 2 ** 40 });
  await insider.hears('NO_MEMORY');
  await insider.untilEnded(LIMIT_MS);
  await goodOneGetsThrough();
});

const wrong: [string, (insider: Insider) => Insider, string][] = [
  ['no JSON', (i) => i.text('{"type":'), 'is not JSON'],
  ['a length beyond all bounds', (i) => i.raw(Buffer.from([255, 255, 255, 255, 1])), 'PROTOCOL_ERROR'],
  ['a frame that does not authenticate', (i) => i.raw(Buffer.alloc(5 + 2 + 16, 1)), 'PROTOCOL_ERROR'],
  ['nested too deeply', (i) => i.text('['.repeat(100_000) + ']'.repeat(100_000)), 'nested too deeply'],
  ['an unknown type', (i) => i.say({ type: 'surrender' }), 'not allowed at type'],
  ['an unknown field', (i) => i.say({ ...offer(id()), more: 1 }), 'not allowed at more'],
  ['a page size of 3', (i) => i.say(offer(id(), { pageSize: 3 })), 'pageSize'],
  ['a length of a half', (i) => i.say(offer(id(), { lengthBytes: 0.5 })), 'lengthBytes'],
  ['a negative length', (i) => i.say(offer(id(), { lengthBytes: -4096 })), 'lengthBytes'],
  ['seventeen channels', (i) => i.say({ ...offer(id()), channels: 17 }), 'channels'],
  [
    'no whole pages',
    (i) => i.say(offer(id(), { lengthBytes: 4097, capacityBytes: 8192 })),
    'a length that cannot be',
  ],
  [
    'more than there is',
    (i) => i.say(offer(id(), { lengthBytes: 2 ** 40, capacityBytes: 2 ** 40 })),
    'NO_MEMORY',
  ],
  [
    'a module',
    (i) => {
      const { guest, ...rest } = offer(id()) as { guest: object };
      return i.say({ ...rest, guest: { ...guest, module: { name: 'm', sha256: 'ab'.repeat(32) } } });
    },
    'MODULE_REFUSED',
  ],
];
/** An offer whose guest lies at VMD servers: `at` are theirs. */
function scattered(insider: Insider, at: { host: string; port: number }[], sealed?: string): Insider {
  const migration = id();
  const servers = at.map((address) => ({ name: 'v', ...address }));
  const image = Buffer.from(migration, 'hex');
  const sealedSecret = sealed ?? sealSecret(insider.sessionKey, image, randomBytes(32));
  const scatter = { servers, sealedSecret, gatherTimeoutMs: 1000 };
  return insider.say(offer(migration, {}, { mode: 'scatter', scatter }));
}
const nobody = { host: '127.0.0.1', port: 9 };
wrong.push(
  ['a secret that is sealed for another', (i) => scattered(i, [nobody], '00'.repeat(60)), 'AUTH_FAILED'],
  ['a secret of no length', (i) => scattered(i, [nobody], '00'.repeat(59)), 'AUTH_FAILED'],
  ['a VMD server that is not there', (i) => scattered(i, [nobody]), 'CONNECT_FAILED'],
  ['a VMD server by name', (i) => scattered(i, [{ host: 'localhost', port: 9 }]), 'CONNECT_FAILED'],
  ['a VMD server far away', (i) => scattered(i, [{ host: '192.0.2.1', port: 9 }]), 'PLAINTEXT_REQUIRED'],
  [
    '251 VMD servers',
    (i) =>
      scattered(
        i,
        Array.from({ length: 251 }, () => nobody),
      ),
    'scatter.servers',
  ],
  ['no VMD servers', (i) => scattered(i, []), 'scatter.servers'],
);

test.each(wrong)('%s', async (_, act, word) => {
  const insider = act(await Insider.connect(c.port));
  await insider.hears(word, LIMIT_MS);
  await insider.untilEnded(LIMIT_MS);
  expect(c.names).not.toContain('prepare');
});

test('VMD servers that have no such image, or say nothing: it is over in bounded time', async () => {
  c = await CDestination.start({ 'max-bytes': 64 * 2 ** 20, 'peer-timeout-ms': 3000 });
  const [stage] = await startStages('v');
  const insider = scattered(await Insider.connect(c.port), [{ host: '127.0.0.1', port: stage.port }]);
  await insider.hears('VMD_LOST');
  const silent = createServer(() => {}).listen(0, '127.0.0.1');
  await once(silent, 'listening');
  const { port } = silent.address() as AddressInfo;
  // Nor does the source say anything more; so it is taken for gone.
  for (const at of [port, c.port]) {
    const other = scattered(await Insider.connect(c.port), [{ host: '127.0.0.1', port: at }]);
    await other.untilEnded(LIMIT_MS);
  }
  silent.close();
  expect(c.names).toEqual(['listening']);
  await goodOneGetsThrough();
});

test('a message in the wrong place ends the migration, not the destination', async () => {
  const migration = id();
  const early: object[] = [
    { type: 'grant', epoch: 0 },
    { type: 'prepare', epoch: 0 },
    { type: 'grow', region: 7, lengthBytes: 4096 },
    { type: 'evicted', digests: null },
    offer(migration),
  ];
  for (const message of early) {
    const insider = (await Insider.connect(c.port)).say(offer(id()));
    await insider.hears('accepted');
    insider.say(message);
    if ((message as { type: string }).type !== 'evicted') await insider.hears('refused');
    insider.close();
  }
  const unknown = await Insider.connect(c.port);
  unknown.say({ type: 'resume-session', migrationId: migration, proof: '00'.repeat(32) });
  await unknown.hears('"known":false');
  unknown.say({ type: 'grant', epoch: 3 });
  await unknown.hears('unknown-migration');
  unknown.close();
  expect(c.names).not.toContain('resume');
  await goodOneGetsThrough();
});

test('the destination closes in the middle: the source hears of it', async () => {
  const insider = (await Insider.connect(c.port)).say(offer(id()));
  await insider.hears('accepted');
  c.say('close');
  await insider.hears('CANCELLED');
  await c.until('closed');
  await c.until('ended');
  await insider.untilEnded(LIMIT_MS);
});
