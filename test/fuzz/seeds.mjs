/**
 * The named seeds of the fuzzers that read scripts (frame_script.h): `node test/fuzz/seeds.mjs` writes them into
 * test/fuzz/corpus/. What a longer run has found lies beside them, under its hash.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const corpus = join(dirname(fileURLToPath(import.meta.url)), 'corpus');
const WIDE = 1;
const AS_IT_IS = 2;
const TORN = 4;
const CUT = 16;
const PACK = 32;
/** Bits of a script's flags. */
const ZERO = 2;
const FINAL = 8;
const LZ4 = 16;
const ZSTD = 32;
const DELTA = 64;
/** Of `native/wire/frame.h`. */
const T = {
  pages: 1,
  zero: 2,
  discard: 3,
  switch: 4,
  switchAck: 5,
  barrier: 6,
  barrierAck: 7,
  suspects: 8,
  fault: 9,
  bitmap: 10,
  bitmapEnd: 11,
  goodbye: 12,
  map: 13,
  mapRequest: 14,
  mapEnd: 15,
  read: 16,
  absent: 17,
  refused: 18,
  chainBroken: 19,
  elsewhere: 20,
  probe: 21,
  probed: 22,
  held: 23,
  names: 24,
  reference: 25,
  named: 26,
  treeRequest: 27,
  tree: 28,
  same: 29,
  baseEnd: 30,
  linkProbe: 31,
  known: 32,
  knownReference: 33,
  unresolved: 34,
  taken: 35,
  hashRequest: 36,
  hashes: 37,
  report: 40,
  reported: 41,
  popularContent: 42,
  popularAsk: 43,
  popularNames: 44,
  popularRead: 45,
  popularPages: 46,
  chainOf: 47,
  chainOver: 48,
};
const ALONE = 0xff00;
const TWICE = 0x0100;
const TO_CHAIN = 0x0001;

const u16 = (value) => [value & 255, value >> 8];
const le = (value, bytes) =>
  Array.from({ length: bytes }, (_, i) => Number((BigInt(value) >> BigInt(8 * i)) & 255n));
const ascii = (text) => [...Buffer.from(text)];

function frame(type, { how = 0, flags = 0, region = 0, first = 0, count = 0, tag = 0, bytes = [] } = {}) {
  const numbers =
    (how & WIDE) !== 0
      ? [...le(flags, 2), ...le(region, 4), ...le(first, 8), ...le(count, 8), ...le(tag, 8)]
      : [flags, region, first, count, ...u16(tag)];
  return [how, type, ...numbers, bytes.length, ...bytes];
}
const runs = (...pairs) => pairs.flatMap(([first, count]) => [...le(first, 8), ...le(count, 8)]);
const part = (whose, ...frames) => [whose, frames.length, ...frames.flat()];
const run = (first, count, bytes = ascii('abc'), more = {}) => ({ first, count, bytes, ...more });

