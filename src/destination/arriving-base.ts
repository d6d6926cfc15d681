/**
 * The base of one arrival: laid out by base.ts, while source and receiver are told how far it is. The source's side of
 * it is source/start-from-base.ts. JavaScript thread.
 */
import type { ArrivingGuest } from '../guest.js';
import type { NativeReceiver, NativeReceiverConfig } from '../native.js';
import { within } from '../protocol/bounded.js';
import type { DestinationMessage } from '../protocol/messages.js';
import { BaseFilling } from './base.js';

export interface ArrivingBaseListener {
  tell(message: DestinationMessage): void;
  /** It could not even be given up. */
  failed(error: unknown): void;
}

export class ArrivingBase {
  /** How many pages of each region start from it. */
  readonly pages: number[];
  readonly #filling: BaseFilling;
  #closed = false;

  constructor(
    guest: Pick<ArrivingGuest, 'regions' | 'bases' | 'replay'>,
    kinds: NonNullable<NativeReceiverConfig['bases']>,
    replayLog: Uint8Array | null,
    receiver: NativeReceiver,
    listener: ArrivingBaseListener,
  ) {
    this.pages = kinds.map((kind, index) => (kind === 'none' ? 0 : (guest.regions[index]?.pages ?? 0)));
    this.#filling = new BaseFilling(guest, replayLog, (progress) => {
      if (this.#closed) return;
      if (progress.sampled) receiver.baseSampled(!progress.replays);
      listener.tell({ type: 'base-progress', ...progress });
    });
    this.#filling.outcome.then(
      ({ ready, problem, fillMs, replayMs }) => {
        if (this.#closed) return;
        receiver.baseReady();
        const said = problem?.slice(0, 1024) ?? null;
        listener.tell({ type: 'base-ready', ready, problem: said, fillMs, replayMs });
      },
      (error) => listener.failed(error),
    );
  }

  /** Settles when nothing writes a base or applies a log any more. */
  get filled(): Promise<unknown> {
    return this.#filling.outcome;
  }

  skipReplay(): void {
    this.#filling.skipReplay();
  }

  /** It ends soon. */
  stop(): void {
    this.#filling.stop();
  }

  /** Tells nobody any more. */
  close(): void {
    this.#closed = true;
  }

  /** What still writes the regions is told to stop, and waited for: their owner lets go of them next. */
  async stopped(timeoutMs: number): Promise<void> {
    this.stop();
    const late = 'the base was still being laid out';
    await within(this.#filling.outcome, timeoutMs, 'PREPARE_TIMEOUT', late).catch(() => {});
  }
}
