/** What the guests of a gang leave each other at the servers. */
import { describe, expect, it } from 'vitest';
import { PlannedRoom } from '../../src/source/planned-room.js';
import type { PlaceableServer, PlacedServer } from '../../src/staging/placement.js';

const server = (name: string, freeBytes: number): PlaceableServer => ({
  ...{ name, identity: name.padStart(16, '0'), rack: null, memoryBytes: 10_000, freeBytes, bandwidth: 0 },
  ...{ images: 0, host: '127.0.0.1', port: 7000 },
});
const share = (of: PlaceableServer, shareBytes: number): PlacedServer => ({ ...of, shareBytes });
const free = (servers: PlaceableServer[]) => servers.map(({ freeBytes }) => freeBytes);

describe('the room at servers that a gang plans for', () => {
  it('is what the earlier guests leave, and all of them together stay within the headroom', () => {
    const room = new PlannedRoom();
    const servers = [server('a', 1000), server('b', 2000)];
    expect(room.leftFor('one', servers)).toEqual(servers);
    room.plan('one', servers, [share(servers[0] as PlaceableServer, 450)]);
    // 0.9 of 1000 may be planned for: 450 are left, which is 0.9 of 500.
    expect(free(room.leftFor('two', servers))).toEqual([500, 2000]);
    // Its own plan is made anew.
    expect(free(room.leftFor('one', servers))).toEqual([1000, 2000]);
    room.plan('two', servers, [
      share(servers[0] as PlaceableServer, 450),
      share(servers[1] as PlaceableServer, 90),
    ]);
    expect(free(room.leftFor('three', servers))).toEqual([0, 1900]);
  });

  it('does not count pages twice that have come by now, and sees what others take', () => {
    const room = new PlannedRoom();
    const [before, later, little] = [1000, 700, 100].map((bytes) => server('a', bytes));
    room.plan('one', [before as PlaceableServer], [share(before as PlaceableServer, 450)]);
    expect(free(room.leftFor('two', [later as PlaceableServer]))).toEqual([500]);
    expect(free(room.leftFor('two', [little as PlaceableServer]))).toEqual([100]);
    expect(free(room.leftFor('two', [server('b', 5)]))).toEqual([5]);
  });

  it('is there again when a guest has gone, or goes elsewhere', () => {
    const room = new PlannedRoom();
    const servers = [server('a', 1000), server('b', 1000)] as [PlaceableServer, PlaceableServer];
    room.plan('one', servers, [share(servers[0], 900)]);
    room.plan('one', servers, [share(servers[1], 900)]);
    expect(free(room.leftFor('two', servers))).toEqual([1000, 0]);
    room.release('one');
    room.release('one');
    expect(free(room.leftFor('two', servers))).toEqual([1000, 1000]);
    // What a server says when nobody plans for it any more is news.
    room.plan('two', [server('a', 300)], [share(servers[0], 90)]);
    expect(free(room.leftFor('three', servers))).toEqual([200, 1000]);
  });
});
