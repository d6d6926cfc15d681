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
import { createImage } from '../staging/image-opening.js';
import type { ImageSet } from '../staging/image-set.js';
import { indexPages } from '../staging/placement.js';
import { chooseServers } from './choose-servers.js';
import { dedupDomainKey } from './dedup-domain.js';
import { checkIdentity } from './guest-identity.js';

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
}

/**
 * Null when no servers are used, by the caller's choice (`onCapacity: 'direct'`).
 * @throws INVALID_ARGUMENT for a guest of which nobody could be told
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
  const domainKey = await dedupDomainKey(options.dedup, secret);
  return whileOpening(signal, async (making) => {
    const connection = imageConnection(secret, options, making);
    const { servers, unanswered } = await chooseServers(options, connection, need, making);
    if (servers.length === 0) return null;
    return createImage(servers, unanswered, connection, {
      image,
      secret: makeImageSecret(),
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
    });
  });
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
