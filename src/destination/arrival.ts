/**
 * One guest on its way in, as the destination sees it: the engine receives, the commit's state machine says
 * what READY, GRANT and a lost connection mean, this file carries it out. JavaScript thread; nothing here is
 * needed for a page fault to be served.
 */
import { EventEmitter } from 'node:events';
import { markArriving, markReported } from '../arrivals.js';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { NativeListener, NativeRun } from '../native.js';
import type { ResolvedListenOptions } from '../options.js';
import { untilAborted, within } from '../protocol/bounded.js';
import {
  type DestinationAction,
  type DestinationEvent,
  type DestinationState,
  initialDestination,
  stepDestination,
} from '../protocol/commit-destination.js';
import { deferred } from '../protocol/deferred.js';
import { agreedEncodings, decodedHere, encodingFlags } from '../protocol/encodings.js';
import { inherit } from '../lineage.js';
import { InTurn } from '../protocol/in-turn.js';
import type { DestinationMessage, OfferMessage, SourceMessage } from '../protocol/messages.js';
import { fromPeer, toPeer } from '../protocol/peer-error.js';
import { NamedTimers } from '../protocol/timers.js';
import type { Region } from '../region.js';
import type { ImageSet } from '../staging/image-set.js';
import type { ArrivalReport, MigrationState } from '../report.js';
import { tellListeners } from '../tell-listeners.js';
import { arrivalReport, pagesLost, resumeHere } from './arrived.js';
import { BaseFilling, basesOf } from './base.js';
import { DestinationEngine } from './engine.js';

/** Pages named in one report of a loss; the rest is counted only. */
const maxLostRuns = 4096;

/** How long an arrival that has everything waits, when it is closed, for the source to say that it knows. */
const farewellMs = 2000;

/** The control connection, as far as an arrival cares. */
export interface ArrivalLink {
  /** Tells one connection from another. */
  readonly channel: object;
  send(message: DestinationMessage): void;
  close(): Promise<void>;
}

export interface ArrivalConfig {
  offer: OfferMessage;
  /** The same as the guest's owner was given it. */
  given: GuestOffer;
  guest: ArrivingGuest;
  listener: NativeListener;
  link: ArrivalLink;
  tokens: Uint8Array;
  /** 64 bytes: for comparing a base. */
  baseKey: Uint8Array;
  /** What the regions start from: the guest's own word, or the listener's. */
  bases: ArrivingGuest['bases'];
  options: ResolvedListenOptions;
  /** Scatter modes: the servers that hold a part of the guest. */
  images: ImageSet | null;
  /** Whose pages count as known here, where that was agreed on with the source. */
  known: { key: Uint8Array; share: string | null } | null;
  /** So many bytes more are about to be taken; throws when they may not be. */
  grows(bytes: number): void;
  /** The commit has an outcome: remember it. */
  decided(state: DestinationState): void;
  /** Nothing is left of the arrival here. */
  ended(): void;
}

