/**
 * What Firecracker says of a microVM's memory when it restores a snapshot by userfaultfd: one JSON array, an object a
 * region of guest memory. Pure.
 *
 *   [{"base_host_virt_addr":140234567680,"size":1073741824,"offset":0,"page_size":4096,"page_size_kib":4096}]
 *
 * `page_size` is in bytes, and so is `page_size_kib`, whatever its name says; releases before `page_size` send that
 * alone, older ones neither. `offset` is where the region's content lies in the snapshot's memory file.
 */
import { z } from 'zod';
import { memferryError } from '../errors.js';

/** A piece of a microVM's memory. */
export interface GuestMapping {
  /** Where it is mapped in Firecracker. */
  address: bigint;
  /** Whole pages. */
  lengthBytes: number;
  /** Where its content lies in the snapshot. */
  offset: number;
}

/** Where a microVM's memory is. */
export interface GuestMemory {
  /** In Firecracker's order. */
  mappings: GuestMapping[];
  /** In bytes: 4096, or 2 MiB. */
  pageSize: number;
  /** Of all mappings together. */
  lengthBytes: number;
}

/** Of one message: thousands of regions fit, Firecracker sends one or two. */
export const MOST_MESSAGE_BYTES = 2 ** 20;
const mostMappings = 4096;
const pageSizes = [4096, 2 ** 21];
/** A process's own addresses end here: exact as JavaScript numbers. */
const mostAddress = process.arch === 'arm64' ? 2 ** 52 : 2 ** 47;

// JSON.parse rounds what is above 2^53, and the result is no safe integer: it is refused, never rounded.
const bytes = z.int().nonnegative();
const schema = z
  .array(
    z.object({
      base_host_virt_addr: bytes,
      size: bytes.positive(),
      offset: bytes,
      page_size: bytes.optional(),
      page_size_kib: bytes.optional(),
    }),
  )
  .min(1)
  .max(mostMappings);

/** Whether a message of several pieces may be whole: cheap, and only a hint where strings hold brackets. */
export function mayBeWhole(message: Buffer): boolean {
  const text = message.subarray(-64).toString('latin1').trimEnd();
  if (!text.endsWith(']')) return false;
  try {
    JSON.parse(message.toString('utf8'));
    return true;
  } catch {
    return false;
  }
}

/** @throws PROTOCOL_ERROR, with what is wrong */
export function parseMappings(message: Buffer): GuestMemory {
  let value: unknown;
  try {
    value = JSON.parse(message.toString('utf8'));
  } catch (cause) {
    throw memferryError('PROTOCOL_ERROR', 'the description of the guest memory is no JSON', { cause });
  }
  const parsed = schema.safeParse(value);
  if (!parsed.success) {
    const [issue] = parsed.error.issues;
    const at = issue?.path.map(String).join('.') || 'the message';
    throw wrong(`${at}: ${issue?.message ?? 'malformed'}`);
  }
  const regions = parsed.data;
  const sizes = new Set(regions.map((region, index) => pageSizeOf(region, index)));
  const [pageSize] = sizes;
  if (sizes.size !== 1 || pageSize === undefined) throw wrong('regions of several page sizes');
  if (!pageSizes.includes(pageSize)) throw wrong(`pages of ${pageSize} bytes; 4096 or 2097152 are known`);
  let lengthBytes = 0;
  const mappings = regions.map((region, index) => {
    const { base_host_virt_addr: address, size, offset } = region;
    for (const [name, amount] of Object.entries({ base_host_virt_addr: address, size, offset }))
      if (amount % pageSize !== 0) throw wrong(`region ${index}: ${name} ${amount} is not in whole pages`);
    if (address === 0 || address + size > mostAddress)
      throw wrong(`region ${index}: 0x${address.toString(16)} and ${size} bytes are no memory of a process`);
    if (!Number.isSafeInteger(offset + size)) throw wrong(`region ${index}: offset ${offset} is too far`);
    lengthBytes += size;
    return { address: BigInt(address), lengthBytes: size, offset };
  });
  if (!Number.isSafeInteger(lengthBytes)) throw wrong('more memory than there is');
  const sorted = [...mappings].sort((a, b) => (a.address < b.address ? -1 : 1));
  sorted.forEach(({ address }, index) => {
    const before = sorted[index - 1];
    if (before && before.address + BigInt(before.lengthBytes) > address)
      throw wrong(`regions overlap at 0x${address.toString(16)}`);
  });
  return { mappings, pageSize, lengthBytes };
}

/** @throws INVALID_ARGUMENT when the snapshot does not hold all of it */
export function checkWithin(memory: GuestMemory, snapshotBytes: number): void {
  memory.mappings.forEach(({ offset, lengthBytes }, index) => {
    if (offset + lengthBytes > snapshotBytes) {
      throw memferryError(
        'INVALID_ARGUMENT',
        `region ${index} needs bytes ${offset} to ${offset + lengthBytes} of a snapshot of ${snapshotBytes}`,
        { facts: { index, offset, lengthBytes, snapshotBytes } },
      );
    }
  });
}

/**
 * The mappings in the order of their offsets: they must make up [0, length) without a gap, for a guest whose memory is
 * one region.
 * @throws INVALID_ARGUMENT
 */
export function asOneRegion(memory: GuestMemory, regionBytes: number): GuestMapping[] {
  const sorted = [...memory.mappings].sort((a, b) => a.offset - b.offset);
  let next = 0;
  for (const { offset, lengthBytes } of sorted) {
    if (offset !== next) break;
    next += lengthBytes;
  }
  if (next !== memory.lengthBytes || next !== regionBytes) {
    throw memferryError(
      'INVALID_ARGUMENT',
      `the microVM's memory (${memory.lengthBytes} bytes) is not that of the guest (${regionBytes} bytes in one piece)`,
      { facts: { microVmBytes: memory.lengthBytes, guestBytes: regionBytes } },
    );
  }
  return sorted;
}

function pageSizeOf(
  region: { page_size?: number | undefined; page_size_kib?: number | undefined },
  index: number,
): number {
  const { page_size: size, page_size_kib: legacy } = region;
  if (size !== undefined && legacy !== undefined && size !== legacy)
    throw wrong(`region ${index}: page_size ${size} and page_size_kib ${legacy} differ`);
  return size ?? legacy ?? 4096;
}

function wrong(what: string) {
  return memferryError('PROTOCOL_ERROR', `the description of the guest memory makes no sense: ${what}`);
}
