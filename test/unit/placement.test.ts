/** The choice of servers, by examples and by thousands of random cases whose laws are checked one by one. */
import { describe, expect, it } from 'vitest';
import type { MemferryError } from '../../src/errors.js';
import { maxServers } from '../../src/protocol/stage-messages.js';
import {
  indexBytesPerPage,
  indexPages,
  place,
  type PlaceableServer,
  type PlacementInput,
} from '../../src/staging/placement.js';
import { randomFrom } from '../support/random.js';

const mib = 2 ** 20;
let port = 0;
let started = 0;
const server = (name: string, freeMib: number, more: Partial<PlaceableServer> = {}): PlaceableServer => ({
  name,
  identity: (++started).toString(16).padStart(16, '0'),
  rack: null,
  memoryBytes: freeMib * mib,
  freeBytes: freeMib * mib,
  bandwidth: 0,
  images: 0,
  host: '10.0.0.1',
  port: 7000 + port++,
  ...more,
});
const input = (servers: PlaceableServer[], more: Partial<PlacementInput['need']> = {}): PlacementInput => ({
  need: { bytes: 100 * mib, pages: 25_600, linkBytesPerSecond: null, replicas: 1, ...more },
  servers,
  via: null,
  source: { rack: 'here' },
  destination: { rack: 'there' },
});
const names = (of: PlacementInput) => place(of).map(({ name }) => name);
const codeOf = (of: PlacementInput) => {
  try {
    place(of);
  } catch (error) {
    return (error as MemferryError).code;
  }
  return null;
};

describe('a placement', () => {
  it('takes one server where one is enough', () => {
    expect(names(input([server('small', 50), server('large', 500)]))).toEqual(['large']);
  });

  it('adds servers until they hold the guest', () => {
    const servers = ['a', 'b', 'c', 'd', 'e'].map((name) => server(name, 60));
    const placed = place(input(servers));
    expect(placed.map(({ name }) => name)).toEqual(['a', 'b']);
    expect(placed.reduce((sum, { shareBytes }) => sum + shareBytes, 0)).toBe(100 * mib + 2 * 16 * 25_600);
  });

  it('adds servers until they fill the link, and is content with less when there are no more', () => {
    const servers = ['a', 'b', 'c'].map((name) => server(name, 500, { bandwidth: 1e8 }));
    expect(names(input(servers, { linkBytesPerSecond: 1.5e8 }))).toEqual(['a', 'b']);
    expect(names(input(servers, { linkBytesPerSecond: 1e9 }))).toEqual(['a', 'b', 'c']);
    const fast = [...servers, server('z', 400)];
    expect(names(input(fast, { linkBytesPerSecond: 1e9 }))).toEqual(['a', 'b', 'c', 'z']);
  });

  it("prefers the destination's rack and avoids the source's", () => {
    const servers = [
      server('near the source', 900, { rack: 'here' }),
      server('anywhere', 500),
      server('near the destination', 110, { rack: 'there' }),
    ];
    expect(names(input(servers))).toEqual(['near the destination', 'anywhere']);
    expect(names(input([servers[0] as PlaceableServer]))).toEqual(['near the source']);
  });

  it('never counts on one server for both copies of a page', () => {
    const servers = [server('huge', 10_000), server('small', 60)];
    expect(codeOf(input(servers, { replicas: 2 }))).toBe('VMD_CAPACITY');
    expect(names(input([...servers, server('other', 70)], { replicas: 2 }))).toEqual([
      'huge',
      'other',
      'small',
    ]);
    expect(codeOf(input([server('huge', 10_000)], { replicas: 2 }))).toBe('VMD_CAPACITY');
  });

  it('has servers that the index fits into, whatever their place in the list', () => {
    const pages = 2 ** 22; // an index of 64 MiB
    const large = ['a', 'b', 'c', 'd', 'e'].map((name) => server(name, 90));
    const small = server('small', 40, { rack: 'there' });
    // 81 MiB of each may be planned for: 17 for pages.
    expect(names(input([small, ...large], { pages, bytes: 80 * mib }))).toEqual(['a', 'b', 'c', 'd', 'e']);
    expect(codeOf(input([small, ...large], { pages, bytes: 86 * mib }))).toBe('VMD_CAPACITY');
    const of = input([...large, small], { pages, bytes: 10 * mib });
    expect(codeOf({ ...of, via: ['a', 'b', 'c', 'd', 'small'] })).toBe('VMD_CAPACITY');
    expect(names({ ...of, via: ['a', 'b', 'c', 'd', 'e'] })).toHaveLength(5);
  });

  it('counts an index by its slots, which are of one region each, as `Image::create` takes them', () => {
    expect(indexPages([1, 256, 257], 4096)).toBe(256 + 256 + 512);
    expect(indexPages([1, 4097], 65_536)).toBe(4096 + 8192);
  });

  it('refuses with the numbers', () => {
    const servers = [server('a', 50)];
    try {
      place(input(servers));
      expect.unreachable();
    } catch (error) {
      expect(error).toMatchObject({
        code: 'VMD_CAPACITY',
        facts: { bytes: 100 * mib, servers: [{ name: 'a', freeBytes: 50 * mib }] },
      });
      expect((error as Error).message).toContain(`${50 * mib} bytes free`);
    }
    expect(codeOf(input([]))).toBe('VMD_CAPACITY');
  });

  it('takes the servers that are named, in that order, and no others', () => {
    const servers = [server('a', 500), server('b', 500), server('c', 500)];
    const [a, , c] = servers as [PlaceableServer, PlaceableServer, PlaceableServer];
    expect(names({ ...input(servers), via: ['c', `${a.host}:${a.port}`] })).toEqual(['c', 'a']);
    expect(codeOf({ ...input(servers), via: ['nobody'] })).toBe('INVALID_ARGUMENT');
    expect(codeOf({ ...input(servers), via: ['c', `${c.host}:${c.port}`] })).toBe('INVALID_ARGUMENT');
    expect(codeOf({ ...input(servers), via: [] })).toBe('INVALID_ARGUMENT');
    expect(codeOf({ ...input([...servers, server('c', 1)]), via: ['c'] })).toBe('INVALID_ARGUMENT');
    expect(codeOf({ ...input(servers, { bytes: 5000 * mib }), via: ['c'] })).toBe('VMD_CAPACITY');
    expect(codeOf({ ...input(servers), headroom: 0 })).toBe('INVALID_ARGUMENT');
  });

  it('counts a server once that is known by two addresses', () => {
    const a = server('a', 60);
    const again = { ...a, host: '10.0.0.2', freeBytes: 59 * mib };
    expect(codeOf(input([a, again]))).toBe('VMD_CAPACITY');
    const b = server('b', 80);
    expect(place(input([a, b, again]))).toMatchObject([{ name: 'b' }, { name: 'a', host: '10.0.0.2' }]);
    expect(place(input([again, b, a]))).toEqual(place(input([a, b, again])));
    const via = [`${a.host}:${a.port}`, `10.0.0.2:${a.port}`];
    expect(codeOf({ ...input([a, again, b]), via })).toBe('INVALID_ARGUMENT');
    expect(codeOf({ ...input([a, again, b]), via: ['a', 'b'] })).toBe(null);
  });

  it('has at most as many servers as there are ordinals, the roomiest if need be', () => {
    const tiny = Array.from({ length: 300 }, (_, at) => server(`t${at}`, 1, { rack: 'there' }));
    const big = server('big', 500);
    expect(place(input([...tiny, big], { pages: 100, bytes: 260 * mib }))[0]?.name).toBe('big');
    expect(codeOf(input(tiny, { pages: 100, bytes: 290 * mib }))).toBe('VMD_CAPACITY');
  });

  it('keeps its laws in thousands of random cases', () => {
    const random = randomFrom(20261123);
    const chance = (most: number) => Math.floor(random() * most);
    const outcomes = { placed: 0, refused: 0 };
    for (let round = 0; round < 5000; round++) {
      const servers = Array.from({ length: 1 + chance(12) }, (_, at) =>
        server(`s${at}`, random() < 0.1 ? 0 : 1 + chance(random() < 0.5 ? 20 : 300), {
          rack: [null, 'here', 'there', 'elsewhere'][chance(4)] ?? null,
          bandwidth: random() < 0.3 ? 0 : 1 + chance(1e9),
          port: 1000 + at,
        }),
      );
      const of: PlacementInput = {
        need: {
          bytes: chance(600) * mib,
          pages: chance(2 ** 20),
          linkBytesPerSecond: random() < 0.5 ? null : chance(4e9),
          replicas: random() < 0.5 ? 1 : 2,
        },
        servers,
        via: random() < 0.2 ? servers.slice(0, 1 + chance(servers.length)).map(({ name }) => name) : null,
        source: { rack: random() < 0.5 ? 'here' : null },
        destination: { rack: random() < 0.5 ? 'there' : null },
        headroom: random() < 0.5 ? 0.9 : 0.1 + random() * 0.9,
      };
      checkLaws(of, outcomes, random);
    }
    // A test that sees only one of them shows little.
    expect(outcomes.placed).toBeGreaterThan(1000);
    expect(outcomes.refused).toBeGreaterThan(1000);
  });
});