// A VMD server's connections: roles, then what the next replica answers (6), and the owner's calls (7).
const [SCATTER, GATHER, DEMAND, CHAIN, PROBE, POPULAR, REPLICA, OWNER] = [0, 1, 2, 3, 4, 5, 6, 7];
const DOMAIN = 1;
const FULL = 2;
const CHAINED = 4;
const stored = part(
  SCATTER,
  frame(T.pages, run(0, 3, ascii('first'), { tag: ALONE })),
  frame(T.zero, { first: 3, count: 4, tag: ALONE }),
  frame(T.pages, run(90, 10, ascii('second'), { tag: ALONE })),
  frame(T.map, { flags: FINAL, first: 50, count: 2, tag: 0xff02, bytes: le(77, 8) }),
  frame(T.map, { flags: ZERO | FINAL, first: 60, count: 20, tag: ALONE }),
  frame(T.barrier, { tag: 9 }),
);
const readBack = [
  frame(T.read, { first: 0, count: 10, tag: 1 }),
  frame(T.read, { flags: LZ4 | ZSTD, first: 85, count: 15, tag: 2 }),
  frame(T.read, { region: 1, first: 0, count: 64, tag: 3 }),
];
const stage = {
  'scatter-and-gather': [0, ...stored, ...part(GATHER, ...readBack, frame(T.mapRequest)), ...part(OWNER)],
  demand: [8, ...stored, ...part(DEMAND, ...readBack, frame(T.goodbye))],
  hashes: [0, ...stored, ...part(GATHER, frame(T.hashRequest, { first: 0, count: 20, tag: 5 }))],
  torn: [
    0,
    ...part(SCATTER, frame(T.pages, run(0, 2, ascii('x'), { how: TORN, tag: ALONE })), frame(T.barrier)),
  ],
  encoded: [
    0,
    ...part(
      SCATTER,
      frame(T.pages, run(0, 4, ascii('base'), { tag: ALONE })),
      frame(T.pages, run(4, 4, ascii('lz'), { how: PACK, flags: LZ4, tag: ALONE })),
      frame(T.pages, run(8, 4, ascii('zs'), { how: PACK, flags: ZSTD, tag: ALONE })),
      frame(T.pages, run(0, 4, ascii('changed'), { how: PACK, flags: DELTA, tag: ALONE })),
      frame(T.pages, run(0, 4, ascii('junk'), { how: AS_IT_IS, flags: ZSTD, tag: ALONE })),
      frame(T.barrier),
    ),
    ...part(GATHER, frame(T.read, { first: 0, count: 12 })),
  ],
  replicas: [
    CHAINED,
    ...part(REPLICA, frame(T.refused, { first: 1, count: 1 }), frame(T.barrierAck, { tag: 7 })),
    ...part(
      SCATTER,
      frame(T.chainOver, { region: 2, tag: 1 }),
      frame(T.pages, run(0, 3, ascii('twice'), { tag: TWICE })),
      frame(T.zero, { first: 9, count: 2, tag: TWICE }),
      frame(T.barrier, { tag: 7 }),
      frame(T.goodbye),
    ),
  ],
  'replica-breaks': [
    CHAINED,
    ...part(REPLICA, frame(T.mapEnd)),
    ...part(SCATTER, frame(T.pages, run(0, 1, [1], { tag: TWICE })), frame(T.barrier)),
  ],
  'no-replica': [0, ...part(SCATTER, frame(T.pages, run(0, 1, [1], { tag: TWICE })), frame(T.barrier))],
  chain: [
    0,
    ...part(
      CHAIN,
      frame(T.chainOf, { tag: 3 }),
      frame(T.pages, run(0, 2, ascii('replica'), { tag: TO_CHAIN })),
      frame(T.barrier, { tag: 1 }),
      frame(T.chainOver, { region: 1, tag: 3 }),
      frame(T.pages, run(2, 2, ascii('late'), { tag: TO_CHAIN })),
    ),
  ],
  'no-room': [
    FULL,
    ...stored,
    ...part(
      SCATTER,
      frame(T.pages, run(100, 64, ascii('full'), { region: 1, tag: ALONE })),
      frame(T.pages, run(0, 40, ascii('more'), { how: PACK, flags: LZ4, tag: ALONE })),
      frame(T.barrier),
    ),
    ...part(GATHER, ...readBack),
  ],
  probe: [
    DOMAIN,
    ...stored,
    ...part(
      PROBE,
      frame(T.probe, { count: 3, tag: 4, bytes: ascii('name') }),
      frame(T.held, { count: 2, bytes: ascii('holder and name') }),
      frame(T.names, { first: 0, count: 3, tag: 5, bytes: ascii('n') }),
      frame(T.probe, { count: 2, tag: 6, bytes: ascii('name') }),
    ),
    ...part(
      SCATTER,
      frame(T.reference, { first: 10, count: 2, tag: ALONE, bytes: ascii('hash') }),
      frame(T.barrier),
    ),
  ],
  members: [
    0,
    ...part(
      POPULAR,
      frame(T.report, { count: 3, tag: 1, bytes: ascii('popular') }),
      frame(T.popularContent, { count: 1, bytes: ascii('p') }),
      frame(T.popularAsk, { count: 9, tag: 2 }),
      frame(T.popularRead, { count: 2, tag: 3, bytes: ascii('popular') }),
    ),
  ],
  'cut-in-a-frame': [0, ...part(SCATTER, frame(T.pages, run(0, 4, [3], { how: CUT, tag: ALONE })))],
  'beyond-the-region': [
    0,
    ...part(SCATTER, frame(T.zero, { how: WIDE, first: 2n ** 64n - 1n, count: 2n, tag: ALONE })),
  ],
};

