/**
 * What `Region.attach` takes, checked before the addon sees it: memory of another process.
 */
import { loadAddon } from './addon.js';
import { checkOptions } from './check-options.js';
import { memferryError } from './errors.js';
import type { NativeMapping } from './native.js';

/** A piece of memory of another process. */
export interface AttachedMapping {
  /** Where it is mapped in the other process; at a page boundary. */
  address: bigint;
  /** A positive multiple of the page size. */
  lengthBytes: number;
  /** Where it lies in `memory`; at a page boundary. Default: behind the mappings before it. */
  offset?: number;
}

/** What `Region.attach` takes. */
export interface AttachOptions {
  /** A pidfd of the process that owns the memory. It is duplicated, like the other descriptors: yours stays yours. */
  pidfd: number;
  /**
   * A userfaultfd that the owner has made for its memory: to page into it, and to track it by write protection (then
   * with WP_ASYNC among its features). Made without UFFDIO_API yet, it gets all that memferry uses. The owner should keep
   * a duplicate: when the last one is closed, pages that are missing read as zeros.
   */
  uffd?: number;
  /** The memory, in the order of its pages; at most 4096 pieces that do not overlap. */
  mappings: readonly AttachedMapping[];
  /**
   * The file on tmpfs or hugetlbfs (a memfd, /dev/shm) that is mapped there, shared. Without it the memory is private.
   * Mappings of huge pages begin and end at one, and so does their `offset`.
   */
  memory?: number;
  /** If given, it must be what the region will have: the system's page size, huge pages or not. */
  pageSize?: number;
}

const mostMappings = 4096;
const mostAddress = 1n << 64n;

export interface CheckedAttachment {
  pidfd: number;
  uffd: number | null;
  mappings: NativeMapping[];
  memory: number | null;
}

/** @throws INVALID_ARGUMENT, with what is wrong */
export function checkAttachment(options: AttachOptions): CheckedAttachment {
  checkOptions(options, 'Region.attach', ['pidfd', 'uffd', 'mappings', 'memory', 'pageSize']);
  const { pageSize } = loadAddon();
  const given = options.pageSize ?? pageSize;
  if (given !== pageSize) wrong(`pageSize is ${given}, and memory moves here in pages of ${pageSize} bytes`);
  if (!Array.isArray(options.mappings) || options.mappings.length === 0) wrong('there is no mapping');
  if (options.mappings.length > mostMappings) wrong(`there are more than ${mostMappings} mappings`);
  const memory = descriptor(options.memory, 'memory');
  let next = 0;
  const mappings = options.mappings.map((mapping, index) => {
    const { address, lengthBytes, offset = next } = Object(mapping) as AttachedMapping;
    const what = `mappings[${index}]`;
    if (typeof address !== 'bigint' || address < 0n || address >= mostAddress)
      wrong(`${what}.address is no address`);
    if (address % BigInt(pageSize) !== 0n) wrong(`${what}.address is not at a page boundary`);
    if (!wholePages(lengthBytes, pageSize) || lengthBytes === 0)
      wrong(`${what}.lengthBytes is not a positive multiple of the page size (${pageSize})`);
    if (address + BigInt(lengthBytes) > mostAddress) wrong(`${what} reaches beyond the address space`);
    if (!wholePages(offset, pageSize)) wrong(`${what}.offset is not at a page boundary`);
    next = offset + lengthBytes;
    return { address, lengthBytes, offset };
  });
  const byAddress = [...mappings].sort((a, b) => (a.address < b.address ? -1 : 1));
  byAddress.forEach(({ address }, index) => {
    const before = byAddress[index - 1];
    if (before && before.address + BigInt(before.lengthBytes) > address)
      wrong(`two mappings overlap at 0x${address.toString(16)}`);
  });
  const pidfd = descriptor(options.pidfd, 'pidfd');
  if (pidfd === null) wrong('pidfd is missing');
  return { pidfd, uffd: descriptor(options.uffd, 'uffd'), mappings, memory };
}

function descriptor(value: number | undefined, what: string): number | null {
  if (value === undefined || value === null) return null;
  if (!Number.isInteger(value) || value < 0 || value > 0x7fffffff) wrong(`${what} is no descriptor`);
  return value;
}

function wholePages(bytes: number, pageSize: number): boolean {
  return Number.isSafeInteger(bytes) && bytes >= 0 && bytes % pageSize === 0;
}

function wrong(message: string): never {
  throw memferryError('INVALID_ARGUMENT', `Region.attach: ${message}`);
}
