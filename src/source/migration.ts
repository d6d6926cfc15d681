/**
 * One migration, as its source sees it. This file puts the phases in order (set-up.ts, precopy.ts, switchover.ts,
 * eviction.ts, account.ts) and says what becomes of the guest when one fails. The decisions are elsewhere: when to stop
 * the rounds (convergence.ts), what a lost message means (protocol/commit-source.ts), which page goes next (the native
 * sender).
 *
 *   setup ─ active ─ [pre-switchover] ─ device ─┬─ completed                      stop-and-copy, pre-copy
 *                                               └─ postcopy-active ─ completed    post-copy, hybrid
 *                                                   │ cut   ▲
 *                                                   postcopy-paused ─ postcopy-recover
 */
import { randomBytes } from 'node:crypto';
import { EventEmitter } from 'node:events';
import { stillArriving } from '../arrivals.js';
import { keepStaleCopy } from '../base-files.js';
import { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import type { ProgressStream } from '../progress.js';
import { abortError, lastingAbort, untilAborted } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import type { SourceMessage } from '../protocol/messages.js';
import { gathersFirst, type ModeTraits, traitsOf } from '../protocol/mode-traits.js';
import { verificationFailed } from '../protocol/verification.js';
import type { EvictionReport, MigrationReport, MigrationState } from '../report.js';
import { tellListeners } from '../tell-listeners.js';
import { CommitDriver, type Settlement } from './commit-driver.js';
import { pushRest } from './eviction.js';
import { evictionReport } from './eviction-report.js';
import { afterCommit, ownerGone, reasonOfCut, regionGone } from './gone.js';
import { followGrowth } from './growth.js';
import { releaseGuest, tellDeparted } from './guest-hooks.js';
import { Holdings } from './holdings.js';
import { Measurements } from './measurements.js';
import { comparablePages } from './migration-trackers.js';
import { Peer } from './peer.js';
import type { PlannedRoom } from './planned-room.js';
import { discardWhileRunning, preCopy } from './precopy.js';
import { ProgressSampling } from './progress-sampling.js';
import type { SourceSession } from './session.js';
import { setUp } from './set-up.js';
import { Switchover } from './switchover.js';

export class SourceMigration extends EventEmitter {
  readonly #migrationId = randomBytes(16);
  readonly id = this.#migrationId.toString('hex');
  #done = deferred<MigrationReport>();
  #evicted = deferred<EvictionReport>();
  readonly #abort = lastingAbort();
  readonly #measured = new Measurements();
  readonly #sampling: ProgressSampling;
  readonly #switchoverAsked = deferred<void>();
  readonly #commit: CommitDriver;
  #running: Promise<void>;
  #state: MigrationState = 'setup';
  readonly #traits: ModeTraits;
  #paging: boolean;
  readonly #held = new Holdings();
  readonly #switchover: Switchover;
  readonly #peer: Peer;

  constructor(
    private readonly guest: Guest,
    private readonly options: ResolvedMigrateOptions,
    private readonly secret: Promise<Uint8Array>,
    /** Of its gang. */
    private readonly room: PlannedRoom | null = null,
  ) {
    super();
    secret.catch(() => {}); // reported by setUp, if it gets there
    this.#traits = traitsOf(options.mode);
    this.#paging = this.#traits.paging;
    const { signal } = this.#abort;
    const send = (message: SourceMessage, binary: Uint8Array | null = null) =>
      this.#held.session?.send(message, binary);
    this.#commit = new CommitDriver(guest, {
      timeoutsMs: {
        pause: options.pauseTimeoutMs,
        // The destination gathers before it prepares, at its own pace.
        ready: options.prepareTimeoutMs + (gathersFirst(this.#traits) ? options.gatherTimeoutMs : 0),
        doubt: options.inDoubtTimeoutMs,
        retry: 500,
      },
      send,
      redial: () =>
        this.#held.session
          ? this.#held.session.redial()
          : Promise.reject(new Error('there was no connection to take up')),
    });
    this.#sampling = new ProgressSampling(guest, this.#measured, () =>
      this.#done.settled && this.#state === 'completed'
        ? null
        : { state: this.#state, stats: this.#held.engine?.stats() ?? null },
    );
    this.#switchover = new Switchover({
      commit: this.#commit,
      measured: this.#measured,
      signal,
      send,
      followGrowth: () => this.#followGrowth(),
    });
    this.#peer = new Peer({
      guest,
      options,
      commit: this.#commit,
      switchover: this.#switchover,
      measured: this.#measured,
      signal,
      send,
    });
    options.signal?.addEventListener('abort', this.#onSignal, { once: true });
    if (options.signal?.aborted) this.#onSignal();
    this.#running = this.#run();
  }

  get state(): MigrationState {
    return this.#state;
  }

  get progress(): ProgressStream {
    return this.#sampling.stream;
  }

  /** Resolves when, and only when, the source holds nothing that anyone still needs. */
  get evicted(): Promise<EvictionReport> {
    return this.#evicted.promise;
  }

  /** The report, or the error that ended the migration. */
  get done(): Promise<MigrationReport> {
    return this.#done.promise;
  }

  /** Ends the rounds (pre-copy, hybrid) after the one under way, or releases a held switchover. */
  switchover(): void {
    this.#switchoverAsked.resolve();
  }

  /** Before the commit: the guest runs on here and `done` rejects with CANCELLED. After it: no effect. */
  cancel(reason?: unknown): void {
    this.#cancel(new MemferryError('CANCELLED', 'the migration was cancelled', { cause: reason }));
  }

  /**
   * After MIGRATION_IN_DOUBT, and after the GUEST_LOST of a destination that was restarted before it had answered GRANT.
   * `fence`: the caller has proof that the destination's process is dead and stays so; the guest then runs here again.
   * `askAgain`: dial the destination once more. Gives where the guest is now. Rejects with MIGRATION_IN_DOUBT when that is
   * still not known, GUEST_LOST when the destination was restarted, INVALID_ARGUMENT when there is nothing to resolve: also
   * after the GUEST_LOST of a destination that had resumed the guest.
   */
  async resolve(proof: Proof): Promise<'source' | 'destination'> {
    const settlement = await this.#commit.resolve(howToResolve(proof));
    if (settlement.outcome === 'departed') {
      this.#goOn();
      return 'destination';
    }
    if (settlement.outcome !== 'reclaimed') throw settlement.error;
    await this.#letGo(false, settlement.error);
    await this.#commit.unpaused();
    return 'source';
  }

  /**
   * Cancels if there is still time, lets go of everything otherwise: what the destination of a post-copy does not have yet
   * is dropped, GUEST_LOST. The guest's fate is `done`'s to tell.
   */
  async [Symbol.asyncDispose](): Promise<void> {
    this.cancel();
    this.#commit.release();
    // After the commit nothing above ends what waits for the destination, which may be cut off for long.
    if (this.#commit.committed) await this.#abandonRest();
    await this.#running;
    await this.#letGo(false, new MemferryError('CANCELLED', 'the migration was closed'));
    await this.#commit.unpaused();
  }

  async #abandonRest(): Promise<void> {
    const error = this.#evicted.settled
      ? new MemferryError('CHANNEL_LOST', 'the migration was closed before the destination gave its account')
      : new MemferryError('GUEST_LOST', 'the migration was closed before the destination had every page', {
          facts: { pages: this.#held.engine?.stats().pagesPending ?? 0 },
        });
    this.#held.engine?.close(false, error);
    this.#peer.account.abandon(error);
    await this.#held.session?.close(false);
  }

  readonly #onSignal = () => this.#cancel(abortError(this.options.signal as AbortSignal));

  #cancel(error: MemferryError): void {
    if (!this.#commit.committed) this.#fail(error);
  }

  /** Before the commit this ends the migration; after it the commit's state machine takes no notice. */
  #fail(error: unknown): void {
    this.#commit.fail(error);
  }

  async #run(): Promise<void> {
    this.#sampling.start(this.options.progressIntervalMs);
    this.#commit.settled.then((settlement) => {
      if (settlement.outcome !== 'departed') this.#abort.abort(settlement.error);
    });
    try {
      const flow = this.#untilGrant().catch((error) => this.#fail(error));
      const settlement = await this.#commit.settled;
      if (settlement.outcome === 'departed') {
        await this.#afterResumed();
      } else {
        // What waits for the engine or the peer must not wait for ever.
        if (settlement.outcome === 'reclaimed') this.#held.engine?.close(false, settlement.error);
        await flow;
        await this.#end(settlement);
      }
    } catch (error) {
      await this.#lost(error);
    } finally {
      this.options.signal?.removeEventListener('abort', this.#onSignal);
      this.#sampling.end();
    }
  }

  /** In doubt before, departed now: what the destination lacks is still here, and it still has to get it. */
  #goOn(): void {
    this.#done = deferred();
    this.#evicted = deferred();
    this.#running = this.#afterResumed().catch((error) => this.#lost(error));
  }

  /** Everything up to the point where the commit's state machine goes on by itself. */
  async #untilGrant(): Promise<void> {
    const waiting = stillArriving(this.guest.regions.map(({ region }) => region));
    if (waiting.length > 0) await this.#untilArrived(waiting);
    await setUp(
      {
        guest: this.guest,
        options: this.options,
        secret: this.secret,
        migrationId: this.#migrationId,
        peer: this.#peer,
        signal: this.#abort.signal,
        room: this.room,
        engineListener: {
          paused: () => this.#to('postcopy-paused'),
          recovered: () => {
            this.#to('postcopy-recover');
            this.#to('postcopy-active');
          },
          failed: (error) => this.#fail(error),
        },
      },
      this.#held,
    );
    this.#to('active');
    if (this.#traits.rounds) {
      const outcome = await preCopy({
        engine: this.#held.requireEngine(),
        trackers: this.#held.trackers,
        regions: this.guest.regions.map(({ region }) => region),
        options: this.options,
        measured: this.#measured,
        signal: this.#abort.signal,
        switchoverAsked: this.#switchoverAsked,
        followGrowth: () => this.#followGrowth(),
        gathered: (suspectPages) => this.#untilGathered(suspectPages),
        startFromBase: () => this.#startFromBase(),
        converged: () => this.#to('pre-switchover'),
      });
      this.#paging ||= outcome === 'post-copy';
    } else {
      // While the guest runs: what it touches from here on is looked at again when its turn comes.
      // The trackers are armed (trackersForBase).
      await untilAborted(this.#held.requireEngine().queuePopulated(), this.#abort.signal);
      await this.#startFromBase();
      if (this.options.holdSwitchover) {
        this.#to('pre-switchover');
        await untilAborted(this.#switchoverAsked.promise, this.#abort.signal);
      }
      // Pages that the base had, and the guest has written since.
      if (this.#paging && this.#peer.negotiation.base) {
        await discardWhileRunning(this.#held.requireEngine(), this.#abort.signal);
      }
    }
    await this.#switchOver();
  }

  /** A guest that has only just come here still waits for pages. */
  async #untilArrived(waiting: Promise<unknown>[]): Promise<void> {
    this.#sampling.waitingFor = 'the last pages of the migration that brought the guest here';
    // This still runs inside of migrate(): its caller can listen only after it has returned.
    await Promise.resolve();
    tellListeners(this, 'waiting', this.#sampling.waitingFor);
    await untilAborted(Promise.all(waiting), this.#abort.signal);
    this.#sampling.waitingFor = null;
  }

  async #startFromBase(): Promise<void> {
    const { base } = this.#peer.negotiation;
    if (!base) return;
    if (!comparablePages(base, this.#held.trackers)) {
      await base.decline('no dirty tracker that can be armed, and costs less than a base saves');
      return;
    }
    const pageSize = this.guest.regions[0]?.region.pageSize ?? 4096;
    // Where pages are dropped while the guest is paused, none of the base may be left that was not confirmed.
    await base.run(this.#held.requireEngine(), pageSize, !this.#traits.rounds && this.#paging);
  }

  async #switchOver(): Promise<void> {
    const engine = this.#held.requireEngine();
    this.#to('device');
    if (this.#paging) {
      await this.#switchover.toPostCopy(engine);
    } else {
      // After rounds only what was written last is left, which nobody has.
      const references = !this.#traits.rounds;
      await this.#switchover.withEveryPage(engine, references);
    }
  }

  async #afterResumed(): Promise<void> {
    const engine = this.#held.requireEngine();
    const departed = tellDeparted(this.guest); // nobody waits for its owner while pages are wanted
    const pushed = pushRest(
      engine,
      this.#held.images,
      this.#paging ? () => this.#to('postcopy-active') : null,
    );
    await Promise.race([pushed, this.#peer.account.over]);
    this.#measured.evicted();
    const digests = this.options.verify
      ? await Promise.all(this.guest.regions.map((_, index) => engine.digest(index)))
      : null;
    const evicted = evictionReport({
      id: this.id,
      guest: this.guest,
      mode: this.options.mode,
      paging: this.#paging,
      engine,
      measured: this.#measured,
      trackers: this.#held.trackers,
      images: this.#held.images,
      base: this.#peer.negotiation.base,
      references: this.#peer.negotiation.references,
    });
    if (this.#held.images) {
      // For a destination that is still gathering when this side is gone.
      await this.#held.images.seal(digests).catch(() => {});
      // No fault is answered any more: the memory is its owner's again. The destination gathers the rest.
      engine.close(true, new MemferryError('CANCELLED', 'every page is elsewhere'));
    }
    await departed;
    this.#evicted.resolve(evicted);
    // The destination does not wait for this side's disk.
    const session = this.#held.session as SourceSession;
    const asked = this.#peer.account.ask(session, digests, this.options.recoverTimeoutMs);
    asked.catch(() => {});
    if (this.options.keepStaleCopy) {
      await keepStaleCopy(this.guest, this.#switchover.executionState, this.options.keepStaleCopy);
    }
    await releaseGuest(this.guest);
    const summary = await asked;
    if (summary.mismatched.length > 0) throw verificationFailed(this.guest.regions, summary.mismatched);
    await this.#letGo(true, new MemferryError('CANCELLED', 'the migration is over'));
    this.#to('completed');
    const { totalMs, gatherMs } = this.#measured.report();
    this.#done.resolve({
      ...evicted,
      state: 'completed',
      verified: digests ? true : null,
      totalMs,
      gatherMs,
      remoteFaults: summary.remoteFaults,
      extraMemoryBytes: {
        source: engine.stats().extraMemoryBytes,
        destination: summary.extraMemoryBytes,
      },
    });
  }

  #followGrowth(): Promise<void> {
    const { lengths } = this.#held;
    const engine = this.#held.requireEngine();
    return followGrowth(this.guest.regions, lengths, engine, async (index, lengthBytes, pages) => {
      await this.#held.images?.grow(index, pages);
      await this.#peer.growth.grow(index, lengthBytes);
    });
  }

  async #untilGathered(suspectPages: number): Promise<void> {
    if (!gathersFirst(this.#traits) || !this.#peer.negotiation.tellsMissing) return;
    const asked = this.#switchoverAsked;
    await this.#peer.gatherWait.untilGathered(
      suspectPages,
      () => asked.settled,
      this.options.gatherTimeoutMs,
    );
  }

  /** The guest is here (reclaimed), or nobody knows (in doubt, lost). */
  async #end(settlement: Exclude<Settlement, { outcome: 'departed' }>): Promise<void> {
    let { error } = settlement;
    if (settlement.outcome === 'reclaimed') {
      if (error.code === 'CHANNEL_LOST') {
        error = regionGone(this.guest) ?? (await reasonOfCut(error, this.#peer.refusal));
      } else if (['REGION_GONE', 'SYSTEM'].includes(error.code)) {
        error = ownerGone(this.guest) ?? error;
      }
      await this.#letGo(false, error);
      // Whoever hears of it may let go of the guest at once.
      await this.#commit.unpaused();
      this.#to(error.code === 'CANCELLED' ? 'cancelled' : 'failed');
    } else {
      this.#to('failed');
    }
    this.#evicted.reject(error);
    this.#done.reject(error);
  }

  /** After the commit: the destination has the guest, and something went wrong with its pages or its account. */
  async #lost(cause: unknown): Promise<void> {
    const pending = this.#evicted.settled ? null : (this.#held.engine?.stats().pagesPending ?? 0);
    const servers = this.#held.engine?.stats().servers ?? [];
    const atServers = servers.reduce((sum, { pages }) => sum + pages, 0);
    const error = afterCommit(cause, pending, atServers);
    try {
      // Whoever hears of it may let go of the guest at once.
      this.#held.engine?.close(false, error);
      this.#held.freeMemory();
    } finally {
      this.#to('failed');
      this.#evicted.reject(error);
      this.#done.reject(error);
      await this.#letGo(false, error);
    }
  }

  #letGo(goodbye: boolean, reason: MemferryError): Promise<void> {
    return this.#held.letGo(goodbye, reason, !this.#commit.committed);
  }

  #to(state: MigrationState): void {
    if (state === this.#state || this.#done.settled) return;
    const previous = this.#state;
    this.#state = state;
    tellListeners(this, 'state', state, previous);
    this.#sampling.sample();
  }
}

type Proof = { fence: 'destination-dead' } | { askAgain: true };

/** Anything else is no proof: were it taken for one, there could be two of the guest. */
function howToResolve(proof: Partial<Record<'fence' | 'askAgain', unknown>>): 'fence' | 'ask-again' {
  const { fence, askAgain } = Object(proof) as typeof proof;
  if (fence === 'destination-dead' && askAgain === undefined) return 'fence';
  if (askAgain === true && fence === undefined) return 'ask-again';
  throw new MemferryError(
    'INVALID_ARGUMENT',
    "resolve() takes { fence: 'destination-dead' }, with proof that it is, or { askAgain: true }",
  );
}