// A destination's connections: two channels, demand (2), a redial (3), the base is sampled (4), is there (5).
const PAGING = 1;
const FROM_START = 2;
const BASE = 4;
const IN_PLACE = 8;
const REFERENCES = 16;
const DIGESTS = 32;
const TWO_EXTENTS = 64;
const REDIAL = part(3);
const SAMPLED = part(4);
const READY = part(5);
const filled = [frame(T.pages, run(0, 20, ascii('some pages'))), frame(T.zero, { first: 20, count: 20 })];
const receiver = {
  rounds: [
    DIGESTS,
    ...part(0, ...filled),
    ...part(1, frame(T.pages, run(3, 2, [9])), frame(T.goodbye)),
    ...part(0, frame(T.goodbye)),
  ],
  suspect: [
    TWO_EXTENTS,
    ...part(
      1,
      frame(T.pages, run(10, 20, [1], { how: TORN })),
      frame(T.barrier, { tag: 1 }),
      frame(T.pages, run(10, 20, [2])),
    ),
  ],
  encoded: [
    DIGESTS | TWO_EXTENTS,
    ...part(
      0,
      frame(T.pages, run(15, 10, ascii('base'))),
      frame(T.pages, run(15, 10, ascii('change'), { how: PACK, flags: DELTA })),
      frame(T.pages, run(0, 8, [5], { how: PACK, flags: LZ4 })),
      frame(T.pages, run(18, 8, [6], { how: PACK, flags: ZSTD })),
      frame(T.pages, run(1, 2, ascii('junk'), { how: AS_IT_IS, flags: DELTA })),
    ),
  ],
  'discard-and-switch': [
    PAGING | DIGESTS,
    ...part(
      0,
      frame(T.pages, run(0, 20)),
      frame(T.discard, { bytes: runs([2, 3], [9, 1]) }),
      frame(T.switch),
    ),
    ...part(2, frame(T.pages, run(2, 3, [7])), frame(T.zero, { first: 20, count: 20 })),
    ...part(1, frame(T.pages, run(9, 1, [8]))),
  ],
  'paging-from-start': [
    PAGING | FROM_START | TWO_EXTENTS,
    ...part(0, frame(T.switch), ...filled),
    ...part(2, frame(T.pages, run(4, 1))),
  ],
  redial: [
    PAGING,
    ...part(0, frame(T.switch), frame(T.pages, run(0, 5))),
    ...part(1, frame(T.mapEnd)),
    ...REDIAL,
    ...part(0, frame(T.switch), ...filled),
    ...part(1, frame(T.pages, run(0, 5))),
  ],
  base: [
    BASE | DIGESTS,
    ...SAMPLED,
    ...part(0, frame(T.treeRequest, { count: 40 }), frame(T.treeRequest, { count: 40, tag: 1 })),
    ...READY,
    ...part(
      0,
      frame(T.linkProbe, { bytes: ascii('12345678') }),
      frame(T.same, { bytes: runs([0, 10], [12, 5]) }),
      frame(T.baseEnd, { tag: 1 }),
      frame(T.pages, run(30, 10)),
    ),
  ],
  'base-in-place': [
    BASE | IN_PLACE | PAGING,
    ...READY,
    ...part(
      0,
      frame(T.treeRequest, { count: 40 }),
      frame(T.same, { bytes: runs([1, 2]) }),
      frame(T.baseEnd),
      frame(T.switch),
    ),
  ],
  references: [
    REFERENCES | DIGESTS,
    ...part(0, frame(T.pages, run(0, 3)), frame(T.knownReference, run(3, 4, ascii('hash')))),
    ...part(1, frame(T.barrier, { tag: 2 }), frame(T.knownReference, run(0, 2))),
  ],
  'references-while-paging': [
    REFERENCES | PAGING,
    ...part(0, frame(T.switch), frame(T.knownReference, run(3, 4)), frame(T.pages, run(3, 4))),
  ],
  'map-without-servers': [
    0,
    ...part(0, frame(T.map, { count: 1, tag: ALONE, bytes: le(1, 8) })),
    ...part(2, frame(T.elsewhere, { count: 1 })),
  ],
  'beyond-the-region': [
    0,
    ...part(0, frame(T.pages, run(39, 2))),
    ...part(1, frame(T.zero, { how: WIDE, first: 2n ** 63n, count: 2n ** 63n })),
  ],
  'a-type-of-the-destination': [0, ...part(1, frame(T.known, { count: 1, bytes: [1] }))],
  'discard-out-of-order': [PAGING, ...part(0, frame(T.discard, { bytes: runs([9, 1], [2, 3]) }))],
};

