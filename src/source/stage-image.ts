/**
 * The image of a guest that is about to leave: which servers, and the image made at each of them. And what is said of
 * the guest itself, to a destination or with a parked image. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { whileOpening } from '../protocol/bounded.js';
import type { ImageKind, ParkedGuest } from '../protocol/stage-messages.js';
import { makeImageSecret } from '../staging/image-secret.js';
import { imageConnection } from '../staging/image-member.js';
import type { StageClient } from '../staging/client.js';
import { createImage, type Refusal } from '../staging/image-opening.js';
import type { ImageSet } from '../staging/image-set.js';
import { indexPages } from '../staging/placement.js';
import { Candidates } from './candidates.js';
import { linkToFill } from './link-rate.js';
import { chooseServers, type GuestNeed, mayHaveServers } from './choose-servers.js';
import { dedupDomainKey } from './dedup-domain.js';
import { checkIdentity } from './guest-identity.js';
import type { PlannedRoom } from './planned-room.js';

/** Each asks servers that were not asked before, or leaves one out: rarely more than two or three. */
const mostAttempts = 16;
/** With what else an offer says, it stays below a control message's bound. */
const maxDescriptionBytes = 192 * 1024;

export interface ImageOrder {
  guest: Guest;
  /** Of its regions now, in bytes. */
  lengths: readonly number[];
  options: ResolvedMigrateOptions;
  secret: Uint8Array;
  /** 32 hex digits: the migration's id. */
  image: string;
  kind: ImageKind;
  signal: AbortSignal;
  /** Of the gang that the guest leaves with. */
  room?: PlannedRoom | null;
}

/**
 * Null when no servers are used, by the caller's choice (`onCapacity: 'direct'`).
 * @throws INVALID_ARGUMENT for a guest of which nobody could be told, or without servers to ask; VMD_CAPACITY,
 *   CONNECT_FAILED (none that was named answers, or never all that were chosen), what a named server refuses with
 */
export async function stageImage(order: ImageOrder): Promise<ImageSet | null> {
  const { guest, lengths, options, secret, image, kind, signal } = order;
  checkIdentity(guest);
  checkDescription(guest.description);
  const pageSize = guest.regions[0]?.region.pageSize ?? 4096;
  const capacities = guest.regions.map(({ region }) => region.capacityBytes / region.pageSize);
  const need = {
    bytes: lengths.reduce((sum, length) => sum + length, 0),
    indexPages: indexPages(capacities, pageSize),
  };
  if (!mayHaveServers(options)) return null;
  const domainKey = await dedupDomainKey(options.dedup, secret);
  const made = {
    image,
    domainKey,
    kind,
    name: guest.name,
    pageSize,
    replicas: options.replicas,
    leaseMs: options.leaseMs,
    regions: guest.regions.map(({ name, region }, index) => ({
      name,
      pages: (lengths[index] as number) / region.pageSize,
      capacityPages: capacities[index] as number,
    })),
  };
  return whileOpening(signal, async (making) => {
    const connection = imageConnection(secret, options, making);
    await using candidates = await Candidates.find(options, connection, making);
    const linkBytesPerSecond = await linkToFill(options, candidates.servers);
    const filling = { ...order, options: { ...options, linkBytesPerSecond } };
    return await makeWhere(filling, candidates, need, (clients) =>
      // Nothing of an attempt is good for the next one.
      createImage(clients, candidates.unanswered, connection, { ...made, secret: makeImageSecret() }),
    );
  });
}

/**
 * Where the placement says, made anew as long as servers that were only heard of turn out to be no use. One that was
 * named and refuses ends it; where it has no room, by the caller's choice without servers.
 */
async function makeWhere(
  { options, image, room = null }: ImageOrder,
  candidates: Candidates,
  need: GuestNeed,
  make: (clients: StageClient[]) => Promise<ImageSet | Refusal[]>,
): Promise<ImageSet | null> {
  try {
    for (let attempt = 1; ; attempt++) {
      const placed = chooseServers(options, candidates, need, image, room);
      if (!placed) break;
      if (await candidates.reach(placed)) {
        const clients = candidates.clientsOf(placed);
        const made = await make(clients);
        if (!Array.isArray(made)) {
          candidates.handOver(clients);
          return made;
        }
        const named = made.filter(({ client, error }) => !candidates.mayDoWithout(client, error));
        const [first] = [...named.filter(({ error }) => error.code !== 'VMD_CAPACITY'), ...named];
        if (first?.error.code === 'VMD_CAPACITY' && options.onCapacity === 'direct') break;
        if (first) throw first.error;
      }
      if (attempt >= mostAttempts) throw neverTheSame(candidates);
    }
    room?.release(image);
    return null;
  } catch (error) {
    room?.release(image);
    throw error;
  }
}

function neverTheSame({ unanswered }: Candidates): MemferryError {
  const last = unanswered.at(-1);
  return new MemferryError(
    'CONNECT_FAILED',
    `VMD servers were chosen ${mostAttempts} times, and never all of them took the guest` +
      (last ? `; the last that did not was ${last.name}: ${last.failed}` : ''),
    { facts: { unanswered: unanswered.map(({ name, failed }) => ({ name, failed })) } },
  );
}

/**
 * `lengths` as they are now: what a destination allocates.
 * @throws INVALID_ARGUMENT for names, a module or a description that cannot be told
 */
export function describeGuest(guest: Guest, lengths: readonly number[]): ParkedGuest {
  checkIdentity(guest);
  checkDescription(guest.description);
  return {
    name: guest.name,
    module: guest.module,
    description: guest.description ?? null,
    regions: guest.regions.map(({ name, region }, index) => ({
      name,
      lengthBytes: lengths[index] as number,
      capacityBytes: region.capacityBytes,
      pageSize: region.pageSize,
    })),
  };
}

function checkDescription(description: unknown): void {
  let json: string | undefined;
  try {
    json = JSON.stringify(description);
  } catch (cause) {
    const why = cause instanceof Error ? cause.message : String(cause);
    throw new MemferryError('INVALID_ARGUMENT', `the guest's description is not JSON: ${why}`, { cause });
  }
  const bytes = json === undefined ? 0 : Buffer.byteLength(json);
  if (bytes <= maxDescriptionBytes) return;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `the guest's description has ${bytes} bytes of JSON; ${maxDescriptionBytes} are allowed`,
    { facts: { bytes, limit: maxDescriptionBytes } },
  );
}
