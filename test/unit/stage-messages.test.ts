/** Messages with a VMD server are strict and bounded; secrets, proofs and tokens are what both ends compute. */
import { createHmac } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { age, describeStatus } from '../../src/cli/status.js';
import { imageId as imageArgument } from '../../src/cli/drop.js';
import { byteRate, duration } from '../../src/cli/parse-values.js';
import { tokenStream } from '../../src/control/tokens.js';
import { resolveStageOptions } from '../../src/options.js';
import { stageAnswer, stageRequest, type StageStatus } from '../../src/protocol/stage-messages.js';
import {
  chainAttempts,
  chainTable,
  chainTokens,
  makeImageSecret,
  openProof,
  provesOpen,
  sealSecret,
  stageTokens,
  unsealSecret,
} from '../../src/staging/image-secret.js';
import type { NativeHeldState } from '../../src/native.js';
import { ArrivingState, readParked } from '../../src/staging/parked-state.js';
import { FakeStage } from './fake-stage.js';
import { parkedGuest } from './fake-stage.js';

const image = '00112233445566778899aabbccddeeff';
const other = 'ff'.repeat(16);
const servers = [{ name: 'a', host: '127.0.0.1', port: 7000 }];
const guest = parkedGuest;

const requests: Record<string, unknown>[] = [
  {
    type: 'create',
    request: 1,
    image,
    sealedSecret: '00'.repeat(60),
    sealedDomain: null,
    name: 'guest',
    kind: 'park',
    ordinal: 0,
    servers,
    replicas: 1,
    pageSize: 4096,
    regions: [{ name: 'heap', pages: 1, capacityPages: 2 }],
    leaseMs: 1000,
  },
  {
    type: 'open',
    request: 2,
    image,
    proof: '00'.repeat(32),
    access: 'read',
    claim: { claimant: other, epoch: 1 },
  },
  { type: 'commit', request: 3, image },
  { type: 'hold', request: 4, image },
  { type: 'seal', request: 5, image, digests: [other] },
  { type: 'grow', request: 6, image, region: 0, pages: 9 },
  { type: 'dissolve', request: 7, image, epoch: 0 },
  { type: 'claim', request: 8, image, claimant: other, rollback: null },
  { type: 'grant-claim', request: 9, image, claimant: other, epoch: 1 },
  { type: 'release-claim', request: 10, image, claimant: other, epoch: 1 },
  { type: 'state', request: 11, image, guest },
  { type: 'status', request: 12 },
  { type: 'drop', request: 13, image },
  { type: 'prepare', epoch: 0 },
  { type: 'grant', epoch: 0 },
  { type: 'query', epoch: 1 },
  { type: 'cancel', epoch: 0, code: 'CANCELLED', message: '' },
];

const announced = {
  name: 'a',
  identity: 'ab'.repeat(8),
  rack: null,
  memoryBytes: 1,
  freeBytes: 1,
  bandwidth: 0,
  images: 0,
};
const status: StageStatus = {
  ...announced,
  memoryBytes: 64 * 2 ** 20,
  freeBytes: 48 * 2 ** 20,
  maxImages: 256,
  connections: 2,
  bytesIn: 1,
  bytesOut: 2,
  sharedPages: 4,
  hintBytes: 4096,
  members: 2,
  popularNames: 100,
  popularPages: 7,
  uptimeMs: 90_500.25,
  held: [
    {
      id: image,
      name: 'gu\u001b[2Jest',
      kind: 'park',
      phase: 'parked',
      ordinal: 0,
      servers: 2,
      epoch: 3,
      pages: 64,
      pagesHeld: 40,
      pagesShared: 4,
      pagesZero: 24,
      pagesKnown: 64,
      bytes: 2 ** 20,
      bytesIn: 1,
      bytesOut: 0,
      sealed: true,
      ageMs: 7_300_000,
    },
  ],
};
const info = {
  name: 'guest',
  kind: 'park',
  phase: 'claimed',
  ordinal: 0,
  servers,
  replicas: 2,
  pageSize: 4096,
  regions: [{ name: 'heap', pages: 1, capacityPages: 2 }],
  sealed: false,
  digests: null,
  epoch: 1,
  owner: null,
};
const answers: Record<string, unknown>[] = [
  { type: 'created', request: 1, session: 1, encodings: ['lz4'], identity: '0123456789abcdef' },
  { type: 'opened', request: 2, session: null, info },
  { type: 'committed', request: 3 },
  { type: 'held', request: 3 },
  { type: 'sealed', request: 3 },
  { type: 'grown', request: 3 },
  { type: 'dissolved', request: 3, known: true },
  { type: 'claimed', request: 3, epoch: 1, guest },
  { type: 'granted', request: 3 },
  { type: 'released', request: 3 },
  { type: 'stored', request: 3 },
  { type: 'status', request: 3, status },
  { type: 'dropped', request: 3, known: false },
  { type: 'declined', request: 3, code: 'VMD_LOST', message: 'gone', reason: null },
  { type: 'announce', ...announced },
  { type: 'ready', epoch: 0 },
  { type: 'resumed', epoch: 0 },
  { type: 'refused', epoch: 0, code: 'CANCELLED', message: '' },
  { type: 'unknown-migration', epoch: 1 },
];