const hashesOf = (sample, ...bytes) => [sample, ...bytes];
const answers = {
  'all-equal': hashesOf(0, 3, 3, 0),
  'node-by-node': hashesOf(0, 1, 1, 1, 1, 0),
  'one-differs': hashesOf(0, 64 + 3, 5, 3, 0, 3, 3, 0),
  sample: hashesOf(1, 3, 3, 0),
  estimate: hashesOf(4, 3, 64 + 3, 5, 0),
  'made-up': hashesOf(
    0,
    200,
    ...frame(T.tree, { how: WIDE, count: 270, tag: 1, bytes: ascii('no such hash') }),
  ),
  'half-a-node': hashesOf(0, 200, ...frame(T.tree, { count: 100, tag: 1, bytes: [1] })),
  refused: [
    2,
    5,
    3,
    200,
    ...frame(T.known, { count: 4, bytes: ascii('name') }),
    200,
    ...frame(T.unresolved, { first: 5, count: 4, bytes: ascii('name') }),
  ],
  'refused-twice': [
    2,
    5,
    3,
    ...[1, 2].flatMap(() => [200, ...frame(T.unresolved, { first: 5, count: 4, bytes: [1] })]),
  ],
  names: [3, 0, 5, 3, 0, 1, 5, 2, 5],
};

const entry = (slot, seed, bits, score, ...more) => [...u16(slot), seed, bits, score, ...more];
const share = {
  fresh: [0, 50, 0, 0, 4, 1, 9, 4, 2, 3, 6, 1, 8, 2, 2, 0],
  'taken-over': [
    0,
    50,
    40,
    3,
    ...entry(0, 1, 0, 5),
    ...entry(1, 2, 0, 6),
    ...entry(90, 3, 0, 7),
    3,
    1,
    3,
    2,
    6,
    3,
    10,
    15,
  ],
  'wrong-pages': [
    0,
    50,
    40,
    3,
    ...entry(0, 1, 2, 5),
    ...entry(1, 2, 1, 6),
    ...entry(2, 3, 4, 7),
    3,
    1,
    6,
    2,
    10,
    15,
    3,
    3,
  ],
  'one-page-twice': [0, 50, 40, 2, ...entry(0, 1, 0, 5), ...entry(7, 1, 0, 6), 3, 1, 8, 1, 3, 1],
  'scores-that-are-none': [
    0,
    50,
    40,
    2,
    ...entry(0, 1, 0, 0xff, ...le(0x7ff8000000000000n, 8)),
    ...entry(1, 2, 0, 0xff, ...le(0xfff0000000000000n, 8)),
    7,
    2,
    0xff,
    ...le(0x7ff0000000000000n, 8),
  ],
  'used-as-anything': [0, 50, 40, 1, ...entry(0, 1, 8, 5, ...le(2n ** 63n, 8)), 3, 1],
  'over-budget': [
    0,
    2,
    40,
    3,
    ...entry(0, 1, 0, 5),
    ...entry(1, 2, 0, 6),
    ...entry(2, 3, 0, 7),
    4,
    4,
    9,
    9,
    1,
    9,
    0,
  ],
  'another-domain': [2, 50, 40, 1, ...entry(0, 1, 0, 5)],
  'another-version': [4, 50, 40, 0],
  'no-share': [16, 50, 4, 0],
  'odd-length': [32, 50, 1, 1, ...entry(0, 1, 0, 5), 3, 1],
  shortened: [0, 50, 40, 1, ...entry(0, 1, 0, 5), 1, 1, 2, 0, 3, 1, 6, 1, 4, 2, 5],
  'changed-under-it': [
    0,
    50,
    40,
    1,
    ...entry(0, 1, 0, 5),
    0,
    0,
    0,
    ...entry(0, 2, 0, 9),
    2,
    0,
    3,
    2,
    0,
    0,
    1,
    ...le(4096, 4),
    4,
    1,
    2,
    3,
    4,
    2,
    0,
  ],
  raw: [1, 50, ...ascii('MFSHARE1'), 1, 0, 0, 0, 0, 16, 0, 0],
  empty: [1, 50],
};

