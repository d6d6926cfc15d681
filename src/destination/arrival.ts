/**
 * One guest on its way in, as the destination sees it: the engine receives, the commit (commit-driver.ts) says what
 * READY, GRANT and a lost connection mean, and this file does it, with a part for each phase: the base
 * (arriving-base.ts), what PREPARE needs (preparation.ts), what it all comes to (outcome.ts). JavaScript thread; nothing
 * here is needed for a page fault to be served.
 */
import { EventEmitter } from 'node:events';
import { markArriving, markReported, markResting } from '../arrivals.js';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { inherit } from '../lineage.js';
import type { NativeRun } from '../native.js';
import type { ResolvedListenOptions } from '../options.js';
import { within } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import type { DestinationMessage, SourceMessage } from '../protocol/messages.js';
import { fromPeer } from '../protocol/peer-error.js';
import { NamedTimers } from '../protocol/timers.js';
import type { Region } from '../region.js';
import type { ArrivalReport, MigrationState } from '../report.js';
import { tellListeners } from '../tell-listeners.js';
import { type ArrivalConfig, type ArrivalLink, receiverConfig } from './arrival-config.js';
import { abandonGuest, pagesLost, resumeHere, tellLost } from './arrived.js';
import { ArrivingBase } from './arriving-base.js';
import { basesOf } from './base.js';
import { DestinationCommit } from './commit-driver.js';
import { DestinationEngine } from './engine.js';
import { growGuest } from './grow-guest.js';
import { ArrivalOutcome } from './outcome.js';
import { Preparation } from './preparation.js';

/** Pages named in one report of a loss; the rest is counted only. */
const maxLostRuns = 4096;

/** How long an arrival that has everything waits, when it is closed, for the source to say that it knows. */
const farewellMs = 2000;