describe('messages with a VMD server', () => {
  for (const [from, schema, messages] of [
    ['a client', stageRequest, requests],
    ['a server', stageAnswer, answers],
  ] as const) {
    for (const message of messages) {
      it(`from ${from}: '${message['type']}' as it is, and nothing else`, () => {
        expect(schema.safeParse(message).success).toBe(true);
        expect(schema.safeParse({ ...message, more: 1 }).success).toBe(false);
        for (const [key, value] of Object.entries(message)) {
          const { [key]: _left, ...without } = message;
          // A server that names no encodings knows none.
          expect(schema.safeParse(without).success, `without ${key}`).toBe(key === 'encodings');
          const wrong = [
            {},
            typeof value === 'number' ? -1 : 7,
            typeof value === 'number' ? 2 ** 53 : '',
            0.5,
          ];
          for (const bad of wrong) {
            // What a name, a text or a count may be is not this test's.
            if (['name', 'message', 'code'].includes(key) && typeof bad === typeof value) continue;
            if (['rollback', 'session'].includes(key) && bad === 7) continue;
            if (key === 'reason' && bad === '') continue;
            expect(
              schema.safeParse({ ...message, [key]: bad }).success,
              `${key}: ${JSON.stringify(bad)}`,
            ).toBe(false);
          }
        }
      });
    }
  }

  it('bound what is told of servers, regions and digests', () => {
    const create = requests[0] as Record<string, unknown>;
    const many = (count: number, of: unknown) => Array.from({ length: count }, () => of);
    const refused = [
      { servers: [] },
      { servers: many(251, servers[0]) },
      { servers: [{ ...servers[0], port: 0 }] },
      { servers: [{ ...servers[0], host: 'x'.repeat(256) }] },
      { regions: [] },
      { regions: many(65, { name: 'r', pages: 1, capacityPages: 1 }) },
      { regions: [{ name: 'r', pages: 1, capacityPages: 2 ** 31 + 1 }] },
      { ordinal: 250 },
      { leaseMs: 3_600_001 },
      { image: image.toUpperCase() },
      { replicas: 3 },
      { name: 'x'.repeat(65) },
    ];
    for (const part of refused) expect(stageRequest.safeParse({ ...create, ...part }).success).toBe(false);
    expect(stageRequest.safeParse({ ...create, servers: many(250, servers[0]) }).success).toBe(true);
  });
});

