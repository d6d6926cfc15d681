/**
 * The switchover: from the pause until all is there that PREPARE needs, when the commit's state machine goes on by
 * itself. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { PausedGuest } from '../guest.js';
import { untilAborted } from '../protocol/bounded.js';
import type { DestinationMessage, SourceMessage } from '../protocol/messages.js';
import type { CommitDriver } from './commit-driver.js';
import type { SourceEngine } from './engine.js';
import type { Measurements } from './measurements.js';

type Ready = Extract<DestinationMessage, { type: 'ready' }>;

export interface SwitchoverContext {
  commit: CommitDriver;
  measured: Measurements;
  signal: AbortSignal;
  send(message: SourceMessage, binary: Uint8Array): void;
  /** Memory that has grown before the guest stood. */
  followGrowth(): Promise<void>;
}

export class Switchover {
  #paused: PausedGuest | null = null;
  /** The destination's pager serves, and this side knows it; at once where nothing is paged. */
  #switched: Promise<unknown> = Promise.resolve();

  constructor(private readonly context: SwitchoverContext) {}

  /** Of the guest as it was paused. */
  get executionState(): Uint8Array {
    return this.#paused?.state ?? new Uint8Array(0);
  }

  /** The guest moves first, its pages follow. */
  async toPostCopy(engine: SourceEngine): Promise<void> {
    const { commit, measured, send, signal } = this.context;
    const { state } = await this.#pause();
    // On its way during the last scan. The destination prepares when the switch has reached it too: no need to wait for
    // its answer here.
    send({ type: 'state', paging: true }, state);
    const { switched } = engine.switchOver();
    this.#switched = switched;
    measured.scanned();
    commit.transferred();
    await untilAborted(switched, signal);
    measured.transferred();
  }

  /**
   * Every page goes before the guest does.
   * @param references false: nothing goes as a reference
   */
  async withEveryPage(engine: SourceEngine, references: boolean): Promise<void> {
    const { commit, measured, send, signal } = this.context;
    const { state } = await this.#pause();
    send({ type: 'state', paging: false }, state);
    engine.queueDirtyNow();
    measured.scanned();
    const before = engine.stats();
    const { suspects } = await untilAborted(engine.settle(references), signal);
    if (suspects > 0) {
      throw new MemferryError(
        'PROTOCOL_ERROR',
        `${suspects} pages of the paused guest arrived with checksums that do not fit: something still writes them`,
        { facts: { pages: suspects } },
      );
    }
    measured.finalRound(before, engine.stats());
    measured.transferred();
    commit.transferred();
  }

  /**
   * Never committed to a destination whose data connections have not answered: while they are cut this waits for them,
   * and the guest is still this side's when they do not come back.
   */
  onReady(ready: Ready): void {
    this.#switched.then(
      () => this.context.commit.ready(ready),
      () => {},
    );
  }

  async #pause(): Promise<PausedGuest> {
    const { commit, measured } = this.context;
    measured.pauseAsked();
    const paused = await commit.pause();
    measured.paused(paused.pausedAtNs);
    this.#paused = paused;
    await this.context.followGrowth();
    return paused;
  }
}
