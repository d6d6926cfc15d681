/**
 * The native sender as promises. One waiter for each thing that can be waited for; a failure of the engine
 * rejects them all and every later call.
 */
import { loadAddon } from '../addon.js';
import { fromNativeEvent, type MemferryError } from '../errors.js';
import type {
  CompareDepth,
  NativeEvent,
  NativeSender,
  NativeSenderConfig,
  NativeSenderStats,
} from '../native.js';
import { type Deferred, deferred } from '../protocol/deferred.js';

export interface EngineListener {
  paused(): void;
  recovered(): void;
  failed(error: MemferryError): void;
}

export class SourceEngine {
  readonly #sender: NativeSender;
  readonly #waiters = new Map<string, Deferred<NativeEvent>>();
  #failure: MemferryError | null = null;
  #closed = false;
  #nextTag = 1;
  #lastStats: NativeSenderStats | null = null;

  constructor(config: Omit<NativeSenderConfig, 'onEvent'>, listener: EngineListener) {
    this.#sender = loadAddon().createSender({
      ...config,
      onEvent: (event) => this.#onEvent(event, listener),
    });
  }

  connect(): Promise<unknown> {
    const connected = this.#expect('connected');
    this.#sender.connect();
    return connected;
  }

  /** Every page is to be sent; finds out which were never touched. */
  queuePopulated(): Promise<void> {
    return this.#sender.queuePopulated();
  }

  queueDirty(): Promise<number> {
    return this.#sender.queueDirty();
  }

  /** On this thread: the final scan of a paused guest. */
  queueDirtyNow(): number {
    return this.#sender.queueDirtySync();
  }

  /**
   * Resolves when every page of the round is in the destination's memory; gives the suspect pages. With `references`
   * false none goes as a reference: one that comes to nothing costs a round trip.
   */
  async round(references = true): Promise<number> {
    const tag = this.#nextTag++;
    const done = this.#expect(`round-done ${tag}`);
    this.#sender.startRound(tag, references);
    return (await done).suspects;
  }

  /** Everyone has room for so many pages of a region that has grown. */
  toldGrowth(region: number, pages: number): void {
    this.#sender.toldGrowth(region, pages);
  }

  /** Sends bytes that nobody needs; resolves when they have arrived. */
  probe(bytes: number): Promise<unknown> {
    return this.#tagged((tag) => this.#sender.probe(tag, bytes));
  }

  compareBase(mostNodes: number, depth: CompareDepth): Promise<unknown> {
    return this.#tagged((tag) => this.#sender.compareBase(tag, mostNodes, depth));
  }

  endBase(drop: boolean): Promise<unknown> {
    return this.#tagged((tag) => this.#sender.endBase(tag, drop));
  }

  /**
   * Rounds of a paused guest until one leaves nothing: what a server took along that failed meanwhile goes again, as
   * often as servers can fail. Gives the suspect pages that are left all the same, and the servers (by ordinal) that had
   * failed before the last round: nothing of the guest is only with these.
   */
  async settle(references: boolean): Promise<{ suspects: number; failed: number[] }> {
    let failed = this.#failedServers();
    for (let tries = 0; ; tries++) {
      const suspects = await this.round(references);
      const now = this.#failedServers();
      if ((suspects === 0 && now.length === failed.length) || tries === this.stats().servers.length) {
        return { suspects, failed };
      }
      failed = now;
    }
  }

  #failedServers(): number[] {
    return this.stats().servers.flatMap(({ failed }, ordinal) => (failed === null ? [] : [ordinal]));
  }

  /** Has the destination forget what is dirty now; gives the number of pages. */
  async discardDirty(): Promise<number> {
    const tag = this.#nextTag++;
    const done = this.#expect(`round-done ${tag}`);
    const pages = await this.#sender.discardDirty(tag);
    await done;
    return pages;
  }

  /** The final scan and its discards on this thread; `switched` resolves when the destination's pager serves. */
  switchOver(): { pages: number; switched: Promise<unknown> } {
    const switched = this.#expect('switched');
    const pages = this.#sender.switchOver();
    return { pages, switched };
  }

  push(): Promise<unknown> {
    const evicted = this.#expect('evicted');
    this.#sender.startPush();
    return evicted;
  }

  /**
   * The same of a scatter. It is over when `kept` has said as well which servers do not keep what they hold: that goes
   * again, to others.
   */
  async pushToKeep(kept: Promise<readonly { ordinal: number; why: string }[]>): Promise<void> {
    this.#sender.holdEviction(true);
    const evicted = this.push();
    // While it is held it can only fail.
    for (const { ordinal, why } of await Promise.race([kept, evicted.then(() => [])])) {
      this.#sender.giveUpServer(ordinal, why);
    }
    this.#sender.holdEviction(false);
    await evicted;
  }

  stats(): NativeSenderStats {
    if (!this.#closed || !this.#lastStats) this.#lastStats = this.#sender.stats();
    return this.#lastStats;
  }

  digest(region: number): Promise<string> {
    return this.#sender.digest(region);
  }

  close(goodbye: boolean, reason: MemferryError): void {
    if (this.#closed) return;
    this.#lastStats = this.#sender.stats();
    this.#closed = true;
    this.#sender.close(goodbye);
    this.#rejectAll(reason);
  }

  #tagged(start: (tag: number) => void): Promise<unknown> {
    const tag = this.#nextTag++;
    const done = this.#expect(`round-done ${tag}`);
    start(tag);
    return done;
  }

  #expect(key: string): Promise<NativeEvent> {
    const waiter = deferred<NativeEvent>();
    if (this.#failure) waiter.reject(this.#failure);
    this.#waiters.set(key, waiter);
    return waiter.promise;
  }

  #rejectAll(error: MemferryError): void {
    this.#failure ??= error;
    for (const waiter of this.#waiters.values()) waiter.reject(error);
    this.#waiters.clear();
  }

  #onEvent(event: NativeEvent, listener: EngineListener): void {
    if (this.#closed) return;
    if (event.kind === 'failed') {
      const error = fromNativeEvent(event);
      this.#rejectAll(error);
      listener.failed(error);
    } else if (event.kind === 'paused') {
      listener.paused();
    } else if (event.kind === 'recovered') {
      listener.recovered();
    } else {
      const key = event.kind === 'round-done' ? `round-done ${event.tag}` : event.kind;
      this.#waiters.get(key)?.resolve(event);
      this.#waiters.delete(key);
    }
  }
}
