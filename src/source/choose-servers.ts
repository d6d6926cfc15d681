/**
 * Which of the candidates hold a guest, and in which order: the placement's pure decision, and what becomes of it where
 * they do not. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import { formatAddress, type ResolvedMigrateOptions } from '../options.js';
import { type PlaceableServer, type PlacedServer, place } from '../staging/placement.js';
import type { Candidates } from './candidates.js';
import type { PlannedRoom } from './planned-room.js';

export interface GuestNeed {
  bytes: number;
  /** Of its whole capacity, see `indexPages`. */
  indexPages: number;
}

/** @throws INVALID_ARGUMENT when there is nobody to ask, and the caller did not choose to go on directly */
export function mayHaveServers({ via, discover, onCapacity, mode }: ResolvedMigrateOptions): boolean {
  if (via.length > 0 || discover !== false) return true;
  if (onCapacity === 'direct') return false;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `mode '${mode}' needs VMD servers: name some with via, or have them discovered`,
  );
}

/**
 * Null when they cannot hold the guest and the caller chose to go on directly. With `room` this is planned for.
 * @throws VMD_CAPACITY, INVALID_ARGUMENT
 */
export function chooseServers(
  options: ResolvedMigrateOptions,
  candidates: Candidates,
  need: GuestNeed,
  guest: string,
  room: PlannedRoom | null,
): PlacedServer[] | null {
  // A fixed list is taken as it is; the placement chooses among what is heard.
  const fixed = options.discover === false;
  const servers: PlaceableServer[] = fixed ? candidates.named : candidates.servers;
  try {
    const placed = place({
      need: {
        bytes: need.bytes,
        pages: need.indexPages,
        linkBytesPerSecond: options.linkBytesPerSecond,
        replicas: options.replicas,
      },
      servers: room?.leftFor(guest, servers) ?? servers,
      via: fixed ? servers.map(({ host, port }) => formatAddress(host, port)) : null,
      source: { rack: options.rack },
      destination: { rack: options.destinationRack },
    });
    room?.plan(guest, servers, placed);
    return placed;
  } catch (error) {
    const short = error instanceof MemferryError && error.code === 'VMD_CAPACITY';
    if (!short) throw error;
    if (options.onCapacity === 'direct') return null;
    throw withoutThem(error, candidates);
  }
}

/** The same, with who would have been there. */
function withoutThem(error: MemferryError, { unanswered }: Candidates): MemferryError {
  if (unanswered.length === 0) return error;
  const them = unanswered.map(({ name, failed }) => `${name} (${failed})`).join(', ');
  return new MemferryError('VMD_CAPACITY', `${error.message}; not counted: ${them}`, {
    cause: error,
    facts: { ...error.facts, unanswered: unanswered.map(({ name, failed }) => ({ name, failed })) },
  });
}
