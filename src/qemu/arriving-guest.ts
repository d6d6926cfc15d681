/**
 * A guest of QEMU's at the destination: a QEMU that waits (`-S -incoming defer`), whose RAM memferry fills and whose
 * pager serves it before QEMU loads the state of its devices, since that touches RAM. `cont` comes only with GRANT.
 *
 *   coming ── prepared ── GRANT ─▶ granted: `cont`, until it is heard or the bound is reached
 *      └─ failed, or somebody else's `cont` before GRANT ─▶ over: this QEMU is ended
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { type MemferryError, memferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { type ResolvedQemuArrivalOptions, resolveQemuArrivalOptions } from '../options/qemu.js';
import { deferred } from '../protocol/deferred.js';
import type { Region } from '../region.js';
import { callOut } from '../tell-listeners.js';
import { QemuAttachment, type QemuSockets } from './attachment.js';
import {
  type IncomingState,
  ignoreSharedRam,
  placeForDeviceState,
  restoreSettings,
  type Settings,
} from './device-state.js';
import { endQemu } from './end.js';
import { runState } from './inspect.js';
import type { Qmp, QmpEvent } from './qmp.js';
import { decodeState, descriptionSchema, qemuModule } from './state.js';

/** What `QemuDestination` takes. */
export interface QemuArrivalOptions extends QemuSockets {
  /** For QEMU to load the state, in ms; the listener's `prepareTimeoutMs` bounds it too. Default 10 000. */
  stateTimeoutMs?: number | undefined;
  /** For QEMU to let the guest run once it is granted, in ms; asked again and again until then. Default 30 000. */
  resumeTimeoutMs?: number | undefined;
  /** The guest runs here. What it throws is a warning of the process. */
  onResumed?: (() => void) | undefined;
  /** Where no call can tell: QEMU does not let the guest run, or has ended. A warning of the process without it. */
  onWarning?: ((error: Error) => void) | undefined;
}

const contTimeoutMs = 10_000;
const firstPauseMs = 50;
const longestPauseMs = 1_000;
/** To end by itself, before SIGKILL. */
const quitTimeoutMs = 3_000;

/** What QEMU itself discards (a balloon) is told, and reads as zeros from then on. Or none of it. */
const attaching = { features: [1n << 3n, 0n], discards: true };

/** A QEMU that waits for a guest: `listen({ accept: destination.accept })`. It takes one; it is ended when that fails. */
export class QemuDestination implements AsyncDisposable {
  readonly #options: ResolvedQemuArrivalOptions;
  #guest: ArrivingQemuGuest | null = null;
  #taken = false;

  /** Nothing is opened yet; `check` and `accept` do. @throws INVALID_ARGUMENT */
  constructor(options: QemuArrivalOptions) {
    this.#options = resolveQemuArrivalOptions(options);
  }