function checkLaws(of: PlacementInput, outcomes: { placed: number; refused: number }, random: () => number) {
  const { need, servers, via, headroom = 0.9 } = of;
  const index = need.pages * indexBytesPerPage;
  let placed: ReturnType<typeof place>;
  try {
    placed = place(of);
  } catch (error) {
    expect((error as MemferryError).code).toBe('VMD_CAPACITY');
    outcomes.refused++;
    // Nobody is refused who would fit: with everybody who can hold the index.
    if (via === null) {
      const rooms = servers
        .map(({ freeBytes }) => Math.floor(freeBytes * headroom) - index)
        .filter((room) => room >= 0);
      const holds = rooms.reduce(
        (sum, room) => sum + (need.replicas === 2 ? Math.min(room, need.bytes) : room),
        0,
      );
      expect(rooms.length >= need.replicas && holds >= need.bytes * need.replicas).toBe(false);
    }
    return;
  }
  outcomes.placed++;
  const keys = placed.map(({ host, port: at }) => `${host}:${at}`);
  expect(new Set(keys).size).toBe(keys.length);
  expect(placed.length).toBeLessThanOrEqual(maxServers);
  expect(placed.length).toBeGreaterThanOrEqual(need.replicas);
  let pages = 0;
  for (const { freeBytes, shareBytes } of placed) {
    const share = shareBytes - index;
    expect(share).toBeGreaterThanOrEqual(0);
    expect(shareBytes).toBeLessThanOrEqual(freeBytes * headroom);
    if (need.replicas === 2) expect(share).toBeLessThanOrEqual(need.bytes);
    pages += share;
  }
  expect(pages).toBe(need.bytes * need.replicas);
  if (via) expect(placed.map(({ name }) => name)).toEqual(via);
  // The same answer whatever order they were heard in.
  const shuffled = servers
    .map((one) => ({ one, at: random() }))
    .sort((a, b) => a.at - b.at)
    .map(({ one }) => one);
  expect(place({ ...of, servers: shuffled })).toEqual(placed);
}
