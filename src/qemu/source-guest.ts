/**
 * A guest of QEMU's at the source: its RAM is QEMU's, tracked and read from here, its execution state is what QEMU's
 * own migration gives without the RAM. QEMU is asked for everything over QMP, as any management would.
 *
 *   running ── stop, migrate ─▶ stopped, state saved ── GRANT ─▶ never again ── evicted ─▶ quit
 *                                      └─ failed before the commit: migrate_cancel, cont ─▶ running
 */
import { EventEmitter } from 'node:events';
import { type MemferryError, memferryError } from '../errors.js';
import type { Guest, GuestRegion, PausedGuest } from '../guest.js';
import { type ResolvedQemuGuestOptions, resolveQemuGuestOptions } from '../options/qemu.js';
import { untilAborted } from '../protocol/bounded.js';
import { tellListeners } from '../tell-listeners.js';
import { QemuAttachment, type QemuSockets } from './attachment.js';
import {
  expectDeviceState,
  ignoreSharedRam,
  restoreSettings,
  type Settings,
  stopMigrating,
} from './device-state.js';
import { endQemu } from './end.js';
import { inspect, requireNoMigration, requireTrackableDisks, runState } from './inspect.js';
import type { Qmp, QmpEvent } from './qmp.js';
import { encodeState, type QemuDescription, qemuModule } from './state.js';

/** What `QemuGuest.attach` takes. */
export interface QemuGuestOptions extends QemuSockets {
  /** How it is called in reports and errors; QEMU's own name for it, or `qemu-PID`, without one. */
  name?: string | undefined;
  /** What the state of its CPUs and devices may have, in bytes. Default 64 MiB, as the destination's. */
  maxStateBytes?: number | undefined;
  /** For QEMU to stop the guest, and then to give its state, in ms each. Default 10 000. */
  stateTimeoutMs?: number | undefined;
  /** What becomes of QEMU when nobody needs it any more: `quit`, or it stays, stopped. Default `quit`. */
  afterwards?: 'quit' | 'stay' | undefined;
}

/** Only to track: write protection that the kernel itself lifts, and unpopulated pages too. Or none of it. */
const trackingFeatures = [(1n << 15n) | (1n << 13n), 0n];

/** Of a look at what QEMU is made of, in a mode without rounds. */
const freshMs = 5_000;
const contTimeoutMs = 10_000;
/** QEMU flushes its disks before it ends. */
const quitTimeoutMs = 30_000;

/**
 * A guest of QEMU's that runs, as `migrate` and `park` take it. Emits `warning` (Error): what went wrong where no call can
 * tell.
 */
export class QemuGuest extends EventEmitter implements Guest, AsyncDisposable {
  readonly name: string;
  readonly module = qemuModule;
  readonly #attachment: QemuAttachment;
  readonly #options: ResolvedQemuGuestOptions;
  #settings: Settings | null = null;
  #ranBefore = true;
  #rounds = true;
  /** When QEMU was last asked what it is made of: by attach, at first. */
  #lookedAt = performance.now();
  /** Under way, or done; a migration's failure may be known before the guest runs again. */
  #unpausing: Promise<void> = Promise.resolve();
  #pausing: Promise<unknown> = Promise.resolve();
  #removing: Promise<unknown> = Promise.resolve();
  /** Somebody else has let it run since it was paused: what was read of it is not what it is. */
  #resumedByOthers = false;
  #state: 'here' | 'pausing' | 'paused' | 'departed' = 'here';

