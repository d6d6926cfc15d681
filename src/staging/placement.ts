/**
 * Which VMD servers a migration uses, and in which order: a pure decision over what the servers last said of
 * themselves. Intermediaries are added until together they hold the guest and fill the source's link.
 *
 *  - Each server gives at most `headroom` of its free memory. What a server is asked for is its share by free
 *    memory, as backpressure and its size will make it; the whole fits when the sum of what all may give does.
 *  - With two replicas a page has two holders, and never one server twice. That works exactly when no server has to
 *    hold more than half of the copies: beyond the size of the guest its memory does not count.
 *  - Every server of the list takes the memory of the whole index when the image is made (16 bytes a page, in slots of
 *    a page for each region), also those behind the first four, which are told of their own pages alone. One that
 *    cannot hold it is of no use.
 *  - The destination's rack comes first, the source's last; then free memory, then the name: the same answer for
 *    the same facts, wherever it is asked.
 */
import { MemferryError } from '../errors.js';
import { formatAddress } from '../options/address.js';
import { type Announcement, maxServers } from '../protocol/stage-messages.js';

export interface PlaceableServer extends Announcement {
  readonly host: string;
  readonly port: number;
}

export interface PlacementInput {
  need: {
    /** Of the guest: pages of content, without the index. */
    bytes: number;
    /** Of its whole capacity: what the index is made for; see `indexPages`. */
    pages: number;
    /** What the source's link carries; null where it is not known, and one server fills it as far as anyone knows. */
    linkBytesPerSecond: number | null;
    replicas: 1 | 2;
  };
  servers: readonly PlaceableServer[];
  /** These, in this order, and no others: `host:port` or names. Null: whichever are best. */
  via: readonly string[] | null;
  source: { rack: string | null };
  destination: { rack: string | null };
  /** Of a server's free memory, at most this part is planned for; default 0.9. */
  headroom?: number;
}

export interface PlacedServer extends PlaceableServer {
  /** What it is expected to hold, in bytes: its share of the pages, and the index. */
  readonly shareBytes: number;
}

export const indexBytesPerPage = 16;
export const defaultHeadroom = 0.9;

/** What the index of such regions is made for: a slot of a server's memory indexes pages of one region only. */
export function indexPages(capacities: readonly number[], pageSize: number): number {
  const inSlot = pageSize / indexBytesPerPage;
  return capacities.reduce((sum, pages) => sum + Math.ceil(pages / inSlot) * inSlot, 0);
}

/** Throws VMD_CAPACITY with the numbers, INVALID_ARGUMENT for a `via` that names nobody, or somebody twice. */
export function place(input: PlacementInput): PlacedServer[] {
  const { via, headroom = defaultHeadroom } = input;
  if (!(headroom > 0 && headroom <= 1)) {
    throw new MemferryError('INVALID_ARGUMENT', `a headroom of ${headroom}: above 0 and at most 1`);
  }
  const candidates = via === null ? ranked(input) : named(input, via);
  let chosen = via === null ? choose(candidates, input, headroom) : candidates;
  if (via === null && !holds(chosen, input, headroom)) {
    // More than a list can have: racks matter less than room.
    chosen = choose([...candidates].sort(byRoom), input, headroom);
  }
  refuse(chosen, candidates, input, headroom);
  return withShares(chosen, input, headroom);
}

/** From the first on, until they suffice or there are no more. */
function choose(
  candidates: readonly PlaceableServer[],
  input: PlacementInput,
  headroom: number,
): PlaceableServer[] {
  const index = indexBytes(input);
  const large = candidates.filter((server) => usable(server, headroom) >= index);
  const chosen: PlaceableServer[] = [];
  for (const server of large.slice(0, maxServers)) {
    if (suffices(chosen, input, headroom)) break;
    chosen.push(server);
  }
  return chosen;
}

/** What a server may be asked to hold, index included. */
function usable({ freeBytes }: PlaceableServer, headroom: number): number {
  return Math.floor(freeBytes * headroom);
}

function indexBytes({ need }: PlacementInput): number {
  return need.pages * indexBytesPerPage;
}

/** What each may hold of the pages; below zero when the index alone does not fit. */
function room(chosen: readonly PlaceableServer[], input: PlacementInput, headroom: number): number[] {
  const index = indexBytes(input);
  return chosen.map((server) => usable(server, headroom) - index);
}

/** Copies of pages that all of them together can hold, no server two of one page. */
function capacity(rooms: readonly number[], { bytes, replicas }: PlacementInput['need']): number {
  if (rooms.some((bytesFree) => bytesFree < 0)) return -1;
  return rooms.reduce((sum, bytesFree) => sum + (replicas === 2 ? Math.min(bytesFree, bytes) : bytesFree), 0);
}

