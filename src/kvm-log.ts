/**
 * Dirty tracking of a KVM guest's RAM by KVM's own log. A VMM names its VM and slots at the guest's region
 * (`GuestRegion.tracker`), and then either marks what it writes itself or lets another tracker find it: the log has only
 * what vCPUs write, and what KVM writes for them.
 */
import { markAsUntransferable } from 'node:worker_threads';

import { loadAddon } from './addon.js';
import { checkOptions } from './check-options.js';
import { memferryError, native } from './errors.js';
import type { NativeWriteMarks } from './native.js';
import type { Region } from './region.js';
import type { TrackerName } from './trackers.js';

/** A memory slot of a VM, and the part of the region that it maps. */
export interface KvmSlot {
  /** As in KVM_SET_USER_MEMORY_REGION (the address space in its upper 16 bits); KVM_MEM_LOG_DIRTY_PAGES is set. */
  slot: number;
  /** The first of the region's pages that the slot maps. Default 0. */
  first?: number;
  /** How many of them, contiguous in memory: all that the slot maps. Default: to the region's end. */
  count?: number;
}

/** Says that a region is the RAM of a KVM guest (`GuestRegion.tracker`), and where its log is. */
export interface KvmLog {
  /** Always this. */
  kind: 'kvm-log';
  /** The VM's descriptor, of this process. It is duplicated. */
  vmFd: number;
  /** One at least; together they map the whole region. */
  slots: readonly KvmSlot[];
  /**
   * The VMM's word that it marks here whatever it writes into the RAM itself, or has the kernel write (`read` into guest
   * memory). Without marks another tracker watches the same memory too, which is safe and costs what both cost.
   */
  marks?: WriteMarks;
  /** Which other tracker, where there are no marks; default the first that works. */
  others?: TrackerName;
  /**
   * Reading the log and protecting pages again are two steps where KVM can (Linux 5.2): KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
   * is turned on for the VM and stays on. False: the VM has it off, and it stays off. Default true.
   */
  manualProtect?: boolean;
}

/** One bit for each page of a region: what a VMM has written. */
export class WriteMarks {
  /** The addon's handle; for the parts of memferry that drive engines. */
  readonly native: NativeWriteMarks;
  /**
   * For a VMM in another addon: page p is bit `p % 64` of word `p / 64`, to be set by an atomic OR after the write, by
   * any thread. Whoever writes there holds a reference to this array.
   */
  readonly words: BigUint64Array;

  /** For every page that the region may have (its capacity); none is marked. @throws REGION_CLOSED, NO_MEMORY */
  constructor(region: Region) {
    this.native = native(() => new (loadAddon().WriteMarks)(region.capacityBytes / region.pageSize));
    const buffer = native(() => this.native.words());
    markAsUntransferable(buffer);
    this.words = new BigUint64Array(buffer);
  }

  /** After the write. @throws INVALID_ARGUMENT beyond the region */
  mark(first: number, count = 1): void {
    native(() => this.native.mark(first, count));
  }
}

/** @throws INVALID_ARGUMENT */
export function checkKvmLog(log: KvmLog): void {
  checkOptions(log, 'kvm-log', ['kind', 'vmFd', 'slots', 'marks', 'others', 'manualProtect']);
  const { kind, vmFd, marks, manualProtect = true } = log;
  const wrong = (why: string) => memferryError('INVALID_ARGUMENT', `kvm-log: ${why}`);
  if (kind !== 'kvm-log') throw wrong("kind is 'kvm-log'");
  if (!Number.isInteger(vmFd) || vmFd < 0 || vmFd > 0x7fffffff) throw wrong('vmFd is no descriptor');
  if (marks !== undefined && typeof Object(marks).native?.mark !== 'function')
    throw wrong('marks: expected WriteMarks');
  if (typeof manualProtect !== 'boolean') throw wrong('manualProtect is true or false');
}

/** The slots as they cross the boundary: triples [slot, first page, pages]. */
export function slotTriples(region: Region, { slots }: KvmLog): Float64Array {
  if (!Array.isArray(slots) || slots.length === 0) {
    throw memferryError('INVALID_ARGUMENT', 'kvm-log: slots: the RAM is in one at least');
  }
  return Float64Array.from(
    slots.flatMap(({ slot, first = 0, count = region.pages - first }) => {
      if (
        ![slot, first, count].every((value) => Number.isSafeInteger(value) && value >= 0) ||
        slot >= 2 ** 32
      ) {
        throw memferryError('INVALID_ARGUMENT', `kvm-log: no slot ${slot} with ${count} pages from ${first}`);
      }
      return [slot, first, count];
    }),
  );
}