export class Arrival extends EventEmitter {
  readonly id: string;
  readonly offer: GuestOffer;
  readonly guest: ArrivingGuest;
  readonly #resumed = deferred<void>();
  /** Nothing here holds the regions any more. */
  readonly #over = deferred<void>();
  readonly #everyPage = deferred<void>();
  /** The source has its account, or asks for none any more. */
  readonly #accounted = deferred<void>();
  readonly #engine: DestinationEngine;
  readonly #commit: DestinationCommit;
  readonly #timers: NamedTimers<'linger'>;
  readonly #preparation: Preparation;
  readonly #outcome: ArrivalOutcome;
  readonly #base: ArrivingBase | null;
  readonly #migration: Uint8Array;
  #link: ArrivalLink | null;
  #state: MigrationState = 'setup';
  #lostRuns: NativeRun[] = [];
  readonly #restHere = deferred<void>();
  /** The image is let go of: at its servers, then the connections to them. */
  #dissolving: Promise<void> | null = null;
  #allHere = false;
  /** Nor ever will again. */
  #takesNothing = false;
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
    this.#commit = new DestinationCommit(
      { grant: options.grantTimeoutMs },
      {
        prepare: () => void this.#prepare(),
        resume: () => this.#resume(),
        abandon: (error) => {
          this.#abandoning = this.#abandon(error);
        },
        send: (message) => this.#tell(message),
        decided: config.decided,
        abandoned: (error) => this.#reject(error, error.code === 'CANCELLED' ? 'cancelled' : 'failed'),
      },
    );
    this.#timers = new NamedTimers({ linger: options.recoverTimeoutMs }, () => void this.#end());
    const bases = offer.base ? basesOf({ regions: guest.regions, bases: config.bases }) : null;
    this.#engine = new DestinationEngine(receiverConfig(config, bases), {
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
    });
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
      markResting(region, this.#restHere.promise);
      markReported(region, this.#over.promise);
    }
    const broken = (error: unknown) => this.#fail(error);
    guest.broken?.then(broken, broken);
    const gatherTimeoutMs = offer.scatter?.gatherTimeoutMs ?? null;
    this.#preparation = new Preparation(guest, this.#engine, options.prepareTimeoutMs, gatherTimeoutMs);
    this.#outcome = new ArrivalOutcome({
      migrationId: this.id,
      offer: this.offer,
      guest,
      verify: offer.verify,
      receiver: this.#engine.receiver,
      images: config.images,
      completed: () => {
        // Nobody needs the image any more. A server that cannot be reached keeps its part until its operator drops it.
        void this.#dissolve();
        this.#to('completed');
      },
      failed: (error) => this.#reject(error, 'failed'),
    });
    this.#base = bases ? this.#layOutBase(bases) : null;
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
    return this.#preparation.executionState.promise;
  }

  /** The guest runs here. Rejects when it never will. */
  get resumed(): Promise<void> {
    return this.#resumed.promise;
  }

  /** Every page is here. Rejects with PAGES_LOST (with the runs), before the pages are poisoned. */
  get complete(): Promise<ArrivalReport> {
    return this.#outcome.complete;
  }

  /** How many pages of each region start from a base; null: none does. */
  get basePages(): number[] | null {
    return this.#base?.pages ?? null;
  }

  /** Nothing writes a base or applies a log any more. */
  get baseFilled(): Promise<unknown> {
    return this.#base?.filled ?? Promise.resolve();
  }

  get restHere(): Promise<void> {
    return this.#restHere.promise;
  }

  limit({ bandwidth, gatherLimit }: ResolvedListenOptions): void {
    if (!this.#closed) this.#engine.receiver.limit(bandwidth, gatherLimit);
  }

  /** A new control connection from the same source. */
  attach(link: ArrivalLink): void {
    const former = this.#link;
    if (former && link.order < former.order) {
      // The source has given it up since, and dialled anew: its words were late.
      void link.close();
      return;
    }
    this.#timers.stop('linger');
    this.#link = link;
    // The source has dropped it before it dialled anew, which may not have been heard of here.
    void former?.close();
    if (this.#allHere) this.#tell({ type: 'complete' });
    if (this.#takesNothing) this.#tell({ type: 'lost', runs: [] });
  }

  /** The connection over `channel` has ended. */
  detached(channel: object): void {
    if (this.#link?.channel !== channel) return;
    this.#link = null;
    if (this.#closed) this.#accounted.resolve();
    this.#commit.connectionLost();
    if (this.#restHere.settled) this.#alone();
  }

  onMessage(message: SourceMessage, binary: Uint8Array | null): void {
    switch (message.type) {
      case 'offer':
      case 'resume-session':
        this.#fail(new MemferryError('PROTOCOL_ERROR', `'${message.type}' on a connection that is in use`));
        break;
      case 'base-cancel':
        this.#base?.stop();
        break;
      case 'base-skip-replay':
        this.#base?.skipReplay();
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
        if (!binary || this.#preparation.executionState.settled) {
          this.#fail(
            new MemferryError('PROTOCOL_ERROR', 'an execution state that is missing, or a second one'),
          );
        } else {
          this.#to('device');
          this.#preparation.stateCame(binary, message.paging);
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
        this.#commit.message(message);
    }
  }

  /** Before the commit: the migration fails and the guest runs on at the source. After it: missing pages are lost. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#commit.phase === 'resumed' && !this.#everyPage.settled && this.#nothingIsMissing()) {
      // They are being installed, or the word that they are is on its way to this thread.
      await within(this.#everyPage.promise, farewellMs, 'PEER_LOST', 'the pages that came').catch(() => {});
    }
    this.#fail(new MemferryError('CANCELLED', 'the destination closed the arrival'));
    await (this.#abandoning ?? this.#end());
  }

  #layOutBase(kinds: NonNullable<ReturnType<typeof basesOf>>): ArrivingBase {
    const { regions, replay } = this.guest;
    const based = { regions, replay, bases: this.config.bases };
    return new ArrivingBase(based, kinds, this.offer.replayLog ?? null, this.#engine.receiver, {
      tell: (message) => this.#tell(message),
      failed: (error) => this.#fail(error),
    });
  }

  async #prepare(): Promise<void> {
    try {
      await this.#preparation.run();
    } catch (error) {
      this.#fail(error);
      return;
    }
    const prepareMs = this.#preparation.tookMs;
    this.#outcome.prepareMs = prepareMs;
    this.#commit.prepared();
    this.#tell({ type: 'prepared', prepareMs });
  }

  #nothingIsMissing(): boolean {
    return this.#engine.receiver.stats().pagesMissing === 0;
  }

  #resume(): void {
    const paging = this.#engine.receiver.paging() || !this.#nothingIsMissing();
    this.#outcome.notRunning = resumeHere(this.guest, this.offer.name);
    this.#to('postcopy-active');
    if (!paging) this.#everyPage.resolve();
    this.#resumed.resolve();
    const resumedAt = performance.now();
    // From here on no lease ends the image, whatever becomes of the source.
    this.config.images?.commit().catch(() => {});
    this.#everyPage.promise.then(
      () => {
        this.#outcome.gatherMs = performance.now() - resumedAt;
        this.#tell({ type: 'complete' });
        if (!this.config.offer.verify) this.#outcome.finish();
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
    this.#restHere.resolve();
    if (!this.#link) this.#alone();
  }

  /**
   * The source is not there either. It may come back; one that is gone for good never says goodbye, and what is kept for
   * it must not stay for ever. Its digests cannot be asked for, the servers may have them.
   */
  #alone(): void {
    if (this.#closed || this.#commit.phase !== 'resumed') return;
    const { images } = this.config;
    if (!images || this.#outcome.concluded) {
      this.#timers.start('linger');
      return;
    }
    images
      .digests()
      .catch(() => null)
      .then(async (digests) => {
        if (digests === null && this.#link) return; // the source is back, and says them itself
        this.#outcome.conclude(await this.#outcome.verify(digests));
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
    const mismatched = await this.#outcome.verify(digests);
    const { faults, extraMemoryBytes } = this.#engine.receiver.stats();
    this.#tell({ type: 'summary', remoteFaults: faults, extraMemoryBytes, mismatched });
    this.#outcome.conclude(mismatched);
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
    const receiving = this.#commit.phase === 'receiving';
    const growth = { index, lengthBytes };
    const pages = await growGuest(this.guest, this.offer, growth, receiving, this.config.grows);
    this.#engine.receiver.grow(index, pages);
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
    tellLost(this.guest, this.offer.name, runs);
    // After the rejection has been seen: the promise's reactions run before this.
    setImmediate(() => {
      if (!this.#closed) this.#engine.receiver.acknowledgeLoss();
    });
  }

  /** Anything that goes wrong here. Before the commit it ends the migration; after it only pages can be lost. */
  #fail(cause: unknown): void {
    const error =
      cause instanceof MemferryError
        ? cause
        : fromPeer('SYSTEM', cause instanceof Error ? cause.message : String(cause));
    if (this.#commit.phase === 'resumed') {
      if (this.#everyPage.settled) return;
      this.#reject(error, 'failed');
      // Else the source would look for a destination that takes nothing any more.
      this.#takesNothing = true;
      this.#tell({ type: 'lost', runs: [] });
      return;
    }
    this.#commit.fail(error);
  }

  #reject(error: MemferryError, state: MigrationState): void {
    this.#to(state);
    this.#preparation.executionState.reject(error);
    this.#resumed.reject(error);
    this.#everyPage.reject(error);
    this.#outcome.reject(error);
  }

  async #abandon(error: MemferryError | null): Promise<void> {
    this.#preparation.abort(error);
    // Poisons and wakes first: a prepare that waits for a page must not outlive the migration.
    this.config.listener.remove(this.#migration);
    this.#engine.close(error ?? new MemferryError('CANCELLED', 'the migration failed before the commit'));
    const { prepareTimeoutMs } = this.config.options;
    await this.#base?.stopped(prepareTimeoutMs);
    await abandonGuest(this.guest, this.offer.name, prepareTimeoutMs);
    await this.#end();
  }

  #end(): Promise<void> {
    this.#ending ??= this.#close();
    return this.#ending;
  }

  async #close(): Promise<void> {
    this.#closed = true;
    this.#restHere.resolve();
    this.#base?.close();
    this.#commit.stopTimers();
    this.#timers.stopAll();
    if (this.#commit.phase === 'resumed' && this.#allHere && this.#link) {
      // One that finds nobody to take its last word ends a migration that went well with an error.
      await within(this.#accounted.promise, farewellMs, 'PEER_LOST', 'the source says nothing').catch(
        () => {},
      );
    }
    if (this.#commit.phase === 'resumed' && this.#everyPage.settled) this.#outcome.finish();
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