describe("an image's secret", () => {
  const key = Uint8Array.from({ length: 32 }, (_, at) => at);
  const secret = Uint8Array.from({ length: 32 }, (_, at) => 255 - at);
  const id = Buffer.from(image, 'hex');
  const nonce = Uint8Array.from({ length: 12 }, (_, at) => at + 1);

  it('is 32 random bytes', () => {
    expect(makeImageSecret()).toHaveLength(32);
    expect(makeImageSecret()).not.toEqual(makeImageSecret());
  });

  it('travels sealed: for one connection, one image, unaltered', () => {
    const sealed = sealSecret(key, id, secret, nonce);
    expect(sealed).toMatch(/^0102030405060708090a0b0c[0-9a-f]{96}$/);
    expect(unsealSecret(key, id, sealed)).toEqual(secret);
    expect(unsealSecret(key, id, sealSecret(key, id, secret))).toEqual(secret);
    expect(sealSecret(key, id, secret)).not.toBe(sealSecret(key, id, secret));
    const wrong: [Uint8Array, Uint8Array, string][] = [
      [secret, id, sealed],
      [key, Buffer.from(other, 'hex'), sealed],
      [key, id, sealed.slice(0, -2)],
      [key, id, ''],
    ];
    for (let at = 0; at < sealed.length; at += 2) {
      const flipped = (Number.parseInt(sealed.slice(at, at + 2), 16) ^ 1).toString(16).padStart(2, '0');
      wrong.push([key, id, sealed.slice(0, at) + flipped + sealed.slice(at + 2)]);
    }
    for (const [withKey, withId, text] of wrong) {
      expect(() => unsealSecret(withKey, withId, text)).toThrow(
        expect.objectContaining({ code: 'AUTH_FAILED' }),
      );
    }
    expect(() => sealSecret(key, id, secret.subarray(1))).toThrow(/32 bytes/);
  });

  it('is shown by a proof that is good on one connection', () => {
    const proof = createHmac('sha256', secret).update('memferry open').update(key).digest('hex');
    expect(openProof(secret, key)).toBe(proof);
    expect(provesOpen(secret, key, proof)).toBe(true);
    expect(provesOpen(secret, secret, proof)).toBe(false);
    expect(provesOpen(key, key, proof)).toBe(false);
    expect(provesOpen(secret, key, '')).toBe(false);
  });

  it('gives tokens in the order that the native side reads them in', () => {
    const tokens = stageTokens(key, id, 0x0102, 0b0110);
    expect(tokens).toHaveLength(64 * 6 * 32);
    const at = (attempt: number, role: number) =>
      Buffer.from(tokens.subarray((attempt * 6 + role) * 32, (attempt * 6 + role + 1) * 32));
    const stream = tokenStream(key, 'memferry stage', Buffer.concat([id, Buffer.from([2, 1])]), 64 * 6);
    const expected = (attempt: number, role: number) =>
      Buffer.from(stream.subarray((attempt * 6 + role) * 32, (attempt * 6 + role + 1) * 32));
    for (const attempt of [0, 1, 63]) {
      expect(at(attempt, 1)).toEqual(expected(attempt, 1));
      expect(at(attempt, 2)).toEqual(expected(attempt, 2));
      expect(at(attempt, 0)).not.toEqual(expected(attempt, 0));
      expect(at(attempt, 3).equals(Buffer.alloc(32))).toBe(false);
    }
    const keys = (roles: number) => {
      const table = stageTokens(key, id, 0x0102, roles);
      return [0, 1, 2, 3, 4].map((attempt) => {
        const start = (attempt * 6 + 5) * 32;
        return Buffer.from(table.subarray(start, start + 32)).equals(expected(attempt, 5));
      });
    };
    expect(keys(0b0110)).toEqual([true, true, true, true, false]);
    expect(keys(0b1_0001)).toEqual([false, false, true, true, false]);
    const chain = chainTokens(secret, id, 3, 258, 5);
    const context = Buffer.concat([id, Buffer.from([3, 0, 2, 1])]);
    const last = Buffer.from(tokenStream(secret, 'memferry chain', context, 5).subarray(4 * 32));
    expect(Buffer.from(chain.subarray(4 * 32))).toEqual(last);
    expect(Buffer.from(chainTable(chain).subarray((4 * 6 + 3) * 32, (4 * 6 + 4) * 32))).toEqual(last);
    expect([1, 16, 17, 64, 250].map(chainAttempts)).toEqual([64, 64, 60, 16, 4]);
  });

  it('keeps the same bytes from one version to the next', () => {
    const digest = (bytes: Uint8Array) =>
      createHmac('sha256', 'vector').update(bytes).digest('hex').slice(0, 16);
    expect(sealSecret(key, id, secret, nonce).slice(24, 56)).toMatchInlineSnapshot(
      `"3066e10b071883b3f128f50282a65ee0"`,
    );
    expect(openProof(secret, key).slice(0, 16)).toMatchInlineSnapshot(`"5ef42cd17a6c074e"`);
    expect(digest(stageTokens(key, id, 7, 0b111111))).toMatchInlineSnapshot(`"ee75b1c6c6ef4de8"`);
    expect(digest(chainTokens(secret, id, 0, 1, 64))).toMatchInlineSnapshot(`"dbbb1ac0cc5d758f"`);
  });
});