export class Arrival extends EventEmitter {
  readonly id: string;
  readonly offer: GuestOffer;
  readonly guest: ArrivingGuest;
  readonly #executionState = deferred<Uint8Array>();
  /** Said with the execution state: the switch to post-copy comes before `prepare`. */
  #awaitsSwitch = false;
  readonly #resumed = deferred<void>();
  readonly #complete = deferred<ArrivalReport>();
  /** Nothing here holds the regions any more. */
  readonly #over = deferred<void>();
  readonly #everyPage = deferred<void>();
  /** The source has its account, or asks for none any more. */
  readonly #accounted = deferred<void>();
  readonly #engine: DestinationEngine;
  readonly #timers: NamedTimers<'grant' | 'linger'>;
  readonly #prepareAbort = new AbortController();
  readonly #migration: Uint8Array;
  /** How many pages of each region start from a base; null: none does. */
  readonly basePages: number[] | null;
  readonly #filling: BaseFilling | null;
  #link: ArrivalLink | null;
  #commit: DestinationState = initialDestination();
  readonly #events = new InTurn<DestinationEvent>((event) => {
    const { state, actions } = stepDestination(this.#commit, event);
    const decided =
      state.phase !== this.#commit.phase && (state.phase === 'resumed' || state.phase === 'abandoned');
    this.#commit = state;
    if (decided) this.config.decided(state);
    for (const action of actions) this.#carryOut(action);
  });
  #state: MigrationState = 'setup';
  #prepareMs = 0;
  #gatherMs = 0;
  #verified: boolean | null = null;
  #error: MemferryError | null = null;
  #notRunning: string | null | Promise<string | null> = null;
  /** Complete, as far as the migration goes; who runs the guest may still have to say that it does. */
  #finished = false;
  #lostRuns: NativeRun[] = [];
  #resting = false;
  /** The image is let go of: at its servers, then the connections to them. */
  #dissolving: Promise<void> | null = null;
  #allHere = false;
  #closed = false;
  #abandoning: Promise<void> | null = null;
  #ending: Promise<void> | null = null;

  constructor(private readonly config: ArrivalConfig) {
    super();
    const { offer, guest, options } = config;
    this.id = offer.migrationId;
    this.offer = config.given;
    this.guest = guest;
    this.#link = config.link;
    this.#migration = Buffer.from(offer.migrationId, 'hex');
    this.#timers = new NamedTimers(
      { grant: options.grantTimeoutMs, linger: options.recoverTimeoutMs },
      (timer) => (timer === 'grant' ? this.#dispatch({ type: 'timer', timer }) : void this.#end()),
    );
    const bases = offer.base ? basesOf({ regions: guest.regions, bases: config.bases }) : null;
    this.#engine = new DestinationEngine(
      {
        regions: guest.regions.map((region) => region.native),
        migration: this.#migration,
        channels: offer.channels,
        tokens: config.tokens,
        discardFirst: true,
        pagingFromStart: false,
        mayPage: offer.mayPage,
        keepPageHashes: offer.verify,
        recoverTimeoutMs: options.recoverTimeoutMs,
        lossGraceMs: 250,
        servers: config.images?.servers ?? [],
        gatherLimit: options.gatherLimit,
        bandwidth: options.bandwidth,
        sourceless: false,
        encodings: encodingFlags(agreedEncodings(offer.encodings, decodedHere)),
        ...(bases ? { bases, baseKey: config.baseKey } : {}),
        known: config.known,
      },
      {
        paused: () => this.#to('postcopy-paused'),
        recovered: () => {
          this.#to('postcopy-recover');
          this.#to('postcopy-active');
        },
        lost: (runs, why) => this.#lost(runs, why),
        // No more will ever be had, and the servers' memory is wanted by others.
        restHere: () => {
          void this.#dissolve();
          this.#rests();
        },
        failed: (error) => {
          this.#fail(error);
          this.#rests();
        },
      },
    );
    this.#engine.complete.then(
      () => this.#everyPage.resolve(),
      () => {},
    );
    try {
      config.listener.add(this.#engine.receiver);
    } catch (error) {
      this.#engine.close(new MemferryError('CANCELLED', 'the listener does not take the arrival'));
      throw error;
    }
    this.#everyPage.promise.then(
      () => {
        this.#allHere = true;
      },
      () => {},
    );
    if (config.given.lineage) inherit(guest.regions, config.given.lineage);
    for (const region of guest.regions) {
      markArriving(region, this.#everyPage.promise);
      markReported(region, this.#over.promise);
    }
    void guest.broken?.then((error) => this.#fail(error));
    this.basePages = bases?.map((kind, index) => (kind === 'none' ? 0 : this.#pagesOf(index))) ?? null;
    this.#filling = bases ? this.#fillBase() : null;
    this.#to('active');
  }

  get regions(): readonly Region[] {
    return this.guest.regions;
  }

  get state(): MigrationState {
    return this.#state;
  }

  /** The guest's opaque state, when the source has paused it. Rejects when the migration fails before. */
  get executionState(): Promise<Uint8Array> {
    return this.#executionState.promise;
  }

  /** The guest runs here. Rejects when it never will. */
  get resumed(): Promise<void> {
    return this.#resumed.promise;
  }

  /** Every page is here. Rejects with PAGES_LOST (with the runs), before the pages are poisoned. */
  get complete(): Promise<ArrivalReport> {
    return this.#complete.promise;
  }

  limit({ bandwidth, gatherLimit }: ResolvedListenOptions): void {
    if (!this.#closed) this.#engine.receiver.limit(bandwidth, gatherLimit);
  }

  /** A new control connection from the same source. */
  attach(link: ArrivalLink): void {
    this.#timers.stop('linger');
    this.#link = link;
    if (this.#allHere) this.#tell({ type: 'complete' });
  }

  /** The connection over `channel` has ended. */
  detached(channel: object): void {
    if (this.#link?.channel !== channel) return;
    this.#link = null;
    if (this.#closed) this.#accounted.resolve();
    this.#dispatch({ type: 'connection-lost' });
    if (this.#resting) this.#alone();
  }

  onMessage(message: SourceMessage, binary: Uint8Array | null): void {
    switch (message.type) {
      case 'offer':
      case 'resume-session':
        this.#fail(new MemferryError('PROTOCOL_ERROR', `'${message.type}' on a connection that is in use`));
        break;
      case 'base-cancel':
        this.#filling?.stop();
        break;
      case 'grow':
        this.#grow(message.region, message.lengthBytes).catch((error) => this.#fail(error));
        break;
      case 'ask-missing':
        this.#engine.receiver.sourceRests();
        this.#tell({
          type: 'missing',
          pages: this.#engine.receiver.stats().pagesMissing,
          question: message.question,
        });
        break;
      case 'state':
        if (!binary || this.#executionState.settled) {
          this.#fail(
            new MemferryError('PROTOCOL_ERROR', 'an execution state that is missing, or a second one'),
          );
        } else {
          this.#to('device');
          this.#awaitsSwitch = message.paging;
          this.#executionState.resolve(binary);
        }
        break;
      case 'evicted':
        this.#summarise(message.digests).then(
          () => this.#accounted.resolve(),
          (error) => this.#fail(error),
        );
        break;
      case 'goodbye':
        this.#accounted.resolve();
        if (this.#commit.phase === 'resumed') void this.#end();
        break;
      default:
        this.#dispatch({ type: 'message', message });
    }
  }

  /** Before the commit: the migration fails and the guest runs on at the source. After it: missing pages are lost. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.#fail(new MemferryError('CANCELLED', 'the destination closed the arrival'));
    await (this.#abandoning ?? this.#end());
  }

  /** Nothing writes a base or applies a log any more. */
  get baseFilled(): Promise<unknown> {
    return this.#filling?.outcome ?? Promise.resolve();
  }

  #pagesOf(index: number): number {
    return this.guest.regions[index]?.pages ?? 0;
  }

  #fillBase(): BaseFilling {
    const { regions, replay } = this.guest;
    const based = { regions, replay, bases: this.config.bases };
    const filling = new BaseFilling(based, this.offer.replayLog ?? null, (progress) => {
      if (this.#closed) return;
      if (progress.sampled) this.#engine.receiver.baseSampled();
      this.#tell({ type: 'base-progress', ...progress });
    });
    filling.outcome.then(
      ({ ready, problem, fillMs, replayMs }) => {
        if (this.#closed) return;
        this.#engine.receiver.baseReady();
        const said = problem?.slice(0, 1024) ?? null;
        this.#tell({ type: 'base-ready', ready, problem: said, fillMs, replayMs });
      },
      (error) => this.#fail(error),
    );
    return filling;
  }

  /** What still writes the regions is told to stop, and waited for: their owner lets go of them next. */
  async #stopFilling(): Promise<void> {
    if (!this.#filling) return;
    this.#filling.stop();
    const { prepareTimeoutMs } = this.config.options;
    const late = 'the base was still being laid out';
    await within(this.#filling.outcome, prepareTimeoutMs, 'PREPARE_TIMEOUT', late).catch(() => {});
  }

  #dispatch(event: DestinationEvent): void {
    this.#events.dispatch(event);
  }

  #carryOut(action: DestinationAction): void {
    switch (action.type) {
      case 'prepare':
        void this.#prepare();
        break;
      case 'resume':
        this.#resume();
        break;
      case 'abandon':
        this.#abandoning = this.#abandon();
        break;
      case 'send':
        this.#tell(action.message);
        break;
      case 'start-timer':
        this.#timers.start(action.timer);
        break;
      case 'stop-timer':
        this.#timers.stop(action.timer);
        break;
      case 'settle':
        if (action.outcome === 'abandoned') {
          const error = this.#error ?? fromPeer(action.cause.code, action.cause.message);
          this.#reject(error, error.code === 'CANCELLED' ? 'cancelled' : 'failed');
        }
        break;
    }
  }

  async #prepare(): Promise<void> {
    let started = performance.now();
    const timeoutMs = this.config.options.prepareTimeoutMs;
    try {
      if (!this.#executionState.settled) throw new MemferryError('PROTOCOL_ERROR', 'PREPARE without a state');
      if (this.#awaitsSwitch) {
        await within(
          untilAborted(this.#engine.switched, this.#prepareAbort.signal),
          timeoutMs,
          'PREPARE_TIMEOUT',
          `the switch to post-copy did not come within ${timeoutMs} ms`,
        );
        started = performance.now();
      } else if (this.config.offer.scatter) {
        // What the source sent to the servers is fetched first; it says itself how long the guest may wait.
        await within(
          untilAborted(this.#engine.filled(), this.#prepareAbort.signal),
          this.config.offer.scatter.gatherTimeoutMs,
          'PREPARE_TIMEOUT',
          'the guest was not gathered in time',
        );
        started = performance.now();
      }
      if (!this.#engine.receiver.seal()) {
        throw new MemferryError(
          'PROTOCOL_ERROR',
          'PREPARE although pages are missing that no pager could fetch',
        );
      }
      const state = await this.#executionState.promise;
      await within(
        Promise.resolve(this.guest.prepare(state, { signal: this.#prepareAbort.signal })),
        timeoutMs,
        'PREPARE_TIMEOUT',
        `prepare did not end within ${timeoutMs} ms`,
      );
    } catch (error) {
      const { code, message } = toPeer(error, 'PREPARE_FAILED');
      this.#fail(
        error instanceof MemferryError
          ? error
          : new MemferryError('PREPARE_FAILED', message, { cause: error }),
        code,
      );
      return;
    }
    this.#prepareMs = performance.now() - started;
    this.#dispatch({ type: 'prepared' });
    this.#tell({ type: 'prepared', prepareMs: this.#prepareMs });
  }

  #resume(): void {
    const paging = this.#engine.receiver.paging() || this.#engine.receiver.stats().pagesMissing > 0;
    this.#notRunning = resumeHere(this.guest, this.offer.name);
    this.#to('postcopy-active');
    if (!paging) this.#everyPage.resolve();
    this.#resumed.resolve();
    const resumedAt = performance.now();
    // From here on no lease ends the image, whatever becomes of the source.
    this.config.images?.commit().catch(() => {});
    this.#everyPage.promise.then(
      () => {
        this.#gatherMs = performance.now() - resumedAt;
        this.#tell({ type: 'complete' });
        if (!this.config.offer.verify) this.#finish();
        this.#rests();
      },
      () => {
        if (!this.config.images) return this.#rests();
        // With servers some of it may still come. What else keeps it from coming says so itself.
        this.#engine.complete.then(
          () => this.#rests(),
          () => {},
        );
      },
    );
  }

  /** No page comes any more, be it that all are here. */
  #rests(): void {
    this.#resting = true;
    if (!this.#link) this.#alone();
  }

  /**
   * The source is not there either. It may come back; one that is gone for good never says goodbye, and what is kept for
   * it must not stay for ever. Its digests cannot be asked for, the servers may have them.
   */
  #alone(): void {
    if (this.#closed || this.#commit.phase !== 'resumed') return;
    const { images } = this.config;
    if (!images || this.#concluded) {
      this.#timers.start('linger');
      return;
    }
    images
      .digests()
      .catch(() => null)
      .then(async (digests) => {
        if (digests === null && this.#link) return; // the source is back, and says them itself
        this.#conclude(await this.#verify(digests));
      })
      .catch((error) => this.#fail(error))
      .finally(() => {
        if (!this.#link && !this.#closed) this.#timers.start('linger');
      });
  }

  async #summarise(digests: string[] | null): Promise<void> {
    try {
      await this.#everyPage.promise;
    } catch (error) {
      // What was told of it before may have been lost with its connection.
      this.#tell({ type: 'lost', runs: this.#lostRuns });
      throw error;
    }
    const mismatched = await this.#verify(digests);
    const { faults, extraMemoryBytes } = this.#engine.receiver.stats();
    this.#tell({ type: 'summary', remoteFaults: faults, extraMemoryBytes, mismatched });
    this.#conclude(mismatched);
  }

  /** Gives the regions whose content is not what left the source. */
  async #verify(digests: readonly string[] | null): Promise<number[]> {
    const mismatched: number[] = [];
    if (digests && this.config.offer.verify) {
      for (const [index, digest] of digests.entries()) {
        if (index >= this.regions.length) break;
        if ((await this.#engine.receiver.digest(index)) !== digest) mismatched.push(index);
      }
      this.#verified = digests.length === this.regions.length && mismatched.length === 0;
    }
    return mismatched;
  }

  #conclude(mismatched: readonly number[]): void {
    if (mismatched.length > 0) {
      const names = mismatched.map((index) => this.offer.regions[index]?.name ?? String(index));
      this.#reject(
        new MemferryError('VERIFICATION_FAILED', `the digests of ${names.join(', ')} differ`, {
          facts: { regions: names },
        }),
        'failed',
      );
    } else {
      this.#finish();
    }
  }

  #finish(): void {
    if (this.#concluded) return;
    this.#finished = true;
    const stats = this.#engine.receiver.stats();
    // Nobody needs the image any more. A server that cannot be reached keeps its part until its operator drops it.
    void this.#dissolve();
    this.#to('completed');
    const told = {
      migrationId: this.id,
      guest: this.offer.name,
      verified: this.#verified,
      prepareMs: this.#prepareMs,
      gatherMs: this.#gatherMs,
      intermediaries: this.config.images?.account(stats.servers) ?? [],
    };
    const report = arrivalReport({ ...told, notRunning: null }, this.regions, stats);
    const tell = (notRunning: string | null) => this.#complete.resolve({ ...report, notRunning });
    if (this.#notRunning instanceof Promise) void this.#notRunning.then(tell);
    else tell(this.#notRunning);
  }

  get #concluded(): boolean {
    return this.#finished || this.#complete.settled;
  }

  #dissolve(): Promise<void> {
    const { images } = this.config;
    this.#dissolving ??= (async () => {
      await images?.dissolve().catch(() => {});
      await images?.close();
    })();
    return this.#dissolving;
  }

  async #grow(index: number, lengthBytes: number): Promise<void> {
    const region = this.regions[index];
    if (!region || this.#commit.phase !== 'receiving' || lengthBytes % region.pageSize !== 0) {
      throw new MemferryError('PROTOCOL_ERROR', 'growth of a region that is not there, or too late', {
        facts: { region: index, lengthBytes },
      });
    }
    if (lengthBytes > (this.offer.regions[index]?.capacityBytes ?? 0)) {
      throw new MemferryError('PROTOCOL_ERROR', 'a region that grows beyond its own capacity');
    }
    if (lengthBytes > region.lengthBytes) {
      if (!this.guest.grow)
        throw new MemferryError('LIMIT_EXCEEDED', 'this guest cannot grow at the destination');
      this.config.grows(lengthBytes - region.lengthBytes);
      await this.guest.grow(index, lengthBytes);
      region.refresh();
    }
    this.#engine.receiver.grow(index, lengthBytes / region.pageSize);
    this.#tell({ type: 'grown', region: index });
  }

  #lost(runs: NativeRun[], why: string): void {
    const error = pagesLost(this.offer.name, runs, why);
    if (this.#commit.phase !== 'resumed') {
      this.#fail(error); // the guest is still the source's; closing the engine poisons what is missing
      return;
    }
    this.#reject(error, 'failed');
    this.#lostRuns = runs.slice(0, maxLostRuns);
    this.#tell({ type: 'lost', runs: this.#lostRuns });
    try {
      this.guest.lost?.(runs);
    } finally {
      // After the rejection has been seen: the promise's reactions run before this.
      setImmediate(() => {
        if (!this.#closed) this.#engine.receiver.acknowledgeLoss();
      });
    }
  }

  /** Anything that goes wrong here. Before the commit it ends the migration; after it only pages can be lost. */
  #fail(cause: unknown, code = 'SYSTEM'): void {
    const error =
      cause instanceof MemferryError
        ? cause
        : fromPeer(code, cause instanceof Error ? cause.message : String(cause));
    if (this.#commit.phase === 'resumed') {
      if (!this.#everyPage.settled) this.#reject(error, 'failed');
      return;
    }
    this.#error ??= error;
    this.#dispatch({ type: 'fail', cause: { code: error.code, message: error.message } });
  }

  #reject(error: MemferryError, state: MigrationState): void {
    this.#to(state);
    this.#executionState.reject(error);
    this.#resumed.reject(error);
    this.#everyPage.reject(error);
    this.#complete.reject(error);
  }

  async #abandon(): Promise<void> {
    this.#prepareAbort.abort(this.#error ?? undefined);
    // Poisons and wakes first: a prepare that waits for a page must not outlive the migration.
    this.config.listener.remove(this.#migration);
    this.#engine.close(
      this.#error ?? new MemferryError('CANCELLED', 'the migration failed before the commit'),
    );
    await this.#stopFilling();
    try {
      const { prepareTimeoutMs } = this.config.options;
      const abandoned = Promise.resolve(this.guest.abandon());
      await within(abandoned, prepareTimeoutMs, 'PREPARE_TIMEOUT', `no end within ${prepareTimeoutMs} ms`);
    } catch (error) {
      process.emitWarning(`guest '${this.offer.name}' threw in abandon(): ${String(error)}`, {
        code: 'MEMFERRY_ABANDON_THREW',
      });
    }
    await this.#end();
  }

  #end(): Promise<void> {
    this.#ending ??= this.#close();
    return this.#ending;
  }

  async #close(): Promise<void> {
    this.#closed = true;
    this.#timers.stopAll();
    if (this.#commit.phase === 'resumed' && this.#allHere && this.#link) {
      // One that finds nobody to take its last word ends a migration that went well with an error.
      await within(this.#accounted.promise, farewellMs, 'PEER_LOST', 'the source says nothing').catch(
        () => {},
      );
    }
    if (this.#commit.phase === 'resumed' && this.#everyPage.settled) this.#finish();
    if (this.#commit.phase !== 'abandoned') {
      this.config.listener.remove(this.#migration);
      this.#engine.close(new MemferryError('CANCELLED', 'the arrival was closed'));
    }
    this.#over.resolve();
    const link = this.#link;
    this.#link = null;
    await Promise.all([link?.close(), this.#dissolving ?? this.config.images?.close()]);
    this.config.ended();
  }

  #tell(message: DestinationMessage): void {
    try {
      this.#link?.send(message);
    } catch {
      // Its reader reports the connection's end; what could not be said is said again when the source asks.
    }
  }

  #to(state: MigrationState): void {
    if (state === this.#state) return;
    const previous = this.#state;
    this.#state = state;
    tellListeners(this, 'state', state, previous);
  }
}