const kJson = 1;
const kChunk = 2;
const kBye = 4;
const kJsonWithBinary = 5;
const said = (kind, text, how = 16, ...announced) => {
  const units = Math.ceil(text.length / 8);
  return [how, kind, units, ...ascii(text.padEnd(8 * units)), ...announced];
};
const HEX16 = 'ab'.repeat(16);
const OFFER = {
  type: 'offer',
  migrationId: HEX16,
  mode: 'hybrid',
  mayPage: true,
  verify: true,
  channels: 2,
  encodings: ['lz4', 'new'],
  base: false,
  replay: false,
  lineage: null,
  references: { proof: 'cd'.repeat(32), sealedKey: null },
  scatter: {
    servers: [{ name: 's', host: '127.0.0.1', port: 7000 }],
    sealedSecret: 'ef'.repeat(60),
    gatherTimeoutMs: 1e3,
  },
  guest: {
    name: 'g',
    module: { name: 'm', sha256: '01'.repeat(32) },
    description: { any: [1] },
    regions: [{ name: 'r', lengthBytes: 4096, capacityBytes: 8192, pageSize: 4096 }],
  },
};
const messages = {
  offer: OFFER,
  'resume-session': { type: 'resume-session', migrationId: HEX16, proof: '0f'.repeat(32) },
  grow: { type: 'grow', region: 3, lengthBytes: 1 },
  state: { type: 'state', paging: true },
  evicted: { type: 'evicted', digests: [HEX16] },
  cancel: { type: 'cancel', epoch: 1, code: 'PEER_LOST', message: 'why' },
  refused: { type: 'refused', epoch: 2, code: 'NO_SUCH', message: '' },
  nested: JSON.parse(`${'['.repeat(60)}${']'.repeat(60)}`),
};
const OPENED = JSON.stringify({
  type: 'opened',
  request: 1,
  session: 1,
  info: { ordinal: 0, digests: [HEX16] },
});
const control = {
  ...Object.fromEntries(
    Object.entries(messages).map(([name, json]) => [`message-${name}`, [1, ...ascii(JSON.stringify(json))]]),
  ),
  'message-numbers': [1, ...ascii('{"type":"grow","region":1e0,"lengthBytes":9007199254740993}')],
  'message-twice': [1, ...ascii('{"type":"goodbye","type":"grow"}')],
  'message-no-text': [1, ...ascii('{"type":"'), 0xff, 0xc0, ...ascii('"}')],
  'frame-json': [0, 2, 0, 0, 0, kJson, ...ascii('{}')],
  'frame-too-long': [0, 255, 255, 255, 255, kChunk],
  texts: [2, 5, ...ascii('00ff00ff')],
  address: [2, 200, ...ascii('[::1]:7000')],
  'hello-versions': [3, ...u16(1), ...u16(1), ...Array(70).fill(1)],
  'hello-no-versions': [3, ...u16(2), ...u16(1), ...Array(70).fill(1)],
  'hello-answer': [4, ...u16(1), ...u16(1), ...u16(1), ...u16(1), ...Array(70).fill(1)],
  channel: [
    5,
    ...said(kJson, '{"type":"grow","region":0,"lengthBytes":4096}'),
    ...said(kJsonWithBinary, '{"type":"state","paging":false}', 24, ...u16(8)),
    ...said(kChunk, '12345678', 0),
    ...said(kBye, '', 0),
  ],
  'channel-forged': [5, ...said(kJson, '{"type":"goodbye"}', 17)],
  'channel-short': [5, ...said(kJson, '{"type":"goodbye"}', 20), ...said(3, '', 0)],
  'channel-why': [5, ...said(kBye, '{"code":"X","message":"y"}')],
  'channel-unannounced': [5, ...said(kChunk, '12345678', 0)],
  'server-opened': [6, ...said(kJson, OPENED)],
  // An exception of the JSON library's, and no Failure, before look() read it by its schema.
  'server-without-info': [6, ...said(kJson, '{"type":"opened","request":1}')],
  'server-declines': [6, ...said(kJson, '{"type":"declined","request":1,"code":"VMD_LOST","message":"no"}')],
  'server-says-nothing': [6],
  commit: [7, 1, 0, 3, 0, 7, 0, 0, 0, 2, 0, 16, 0, 0x4b, 0, 32, 0, 6, 0, 25, 0],
};