function linkOf(chosen: readonly PlaceableServer[]): number {
  return chosen.reduce(
    (sum, { bandwidth }) => sum + (bandwidth === 0 ? Number.POSITIVE_INFINITY : bandwidth),
    0,
  );
}

function holds(chosen: readonly PlaceableServer[], input: PlacementInput, headroom: number): boolean {
  const { need } = input;
  if (chosen.length < need.replicas) return false;
  return capacity(room(chosen, input, headroom), need) >= need.bytes * need.replicas;
}

function suffices(chosen: readonly PlaceableServer[], input: PlacementInput, headroom: number): boolean {
  return holds(chosen, input, headroom) && linkOf(chosen) >= (input.need.linkBytesPerSecond ?? 0);
}

/** A slow VMD is slow; only one that is too small is refused. */
function refuse(
  chosen: readonly PlaceableServer[],
  candidates: readonly PlaceableServer[],
  input: PlacementInput,
  headroom: number,
): void {
  if (holds(chosen, input, headroom)) return;
  const { bytes, replicas } = input.need;
  const free = candidates.reduce((sum, { freeBytes }) => sum + freeBytes, 0);
  const copies = replicas === 2 ? 'twice, at two servers each, ' : '';
  const index = indexBytes(input);
  throw new MemferryError(
    'VMD_CAPACITY',
    `the guest's ${bytes} bytes ${copies}and its index of ${index} bytes at each server ` +
      `do not fit into ${candidates.length} VMD servers with ${free} bytes free, of which ` +
      `${Math.round(headroom * 100)} % may be planned for`,
    {
      facts: {
        bytes,
        replicas,
        indexBytes: index,
        headroom,
        servers: candidates.map(({ name, host, port, freeBytes }) => ({ name, host, port, freeBytes })),
      },
    },
  );
}

function ranked({ servers, source, destination }: PlacementInput): PlaceableServer[] {
  const rank = ({ rack }: PlaceableServer) => {
    if (rack !== null && rack === destination.rack) return 0;
    return rack !== null && rack === source.rack ? 2 : 1;
  };
  const unique = new Map<string, PlaceableServer>();
  for (const server of servers) {
    const before = unique.get(server.identity);
    // Known by two addresses, or heard twice: the smaller word is the safer one.
    if (!before || byRoom(server, before) > 0) unique.set(server.identity, server);
  }
  return [...unique.values()]
    .filter(({ freeBytes }) => freeBytes > 0)
    .sort((a, b) => rank(a) - rank(b) || byRoom(a, b));
}

function byRoom(a: PlaceableServer, b: PlaceableServer): number {
  return b.freeBytes - a.freeBytes || compare(a.name, b.name) || compare(addressOf(a), addressOf(b));
}

function named({ servers }: PlacementInput, via: readonly string[]): PlaceableServer[] {
  if (via.length === 0 || via.length > maxServers) {
    throw new MemferryError(
      'INVALID_ARGUMENT',
      `via names ${via.length} servers: 1 to ${maxServers} are possible`,
    );
  }
  const chosen = via.map((wanted) => {
    const found = servers.filter((server) => addressOf(server) === wanted || server.name === wanted);
    const [first] = found;
    if (first && new Set(found.map(({ identity }) => identity)).size === 1) return first;
    const why = first ? 'several VMD servers have that name' : 'no such VMD server is known';
    throw new MemferryError('INVALID_ARGUMENT', `via '${wanted}': ${why}`, {
      facts: { via: wanted, known: servers.map(addressOf) },
    });
  });
  if (new Set(chosen.map(({ identity }) => identity)).size < chosen.length) {
    throw new MemferryError('INVALID_ARGUMENT', 'via names one VMD server twice', { facts: { via } });
  }
  return chosen;
}

/**
 * By free memory, so that no server is full while another has room: each gets the same part of its room. With two
 * replicas nobody can hold more than the guest once; the rest goes to the others, again by their room.
 */
function withShares(
  chosen: readonly PlaceableServer[],
  input: PlacementInput,
  headroom: number,
): PlacedServer[] {
  const { bytes, replicas } = input.need;
  const most = room(chosen, input, headroom).map((free) => (replicas === 2 ? Math.min(free, bytes) : free));
  const total = most.reduce((sum, free) => sum + free, 0);
  const wanted = bytes * replicas;
  const shares = most.map((free) => (total === 0 ? 0 : Math.min(free, Math.floor((free / total) * wanted))));
  let left = wanted - shares.reduce((sum, share) => sum + share, 0);
  for (const [at, free] of most.entries()) {
    const more = Math.min(left, free - (shares[at] as number));
    shares[at] = (shares[at] as number) + more;
    left -= more;
  }
  return chosen.map((server, at) => ({
    ...server,
    shareBytes: (shares[at] as number) + indexBytes(input),
  }));
}

function addressOf({ host, port }: { host: string; port: number }): string {
  return formatAddress(host, port);
}

function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}
