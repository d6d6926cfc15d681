/**
 * The guest as memferry sees it: one region, which is all of the VM's RAM, and the vCPU's registers as the execution
 * state. This is the glue that a VMM writes.
 */
import {
  type ArrivingGuest,
  type Doctor,
  doctor,
  type Guest,
  type GuestOffer,
  type GuestRegion,
  type MigrateOptions,
  type Migration,
  migrate,
  type PausedGuest,
  Region,
  WriteMarks,
} from 'memferry';
import { Vm } from './vmm.js';

/** From here on the memory is the guest's to sweep over; guest.S has the same numbers. */
const leastBytes = 0x10000 + 16 * 4096;
const mostBytes = 2 ** 31;

/** Of a userfaultfd that serves the kernel's faults; looked at once. */
let known: Doctor['features'][number] | undefined;
function userfaultfd() {
  known ??= doctor().features.find(({ name }) => name === 'userfaultfd');
  return known ?? { available: false, reason: 'no userfaultfd', remedy: '' };
}

export class KvmGuest implements Guest {
  readonly module = null;
  readonly regions: readonly GuestRegion[];
  readonly vm: Vm;
  readonly #region: Region;

  /** A guest that stands, without a program. `console`: a descriptor to which each count is appended, or -1. */
  constructor(
    readonly name: string,
    ramBytes: number,
    console: number,
  ) {
    this.#region = Region.allocate({ lengthBytes: ramBytes });
    try {
      const marks = new WriteMarks(this.#region);
      this.vm = new Vm(this.ram, marks.words, console);
      // KVM's log knows what the vCPU writes; what the VMM's device writes it marks itself.
      const tracker = { kind: 'kvm-log', vmFd: this.vm.fd, slots: [{ slot: 0 }], marks } as const;
      this.regions = [{ name: 'ram', region: this.#region, tracker }];
    } catch (error) {
      this.#region.close();
      throw error;
    }
  }

  static boot(name: string, ramBytes: number, console: number): KvmGuest {
    const guest = new KvmGuest(name, ramBytes, console);
    guest.vm.boot();
    guest.vm.run();
    return guest;
  }

  get ram(): Uint8Array {
    return this.#region.views[0] as Uint8Array;
  }

  /** Logging costs the guest a fault for each page, so it is on only while the guest moves. */
  migrate(options: MigrateOptions): Migration {
    this.vm.logWrites(true);
    const migration = migrate(this, options);
    // In doubt it has failed as well, and may go on: then the guest is neither released nor here.
    migration.on('state', (state) => {
      if (!['completed', 'failed', 'cancelled'].includes(state)) return;
      if (this.#released) this.close();
      else if (!this.#closed) this.vm.logWrites(false);
    });
    return migration;
  }

  // ---- the source's side

  async pause(): Promise<PausedGuest> {
    const pausedAtNs = await this.vm.pause();
    return { state: this.vm.save(), pausedAtNs };
  }

  unpause(): void {
    this.vm.run();
  }

  #released = false;

  /**
   * The guest is the destination's. The memory is the migration's until it has ended, well or not: then `migrate`
   * above closes it.
   */
  release(): void {
    this.#released = true;
    this.vm.close();
  }

  // ---- the destination's side

  /** What `listen` takes as `accept`: makes room for the guest, and a VM around it. */
  static accept(offer: GuestOffer, console: number, arrived: (guest: KvmGuest) => void): ArrivingGuest {
    const [ram] = offer.regions;
    if (offer.regions.length !== 1 || !ram || offer.module !== null)
      throw new Error('this is no guest of this VMM');
    if (
      ram.lengthBytes < leastBytes ||
      ram.lengthBytes > mostBytes ||
      ram.lengthBytes !== ram.capacityBytes
    ) {
      throw new Error(`a guest with ${ram.lengthBytes} bytes of RAM is none of this VMM`);
    }
    // KVM would fail at the first page that is missing, and the guest would be lost: so not after the commit.
    const { available, reason, remedy } = userfaultfd();
    if (!available) throw new Error(`KVM waits for pages in the kernel: ${reason} (${remedy})`);
    const guest = new KvmGuest(offer.name, ram.lengthBytes, console);
    arrived(guest);
    return {
      regions: [guest.#region],
      // Everything that can fail. The state comes from elsewhere, and is checked there.
      prepare: async (state) => guest.vm.load(state),
      resume: () => guest.vm.run(),
      abandon: () => guest.close(),
      // Told before they are poisoned: the guest stops where it is, and never sees one.
      lost: () => void guest.vm.pause().catch(() => {}),
    };
  }

  #closed = false;

  close(): void {
    if (this.#closed) return;
    this.vm.close();
    this.#region.close();
    this.#closed = true;
  }
}