  private constructor(attachment: QemuAttachment, name: string, options: ResolvedQemuGuestOptions) {
    super();
    this.#attachment = attachment;
    this.#options = options;
    this.name = name;
    attachment.qmp.on('event', (event: QmpEvent) => this.#onEvent(event));
  }

  /**
   * Of a QEMU that runs with the shim. Nothing of the guest is changed by it.
   * @throws INVALID_ARGUMENT; GUEST_UNMOVABLE with what is in the way by name, GUEST_BUSY, CONNECT_FAILED, USERFAULTFD_UNAVAILABLE
   */
  static async attach(given: QemuGuestOptions): Promise<QemuGuest> {
    const options = resolveQemuGuestOptions(given);
    const attachment = await QemuAttachment.open(options, { features: trackingFeatures });
    try {
      const { status } = await runState(attachment.qmp);
      if (status === 'postmigrate') {
        throw memferryError(
          'GUEST_BUSY',
          'QEMU has given its guest away to a migration before: if that guest runs nowhere else, let it go on (cont) first',
          { facts: { names: [status] } },
        );
      }
      if (status !== 'running' && status !== 'paused') {
        throw memferryError(
          'GUEST_BUSY',
          `QEMU is '${status}': only a guest that runs, or is paused, can move`,
          {
            facts: { names: [status] },
          },
        );
      }
      return new QemuGuest(attachment, options.name ?? (await nameOf(attachment)), options);
    } catch (error) {
      await attachment.close();
      throw error;
    }
  }

  get regions(): readonly GuestRegion[] {
    return this.#attachment.regions;
  }

  get description(): QemuDescription {
    const { qemu, type, cpus } = this.#attachment.machine;
    return { version: 1, qemu, machine: type, cpus };
  }

  /** Of QEMU. */
  get pid(): number {
    return this.#attachment.pid;
  }

  /** Devices and disks may have come since it was attached. */
  async check({ signal, rounds }: { signal: AbortSignal; rounds: boolean }): Promise<void> {
    // One that was cancelled may still be giving back what it has changed.
    await untilAborted(Promise.allSettled([this.#pausing, this.#unpausing]), signal);
    if (rounds || !this.#lookIsFresh()) {
      await this.#lookAgain({ signal, rounds });
      this.#lookedAt = performance.now();
    }
    // One that may not have rounds may still leave without any: what was agreed to before holds.
    this.#rounds = rounds;
  }

  /**
   * It was a moment ago, and nothing has been sent since: what has come in that time does not load at the destination. A look
   * takes 20 to 50 ms, in which nothing leaves.
   */
  #lookIsFresh(): boolean {
    return performance.now() - this.#lookedAt < freshMs;
  }

  async #lookAgain({ rounds, ...options }: { signal: AbortSignal; rounds: boolean }): Promise<void> {
    const { qmp, machine } = this.#attachment;
    const { backends } = await inspect(qmp, options);
    const ids = (list: readonly { id: string; lengthBytes: number }[]) =>
      list.map(({ id, lengthBytes }) => `${id} of ${lengthBytes} bytes`).join(', ');
    if (ids(backends) !== ids(machine.backends)) {
      throw memferryError(
        'GUEST_UNMOVABLE',
        `the RAM is another one than when it was attached: ${ids(backends)}`,
        {
          facts: { names: backends.map(({ id }) => id) },
        },
      );
    }
    if (rounds) await requireTrackableDisks(qmp, options);
  }

  pause(options: { signal: AbortSignal }): Promise<PausedGuest> {
    const before = [this.#pausing, this.#unpausing];
    const pausing = (async () => {
      // One that was cancelled puts back what it has changed: it must not do so under the next one's feet.
      await untilAborted(Promise.allSettled(before), options.signal);
      return this.#pause(options);
    })();
    this.#pausing = pausing;
    return pausing;
  }

  async #pause({ signal }: { signal: AbortSignal }): Promise<PausedGuest> {
    const { qmp, uid } = this.#attachment;
    const { maxStateBytes, stateTimeoutMs } = this.#options;
    // Outside: a migration of somebody else's is not to be cancelled.
    if (!this.#rounds && this.#lookIsFresh()) await requireNoMigration(qmp, { signal });
    else await this.#lookAgain({ signal, rounds: this.#rounds });
    this.#ranBefore = false; // until it is known: what was paused must not be let run
    this.#resumedByOthers = false;
    const state = await expectDeviceState(qmp, { maxBytes: maxStateBytes, uid });
    try {
      this.#settings ??= await ignoreSharedRam(qmp, ['events', 'x-ignore-shared']);
      this.#ranBefore = (await runState(qmp, { signal })).running;
      this.#state = 'pausing';
      const pausedAtNs = process.hrtime.bigint();
      // QEMU does one after the other: it has drained what its devices had under way when it begins with the state.
      const stopping = this.#ranBefore
        ? qmp.execute('stop', {}, { signal, timeoutMs: stateTimeoutMs })
        : undefined;
      const saving = state.save({ signal, timeoutMs: stateTimeoutMs * (stopping ? 2 : 1) });
      const [stopped, saved] = await Promise.allSettled([stopping, saving]);
      if (stopped.status === 'rejected') throw stopped.reason;
      if (saved.status === 'rejected') throw saved.reason;
      if (this.#resumedByOthers) throw resumedByOthers();
      this.#state = 'paused';
      return {
        state: encodeState(this.#ranBefore, saved.value),
        pausedAtNs,
        stillPaused: () => this.#requireStopped(),
      };
    } catch (error) {
      // The first reason is the one to tell.
      await this.unpause().catch((cause) => tellListeners(this, 'warning', cause));
      throw error;
    } finally {
      // The guest stands meanwhile: nobody waits for what is only to be removed.
      this.#removing = state.close().catch((error) => tellListeners(this, 'warning', error));
    }
  }

  unpause(): Promise<void> {
    this.#unpausing = this.#goOn();
    return this.#unpausing;
  }

  async #goOn(): Promise<void> {
    this.#state = 'here';
    const settings = this.#settings;
    this.#settings = null;
    let { qmp } = this.#attachment;
    let anew: Qmp | null = null;
    try {
      // An attachment that has lost its QEMU's ear: another connection may still have it.
      if (qmp.isClosed) qmp = anew = await this.#attachment.reconnect();
      const over = await this.#stopMigrating(qmp);
      const runs = this.#ranBefore || this.#resumedByOthers;
      if (runs) await letRun(qmp);
      // One that has hung may come to its migration only now, and end it by stopping the guest.
      if (!over && (await this.#stopMigrating(qmp)) && runs) await letRun(qmp);
    } finally {
      // Of less weight than that it runs.
      if (settings)
        await restoreSettings(qmp, settings).catch((error) => tellListeners(this, 'warning', error));
      await anew?.close();
    }
  }

  async #stopMigrating(qmp: Qmp): Promise<boolean> {
    try {
      await stopMigrating(qmp);
      return true;
    } catch (error) {
      tellListeners(this, 'warning', error as Error);
      return false;
    }
  }

  /** Events come before the answers to what is asked after them. */
  async #requireStopped(): Promise<void> {
    const { running } = await runState(this.#attachment.qmp);
    if (running || this.#resumedByOthers) throw resumedByOthers();
  }

  departed(): void {
    this.#state = 'departed';
  }

  async release(): Promise<void> {
    if (this.#options.afterwards === 'stay') return;
    await endQemu(this.#attachment, quitTimeoutMs).catch((error) => tellListeners(this, 'warning', error));
  }

  /** Lets go of QEMU, which goes on as it is: running, if the migration has failed. */
  async close(): Promise<void> {
    await this.#pausing.catch(() => {});
    await this.#unpausing.catch(() => {});
    await this.#removing;
    await this.#attachment.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** Somebody else lets it run: before the commit its pages have changed unseen, after it there would be two of it. */
  #onEvent({ name }: QmpEvent): void {
    if (name !== 'RESUME' || this.#state === 'here') return;
    const { qmp } = this.#attachment;
    this.#resumedByOthers ||= this.#state !== 'departed';
    qmp.execute('stop').catch(() => {});
    tellListeners(
      this,
      'warning',
      memferryError(
        'GUEST_BUSY',
        'somebody else has let the guest run at the source, and it was stopped again',
        {
          facts: { names: ['cont'] },
        },
      ),
    );
  }
}

function resumedByOthers(): MemferryError {
  return memferryError('GUEST_BUSY', 'somebody else has let the guest run while it moved', {
    facts: { names: ['cont'] },
  });
}

/** `cont` does nothing to a guest that runs, so that it may be said again. */
async function letRun(qmp: Qmp): Promise<void> {
  const until = Date.now() + contTimeoutMs;
  for (;;) {
    try {
      await qmp.execute('cont', {}, { timeoutMs: contTimeoutMs });
      return;
    } catch (error) {
      if (qmp.isClosed || Date.now() >= until) throw error;
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  }
}

async function nameOf({ qmp, pid }: QemuAttachment): Promise<string> {
  const said = (await qmp.execute('query-name').catch(() => null)) as { name?: unknown } | null;
  return typeof said?.name === 'string' && said.name !== '' ? said.name.slice(0, 64) : `qemu-${pid}`;
}
