/**
 * A guest of QEMU's at the destination: a QEMU that waits (`-S -incoming defer`), whose RAM memferry fills and whose
 * pager serves it before QEMU loads the state of its devices, since that touches RAM. `cont` comes only with GRANT.
 */
import { memferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { Region } from '../region.js';
import { QemuAttachment, type QemuSockets } from './attachment.js';
import { ignoreSharedRam, loadDeviceState, restoreSettings, type Settings } from './device-state.js';
import { runState } from './inspect.js';
import { decodeState, descriptionSchema, qemuModule } from './state.js';

export interface QemuArrivalOptions extends QemuSockets {
  /** For QEMU to load the state; the listener's `prepareTimeoutMs` bounds it too. Default 10 s. */
  stateTimeoutMs?: number | undefined;
  /** The guest runs here. */
  onResumed?: (() => void) | undefined;
  /** Where no call can tell: QEMU has refused to go on, or ended. */
  onWarning?: ((error: Error) => void) | undefined;
}

/** What QEMU itself discards (a balloon) is told, and reads as zeros from then on. Or none of it. */
const pagingFeatures = [1n << 3n, 0n];

/** A QEMU that waits for a guest: `listen({ accept: destination.accept })`. It takes one; it is ended when that fails. */
export class QemuDestination implements AsyncDisposable {
  readonly #options: QemuArrivalOptions;
  #guest: ArrivingQemuGuest | null = null;
  #taken = false;

  constructor(options: QemuArrivalOptions) {
    this.#options = options;
  }

  /** Whether QEMU is there and waits, asked before a source is. @throws as `accept` */
  async check({ signal }: { signal?: AbortSignal } = {}): Promise<void> {
    const attachment = await QemuAttachment.open({ ...this.#options, signal }, pagingFeatures);
    try {
      await requireWaiting(attachment);
    } finally {
      await attachment.close();
    }
  }

  /**
   * @throws MODULE_REFUSED for a guest that is none of QEMU's; PREPARE_FAILED when QEMU was started otherwise than the
   *   source; GUEST_BUSY when it does not wait for a guest; GUEST_UNMOVABLE; as `QemuGuest.attach`
   */
  readonly accept = async (
    offer: GuestOffer,
    { signal }: { signal: AbortSignal },
  ): Promise<ArrivingGuest> => {
    if (this.#taken)
      throw memferryError('LIMIT_EXCEEDED', 'this QEMU has a guest already, or one is on its way');
    this.#taken = true;
    try {
      this.#guest = await ArrivingQemuGuest.accept(offer, { ...this.#options, signal });
      return this.#guest;
    } catch (error) {
      this.#taken = false;
      throw error;
    }
  };

  /** Lets go of QEMU, which goes on as it is. Not while a guest is on its way: close the listener first. */
  async close(): Promise<void> {
    await this.#guest?.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

async function requireWaiting({ qmp }: QemuAttachment): Promise<void> {
  const { status } = await runState(qmp);
  if (status === 'inmigrate') return;
  throw memferryError(
    'GUEST_BUSY',
    `QEMU is '${status}': start one that waits for a guest, with -S -incoming defer`,
    {
      facts: { names: [status] },
    },
  );
}

class ArrivingQemuGuest implements ArrivingGuest {
  readonly regions: readonly Region[];
  #settings: Settings | null = null;
  #runs = true;

  private constructor(
    private readonly attachment: QemuAttachment,
    private readonly options: QemuArrivalOptions,
  ) {
    this.regions = attachment.regions.map(({ region }) => region);
  }

  static async accept(offer: GuestOffer, options: QemuArrivalOptions): Promise<ArrivingQemuGuest> {
    const { module } = offer;
    if (module?.name !== qemuModule.name || module.sha256.toLowerCase() !== qemuModule.sha256) {
      throw memferryError(
        'MODULE_REFUSED',
        `'${offer.name}' is no guest of QEMU's; this listener takes no other`,
      );
    }
    const described = descriptionSchema.safeParse(offer.description);
    if (!described.success) throw memferryError('PROTOCOL_ERROR', "this is no description of a QEMU guest's");
    const attachment = await QemuAttachment.open(options, pagingFeatures);
    try {
      const guest = new ArrivingQemuGuest(attachment, options);
      await requireWaiting(attachment);
      const { machine, cpus } = described.data;
      const here = attachment.machine;
      checkAlike('machine', machine, here.type);
      checkAlike('number of CPUs', cpus, here.cpus);
      const backends = (list: readonly { id: string; lengthBytes: number }[]) =>
        list.map(({ id, lengthBytes }) => `${id} of ${lengthBytes} bytes`).join(', ');
      checkAlike(
        'memory backends',
        backends(offer.regions.map(({ name, lengthBytes }) => ({ id: name, lengthBytes }))),
        backends(here.backends),
      );
      // Disks are taken over with `cont`, not before: until then they may still be the source's.
      guest.#settings = await ignoreSharedRam(attachment.qmp, [
        'events',
        'x-ignore-shared',
        'late-block-activate',
      ]);
      return guest;
    } catch (error) {
      await attachment.close();
      throw error;
    }
  }

  async prepare(state: Uint8Array, { signal }: { signal: AbortSignal }): Promise<void> {
    const { qmp, uid } = this.attachment;
    const { running, stream } = decodeState(state);
    this.#runs = running;
    await loadDeviceState(qmp, stream, {
      maxBytes: stream.length,
      timeoutMs: this.options.stateTimeoutMs ?? 10_000,
      signal,
      uid,
    });
    const now = await runState(qmp, { signal });
    if (now.running) {
      throw memferryError('PREPARE_FAILED', 'QEMU runs the guest before it may: start it with -S');
    }
  }

  resume(): void {
    const { qmp } = this.attachment;
    if (!this.#runs) {
      this.options.onResumed?.();
      void this.#settle();
      return;
    }
    // QEMU has nothing left to do for it but to start the CPUs and to take the disks over.
    qmp.execute('cont', {}, { timeoutMs: 60_000 }).then(
      () => {
        this.options.onResumed?.();
        void this.#settle();
      },
      (error) => this.options.onWarning?.(error),
    );
  }

  /** Its memory is half filled, and what was missing may be poisoned: such a QEMU is of no use, and must never run. */
  async abandon(): Promise<void> {
    const { qmp } = this.attachment;
    await qmp.execute('quit').catch(() => {}); // it may have ended by itself
    await this.attachment.close();
  }

  async close(): Promise<void> {
    await this.attachment.close();
  }

  async #settle(): Promise<void> {
    if (this.#settings) await restoreSettings(this.attachment.qmp, this.#settings).catch(() => {});
  }
}

function checkAlike(what: string, there: string | number, here: string | number): void {
  if (there === here) return;
  throw memferryError(
    'PREPARE_FAILED',
    `QEMU was started with another ${what}: ${here}; the guest has ${there}`,
    {
      facts: { expected: there, got: here },
    },
  );
}