const helloWith = (kind, ...changes) => [kind, changes.length, ...changes.flat()];
const hello = {
  'an-old-epoch': helloWith(0),
  'another-token': helloWith(0, [40, 1]),
  'another-version': helloWith(0, [24, 9]),
  'another-migration': helloWith(0, [8, 9]),
  'a-channel-too-many': helloWith(0, [26, 1]),
  'the-demand-channel': helloWith(0, [26, 255], [27, 255]),
  'a-role-that-is-not-given': helloWith(1),
  'no-such-role': helloWith(1, [26, 200]),
  'no-such-image': helloWith(1, [8, 9]),
  'an-attempt-beyond': helloWith(1, [28, 255]),
  control: [2, ...ascii('MFERRYC1')],
  'half-a-hello': [2, ...ascii('MFERRYD1'), 1, 2, 3],
  'no-preface': [2, ...ascii('GET / HTTP/1.1\r\n')],
  nothing: [2],
};

const headers = Object.fromEntries(
  Object.values(T)
    .filter((type) => type > 20)
    .map((type) => {
      const header = (count, bytes) => [
        0,
        ...le(0x3146464d, 4),
        ...u16(type),
        ...u16(0),
        ...le(0, 4),
        ...le(bytes, 4),
        ...le(0, 8),
        ...le(count, 8),
        ...le(0, 8),
        ...le(0, 8),
      ];
      const each = {
        probe: 16,
        probed: 16,
        names: 16,
        reference: 32,
        tree: 16,
        known: 8,
        knownReference: 32,
        unresolved: 8,
        hashes: 16,
        report: 16,
        popularRead: 16,
        popularNames: 24,
        popularContent: 4096,
        popularPages: 4096,
      };
      const name = Object.keys(T).find((key) => T[key] === type);
      const bytes = { held: 32, reported: 8, same: 16, linkProbe: 1 }[name] ?? each[name] ?? 0;
      const made = header(1, bytes);
      if (name === 'popularPages') made[17] = 1;
      return [name, made];
    }),
);

for (const [fuzzer, seeds] of Object.entries({
  stage,
  receiver,
  answers,
  share,
  control,
  hello,
  frame: headers,
})) {
  mkdirSync(join(corpus, fuzzer), { recursive: true });
  for (const [name, bytes] of Object.entries(seeds))
    writeFileSync(join(corpus, fuzzer, name), Uint8Array.from(bytes));
}