describe('a parked guest beside its pages', () => {
  it('comes and goes in pieces, and counts until both have let go of it', () => {
    const stage = new FakeStage(2 ** 20);
    for (const state of [new Uint8Array(0), Uint8Array.from([1, 2, 3])]) {
      const arriving = new ArrivingState(state.length, { ...guest, name: 'gäst' }, (bytes) =>
        stage.makeState(bytes),
      );
      for (const byte of state) arriving.write(Uint8Array.of(byte));
      const back = readParked(arriving.held as NativeHeldState);
      expect(back.guest).toEqual({ ...guest, name: 'gäst' });
      expect(back.state.length).toBe(state.length);
      expect(Uint8Array.from(back.state.read(0, state.length))).toEqual(state);
      expect(stage.stats().freeBytes).toBeLessThan(2 ** 20);
      back.state.done();
      arriving.discard();
      expect(stage.stats().freeBytes).toBe(2 ** 20);
    }
  });

  it('goes nowhere without room', () => {
    const arriving = new ArrivingState(3, guest, () => null);
    arriving.write(Uint8Array.of(1, 2, 3));
    expect(arriving.held).toBe(null);
    arriving.discard();
  });
});

describe('the options of a VMD server', () => {
  it('have defaults and bounds', () => {
    expect(resolveStageOptions({ memoryBytes: 2 ** 24 })).toMatchObject({
      host: '127.0.0.1',
      port: 0,
      bandwidth: 0,
      rack: null,
      announce: null,
      parkTtlMs: null,
      maxImages: 256,
    });
    const bad = [
      { memoryBytes: 2 ** 24 - 1 },
      { maxImages: 257 },
      { maxImages: 0 },
      { announce: 'nowhere' },
      { parkTtlMs: 2 ** 31 },
      { name: '' },
      { what: 1 },
    ];
    for (const part of bad) {
      expect(() => resolveStageOptions({ memoryBytes: 2 ** 24, ...part } as never)).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
    }
  });
});

describe('on the command line', () => {
  it('times have units', () => {
    expect(['1500ms', '90s', '1.5m', '12h', '7d'].map(duration)).toEqual([1500, 90e3, 90e3, 432e5, 6048e5]);
    for (const text of ['', '5', '0s', '-1s', '25d', '1w', 's']) expect(() => duration(text)).toThrow(/unit/);
    expect(['100M', '1Gi/s', '5'].map(byteRate)).toEqual([1e8, 2 ** 30, 5]);
  });

  it('images are 32 hex digits', () => {
    expect(imageArgument(image.toUpperCase())).toBe(image);
    for (const text of ['', image.slice(1), `${image}0`, 'g'.repeat(32)])
      expect(() => imageArgument(text)).toThrow();
  });

  it('the status is a table, whatever names are in it', () => {
    const text = describeStatus(status);
    expect(text).not.toContain('\u001b');
    expect(text).toContain('48.0 of 64.0 MiB free');
    expect(text).toContain('4 pages shared');
    expect(text.split('\n').at(-1)).toMatch(
      new RegExp(`^${image}  gu\\?\\[2Jest  park  parked +1/2 +40 +4 +24 +64 +1\\.00 +2h$`),
    );
    expect(describeStatus({ ...status, held: [] })).not.toContain('\n');
    expect([0, 119_999, 120_000, 7_200_000, 172_800_000].map(age)).toEqual(['0s', '119s', '2m', '2h', '2d']);
  });
});