  /** Whether QEMU is there and waits, asked before a source is. @throws as `accept` */
  async check({ signal }: { signal?: AbortSignal } = {}): Promise<void> {
    const attachment = await QemuAttachment.open({ ...this.#options, signal }, attaching);
    try {
      await requireWaiting(attachment);
    } finally {
      await attachment.close();
    }
  }

  /**
   * For `listen({ accept })`; it is bound to this object.
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

  /** Null: no guest was granted here yet. Settles when it runs; as `ArrivingGuest.running`. */
  get running(): Promise<void> | null {
    return this.#guest?.running ?? null;
  }

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
  readonly #broken = deferred<MemferryError>();
  readonly #onEvent = ({ name }: QmpEvent) => {
    if (name === 'RESUME' && this.#phase !== 'granted') this.#break(resumedByOthers());
  };
  #settings: Settings | null = null;
  #incoming: IncomingState | null = null;
  #removing: Promise<unknown> = Promise.resolve();
  #runs = true;
  #phase: 'coming' | 'granted' | 'over' = 'coming';
  #running: Promise<void> | null = null;

  private constructor(
    private readonly attachment: QemuAttachment,
    private readonly options: ResolvedQemuArrivalOptions,
  ) {
    this.regions = attachment.regions.map(({ region }) => region);
  }

  get broken(): Promise<MemferryError> {
    return this.#broken.promise;
  }

  get running(): Promise<void> | undefined {
    return this.#running ?? undefined;
  }

  static async accept(offer: GuestOffer, options: ResolvedQemuArrivalOptions): Promise<ArrivingQemuGuest> {
    const { module } = offer;
    if (module?.name !== qemuModule.name || module.sha256.toLowerCase() !== qemuModule.sha256) {
      throw memferryError(
        'MODULE_REFUSED',
        `'${offer.name}' is no guest of QEMU's; this listener takes no other`,
      );
    }
    const described = descriptionSchema.safeParse(offer.description);
    if (!described.success) throw memferryError('PROTOCOL_ERROR', "this is no description of a QEMU guest's");
    const attachment = await QemuAttachment.open(options, attaching);
    const guest = new ArrivingQemuGuest(attachment, options);
    try {
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
      guest.#incoming = await placeForDeviceState(attachment.qmp, attachment.uid);
      guest.#watch();
      return guest;
    } catch (error) {
      // It is as it was, and waits on for another guest.
      if (guest.#settings) await restoreSettings(attachment.qmp, guest.#settings).catch(() => {});
      await attachment.close();
      throw error;
    }
  }

  async prepare(state: Uint8Array, { signal }: { signal: AbortSignal }): Promise<void> {
    const { running, stream } = decodeState(state);
    this.#runs = running;
    const timeoutMs = this.options.stateTimeoutMs;
    if (!this.#incoming) throw memferryError('PREPARE_FAILED', 'QEMU has been given a state already');
    await this.#incoming.load(stream, { timeoutMs, signal });
    // That somebody else has let it run, QEMU would have told before this.
    this.#letGoOfState();
  }

  resume(): void {
    this.#phase = 'granted';
    const running = this.#letRun();
    this.#running = running;
    running.then(
      () => this.#tellResumed(),
      (error) => this.#warn(error),
    );
  }

  /** Its memory is half filled, and what was missing may be poisoned: such a QEMU is of no use, and must never run. */
  async abandon(): Promise<void> {
    this.#phase = 'over';
    this.#letGoOfState();
    try {
      // That it lives on, who abandons it has to know: its guest may be somebody else's next.
      await endQemu(this.attachment, quitTimeoutMs);
    } finally {
      await this.#removing;
      await this.attachment.close();
    }
  }

  async close(): Promise<void> {
    await this.#running?.catch(() => {});
    this.#letGoOfState();
    await this.#removing;
    await this.attachment.close();
  }

  /** Nobody waits for it while the guest stands. */
  #letGoOfState(): void {
    const incoming = this.#incoming;
    this.#incoming = null;
    if (incoming) this.#removing = incoming.close().catch((error) => this.#warn(error));
  }

  /** From here on it is the source's guest that this QEMU has: until GRANT nobody else's `cont` may reach it. */
  #watch(): void {
    const { qmp, process: owner } = this.attachment;
    qmp.on('event', this.#onEvent);
    void qmp.closed.then(() => {
      if (this.#phase !== 'coming') return;
      const what = owner.alive() ? 'has closed its QMP socket, and was ended' : 'has ended';
      this.#break(memferryError('OWNER_GONE', `QEMU (process ${owner.pid}) ${what}`));
    });
  }

  /**
   * Ends QEMU at once: while it lives its guest could run, and then there would be two of it as soon as the source's
   * runs on.
   */
  #break(reason: MemferryError): MemferryError {
    this.attachment.process.end();
    this.#broken.resolve(reason);
    return reason;
  }

  /** Not given up at the first refusal: a disk's lock may still be the source's for a moment, QMP another's. */
  async #letRun(): Promise<void> {
    const { process: owner } = this.attachment;
    let { qmp } = this.attachment;
    let anew: Qmp | null = null;
    const deadline = performance.now() + this.options.resumeTimeoutMs;
    try {
      for (let pauseMs = firstPauseMs; this.#runs; pauseMs = Math.min(2 * pauseMs, longestPauseMs)) {
        try {
          if (qmp.isClosed) qmp = anew = await this.attachment.reconnect();
          // It does nothing to a guest that runs, so that it may be said again.
          await qmp.execute('cont', {}, { timeoutMs: contTimeoutMs });
          break;
        } catch (cause) {
          if (!owner.alive()) {
            throw memferryError(
              'GUEST_LOST',
              `QEMU (process ${owner.pid}) has ended before it let the guest run, which was granted to it`,
              { cause },
            );
          }
          if (performance.now() >= deadline) {
            throw memferryError(
              'RESUME_FAILED',
              `QEMU (process ${owner.pid}) does not let the guest run: ${(cause as Error).message}. The guest is here ` +
                "and nowhere else, stopped, its memory served: remove the cause and send 'cont' over QMP",
              { cause, facts: { pid: owner.pid } },
            );
          }
        }
        await sleep(pauseMs);
      }
      if (this.#settings) await restoreSettings(qmp, this.#settings).catch((error) => this.#warn(error));
    } finally {
      await anew?.close();
    }
  }

  /** The guest runs, whatever its owner makes of that. */
  #tellResumed(): void {
    callOut({ what: 'the guest runs, and onResumed', code: 'MEMFERRY_RESUME_THREW' }, this.options.onResumed);
  }

  #warn(error: Error): void {
    const code = 'MEMFERRY_RESUME_FAILED';
    const unheard = () => process.emitWarning(error.message, { code });
    const { onWarning } = this.options;
    if (onWarning) callOut({ what: 'onWarning', code, failed: unheard }, onWarning, error);
    else unheard();
  }
}

function resumedByOthers(): MemferryError {
  return memferryError(
    'GUEST_BUSY',
    'somebody else has let the guest run at the destination before it was granted; that QEMU was ended',
    { facts: { names: ['cont'] } },
  );
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
