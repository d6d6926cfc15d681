/**
 * One migration, as its source sees it. This file puts the parts in order and owns what they share; the
 * decisions are elsewhere: when to stop the rounds (convergence.ts), what a lost message means
 * (protocol/commit-source.ts), which page goes next (the native sender).
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
import type { Guest, PausedGuest } from '../guest.js';
import type { Mode, ResolvedMigrateOptions } from '../options.js';
import { ProgressStream } from '../progress.js';
import { abortError, untilAborted, within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { agreedEncodings, wantedEncodings } from '../protocol/encodings.js';
import type { DestinationMessage } from '../protocol/messages.js';
import { type ModeTraits, traitsOf } from '../protocol/mode-traits.js';
import { fromPeer } from '../protocol/peer-error.js';
import { rehearseSwitchover } from '../rehearsal.js';
import type { EvictionReport, MigrationReport, MigrationState, Progress } from '../report.js';
import type { ImageSet } from '../staging/image-set.js';
import { tellListeners } from '../tell-listeners.js';
import type { DirtyTracker } from '../trackers.js';
import { checkGuest } from './check-guest.js';
import { claimRegions } from './claim-regions.js';
import { CommitDriver, type Settlement, tellDeparted } from './commit-driver.js';
import { OfferedReferences } from '../protocol/references.js';
import { SourceEngine } from './engine.js';
import { engineConfig } from './engine-config.js';
import { evictionReport } from './eviction-report.js';
import { GatherWait } from './gather-wait.js';
import { afterCommit, ownerGone, regionGone } from './gone.js';
import { makeOffer } from './make-offer.js';
import { Measurements } from './measurements.js';
import { comparablePages, trackersForBase, trackersForRounds } from './migration-trackers.js';
import { discardWhileRunning, preCopy } from './precopy.js';
import { SourceSession } from './session.js';
import { StartFromBase } from './start-from-base.js';
import { stageImage } from './stage-image.js';

/** How long a cut data connection waits for the destination's own words; they are on their way, or never come. */
const refusalGraceMs = 500;

export class SourceMigration extends EventEmitter {
  readonly #migrationId = randomBytes(16);
  readonly id = this.#migrationId.toString('hex');
  readonly progress: ProgressStream = new ProgressStream();
  #done = deferred<MigrationReport>();
  #evicted = deferred<EvictionReport>();
  readonly #abort = new AbortController();
  readonly #measured = new Measurements();
  readonly #switchoverAsked = deferred<void>();
  readonly #commit: CommitDriver;
  #running: Promise<void>;
  #state: MigrationState = 'setup';
  readonly #traits: ModeTraits;
  #paging: boolean;
  #images: ImageSet | null = null;
  /** Where `dedup` was asked for, and there are no servers. */
  #references: OfferedReferences | null = null;
  #session: SourceSession | null = null;
  #engine: SourceEngine | null = null;
  #trackers: (DirtyTracker | null)[] = [];
  #releaseRegions = (): void => {};
  #waitingFor: string | null = null;
  #pagesSeen = 0;
  /** With the encodings that the destination takes. */
  #accepted: Deferred<string[]> = deferred();
  readonly #refusal = deferred<MemferryError>();
  #grown: Deferred<void> | null = null;
  #tellsMissing = false;
  #gatherWait: GatherWait | null = null;
  #paused: PausedGuest | null = null;
  /** For the stale copy. */
  #pausedState: Uint8Array = new Uint8Array(0);
  /** The destination has a base. */
  #base: StartFromBase | null = null;
  /** The destination's pager serves, and this side knows it; at once where nothing is paged. */
  #switched: Promise<unknown> = Promise.resolve();
  #summary: Deferred<Extract<DestinationMessage, { type: 'summary' }>> = deferred();

  constructor(
    private readonly guest: Guest,
    private readonly options: ResolvedMigrateOptions,
    private readonly secret: Promise<Uint8Array>,
  ) {
    super();
    secret.catch(() => {}); // reported by #setUp, if it gets there
    this.#traits = traitsOf(options.mode);
    this.#paging = this.#traits.paging;
    this.#commit = new CommitDriver(guest, {
      timeoutsMs: {
        pause: options.pauseTimeoutMs,
        // The destination gathers before it prepares, at its own pace.
        ready: options.prepareTimeoutMs + (this.#gathersFirst ? options.gatherTimeoutMs : 0),
        doubt: options.inDoubtTimeoutMs,
        retry: 500,
      },
      send: (message) => this.#session?.send(message),
      redial: () =>
        this.#session
          ? this.#session.redial()
          : Promise.reject(new Error('there was no connection to take up')),
    });
    options.signal?.addEventListener('abort', this.#onSignal, { once: true });
    if (options.signal?.aborted) this.#onSignal();
    this.#running = this.#run();
  }

  get state(): MigrationState {
    return this.#state;
  }

  get mode(): Mode {
    return this.options.mode;
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
   * After MIGRATION_IN_DOUBT or GUEST_LOST. `fence`: the caller has proof that the destination's process is
   * dead and stays so; the guest then runs here again. `askAgain`: dial the destination once more.
   * Gives where the guest is now. Rejects with MIGRATION_IN_DOUBT when that is still not known.
   */
  async resolve(
    proof: { fence: 'destination-dead' } | { askAgain: true },
  ): Promise<'source' | 'destination'> {
    const settlement = await this.#commit.resolve('fence' in proof ? 'fence' : 'ask-again');
    if (settlement.outcome === 'departed') {
      this.#goOn();
      return 'destination';
    }
    if (settlement.outcome !== 'reclaimed') throw settlement.error;
    await this.#letGo(false, settlement.error);
    await this.#commit.unpaused();
    return 'source';
  }

  /** Cancels if there is still time, lets go of everything otherwise. The guest's fate is `done`'s to tell. */
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
          facts: { pages: this.#engine?.stats().pagesPending ?? 0 },
        });
    this.#engine?.close(false, error);
    this.#summary.reject(error);
    await this.#session?.close(false);
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
    const sampling = setInterval(() => this.#sample(), this.options.progressIntervalMs);
    sampling.unref();
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
        if (settlement.outcome === 'reclaimed') this.#engine?.close(false, settlement.error);
        await flow;
        await this.#end(settlement);
      }
    } catch (error) {
      await this.#lost(error);
    } finally {
      clearInterval(sampling);
      this.options.signal?.removeEventListener('abort', this.#onSignal);
      this.#sample();
      this.progress.end();
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
    await this.#setUp();
    this.#to('active');
    if (this.#traits.rounds) {
      const outcome = await preCopy({
        engine: this.#requireEngine(),
        trackers: this.#trackers,
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
      await untilAborted(this.#requireEngine().queuePopulated(), this.#abort.signal);
      await this.#startFromBase();
      if (this.options.holdSwitchover) {
        this.#to('pre-switchover');
        await untilAborted(this.#switchoverAsked.promise, this.#abort.signal);
      }
      // Pages that the base had, and the guest has written since.
      if (this.#paging && this.#base) await discardWhileRunning(this.#requireEngine(), this.#abort.signal);
    }
    await this.#switchOver();
  }

  async #setUp(): Promise<void> {
    const { guest, options } = this;
    const waiting = stillArriving(guest.regions.map(({ region }) => region));
    if (waiting.length > 0) {
      this.#waitingFor = 'the last pages of the migration that brought the guest here';
      // This still runs inside of migrate(): its caller can listen only after it has returned.
      await Promise.resolve();
      tellListeners(this, 'waiting', this.#waitingFor);
      await untilAborted(Promise.all(waiting), this.#abort.signal);
      this.#waitingFor = null;
    }
    await checkGuest(guest, this.#abort.signal, this.#traits.rounds);
    const regions = guest.regions.map(({ region }) => region);
    this.#releaseRegions = claimRegions(guest);
    this.#session = await SourceSession.dial({
      to: options.to,
      secret: await this.secret,
      plaintext: options.plaintext,
      migrationId: this.id,
      connectTimeoutMs: options.connectTimeoutMs,
      peerTimeoutMs: options.peerTimeoutMs,
      signal: this.#abort.signal,
      onMessage: (message) => this.#onMessage(message),
      onLost: (error) => {
        this.#accepted.reject(error);
        this.#base?.fail(error);
        this.#grown?.reject(error);
        this.#gatherWait?.fail(error);
        this.#commit.connectionLost(error);
      },
    });
    const lengths = regions.map((region) => region.refresh());
    if (this.#traits.scatter) {
      this.#images = await stageImage({
        guest,
        lengths,
        options,
        secret: await this.secret,
        image: this.id,
        kind: 'migration',
        signal: this.#abort.signal,
      });
    }
    const wanted = wantedEncodings(options);
    if (!this.#images && options.dedup !== false) {
      this.#references = await OfferedReferences.make(
        options.dedup,
        await this.secret,
        this.#session.sessionKey,
        this.#migrationId,
      );
    }
    const offer = makeOffer(guest, lengths, options, {
      migrationId: this.#migrationId,
      sessionKey: this.#session.sessionKey,
      encodings: wanted,
      mayPage: this.#paging || options.onNonConvergence === 'post-copy',
      images: this.#images,
      references: this.#references,
    });
    this.#session.send(offer, offer.replay ? (options.replayLog ?? null) : null);
    rehearseSwitchover(); // while the destination makes up its mind
    const agreed = agreedEncodings(await untilAborted(this.#accepted.promise, this.#abort.signal), wanted);

    if (this.#traits.rounds) {
      trackersForRounds(guest, options, this.#trackers);
    } else {
      this.#trackers = this.#base ? trackersForBase(guest, options, this.#base) : regions.map(() => null);
    }
    this.#engine = new SourceEngine(
      engineConfig({
        guest,
        options,
        session: this.#session,
        migrationId: this.#migrationId,
        trackers: this.#trackers,
        images: this.#images,
        references: this.#references,
        encodings: { wanted, destination: agreed },
        basePages: comparablePages(this.#base, this.#trackers),
        // In rounds before gathering nobody could wait for what went as references.
        dedupInVmd: !this.#gathersFirst || this.#tellsMissing,
      }),
      {
        paused: () => this.#to('postcopy-paused'),
        recovered: () => {
          this.#to('postcopy-recover');
          this.#to('postcopy-active');
        },
        failed: (error) => this.#fail(error),
      },
    );
    await untilAborted(this.#engine.connect(), this.#abort.signal);
  }

  async #startFromBase(): Promise<void> {
    const base = this.#base;
    if (!base) return;
    if (!comparablePages(this.#base, this.#trackers)) {
      await base.decline('no dirty tracker that can be armed, and costs less than a base saves');
      return;
    }
    const pageSize = this.guest.regions[0]?.region.pageSize ?? 4096;
    const engine = this.#requireEngine();
    // Where pages are dropped while the guest is paused, none of the base may be left that was not confirmed.
    await base.run(
      engine,
      engine.stats().base.pagesWithContent * pageSize,
      pageSize,
      !this.#traits.rounds && this.#paging,
    );
  }

  /** The destination has every page before it prepares, though not all of them come from here. */
  get #gathersFirst(): boolean {
    return this.#traits.scatter && !this.#paging;
  }

  /** From the decision to switch over until all is there that PREPARE needs; the commit's state machine goes on. */
  async #switchOver(): Promise<void> {
    const engine = this.#requireEngine();
    this.#to('device');
    this.#measured.pauseAsked();
    const paused = await this.#commit.pause();
    this.#measured.paused(paused.pausedAtNs);
    this.#paused = paused;
    if (this.options.keepStaleCopy) this.#pausedState = paused.state;
    await this.#followGrowth();
    if (this.#paging) {
      const { switched } = engine.switchOver();
      this.#switched = switched;
      this.#measured.scanned();
      // The destination prepares when the switch has reached it: no need to wait for its answer here.
      this.#session?.send({ type: 'state', paging: true }, paused.state);
      this.#commit.transferred();
      await untilAborted(switched, this.#abort.signal);
      this.#measured.transferred();
    } else {
      engine.queueDirtyNow();
      this.#measured.scanned();
      this.#session?.send({ type: 'state', paging: false }, paused.state);
      const before = engine.stats();
      const servers = this.#images?.list.length ?? 0;
      const suspects = await untilAborted(
        // After rounds only what was written last is left, which nobody has.
        engine.settle(servers, !this.#traits.rounds),
        this.#abort.signal,
      );
      if (suspects > 0) {
        throw new MemferryError(
          'PROTOCOL_ERROR',
          `${suspects} pages of the paused guest arrived with checksums that do not fit: something still writes them`,
          { facts: { pages: suspects } },
        );
      }
      this.#measured.finalRound(before, engine.stats());
      this.#measured.transferred();
      this.#commit.transferred();
    }
  }

  async #afterResumed(): Promise<void> {
    const engine = this.#requireEngine();
    await tellDeparted(this.guest);
    // From here on no lease may end the image. The push need not wait for it; eviction does.
    const committed = this.#images?.commit();
    committed?.catch(() => {});
    if (this.#paging) {
      this.#to('postcopy-active');
      await engine.push();
    }
    // A server that has nothing of the guest any more need not answer.
    for (const [ordinal, { failed }] of engine.stats().servers.entries()) {
      if (failed !== null) this.#images?.giveUp(ordinal, failed);
    }
    await committed;
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
      trackers: this.#trackers,
      images: this.#images,
      base: this.#base,
      references: this.#references,
    });
    if (this.#images) {
      // For a destination that is still gathering when this side is gone.
      await this.#images.seal(digests).catch(() => {});
      // No fault is answered any more: the memory is its owner's again. The destination gathers the rest.
      engine.close(true, new MemferryError('CANCELLED', 'every page is elsewhere'));
    }
    this.#evicted.resolve(evicted);
    // The destination does not wait for this side's disk.
    const asked = this.#askSummary(digests);
    asked.catch(() => {});
    if (this.options.keepStaleCopy) {
      await keepStaleCopy(this.guest, this.#pausedState, this.options.keepStaleCopy);
    }
    await this.guest.release?.();
    const summary = await asked;
    if (summary.mismatched.length > 0) {
      const names = summary.mismatched.map((index) => this.guest.regions[index]?.name ?? String(index));
      throw new MemferryError('VERIFICATION_FAILED', `the digests of ${names.join(', ')} differ`, {
        facts: { regions: names },
      });
    }
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

  /** Tells the destination that all is sent, and takes its account; dials again when the connection is cut. */
  async #askSummary(digests: string[] | null): Promise<Extract<DestinationMessage, { type: 'summary' }>> {
    const session = this.#session as SourceSession;
    await session.keepTelling(
      { type: 'evicted', digests },
      this.#summary.promise,
      this.options.recoverTimeoutMs,
    );
    return this.#summary.promise;
  }

  #onMessage(message: DestinationMessage): void {
    switch (message.type) {
      case 'accepted':
        if (message.basePages) this.#baseOffered(message.basePages);
        this.#tellsMissing = message.tellsMissing;
        this.#references?.answered(message.references);
        this.#accepted.resolve(message.encodings);
        break;
      case 'base-progress':
        this.#base?.onProgress(message);
        break;
      case 'base-ready':
        this.#base?.onReady(message);
        break;
      case 'declined':
        // At once: the destination closes the connection now, and that must not be taken for the reason.
        this.#fail(fromPeer(message.code, message.message, message.names));
        break;
      case 'grown':
        this.#grown?.resolve();
        break;
      case 'missing':
        this.#gatherWait?.onMissing(message.pages, message.question);
        break;
      case 'prepared':
        this.#measured.prepared(message.prepareMs);
        break;
      case 'summary':
        this.#measured.complete();
        this.#summary.resolve(message);
        break;
      case 'complete':
        this.#measured.complete();
        break;
      case 'lost':
        this.#summary.reject(
          new MemferryError('PAGES_LOST', 'the destination lacks pages for good', {
            facts: { runs: message.runs },
          }),
        );
        break;
      case 'over':
        this.#summary.reject(
          new MemferryError(
            'PEER_LOST',
            'every page arrived, but the destination was restarted since, or has let go of the guest: how it fares is not known',
          ),
        );
        break;
      case 'session-resumed':
        break;
      default:
        // At once: what the machine makes of them takes a while to get back here.
        if (message.type === 'ready') {
          this.#measured.ready();
          // Never committed to a destination whose data connections have not answered: while they are cut this
          // waits for them, and the guest is still this side's when they do not come back.
          this.#switched.then(
            () => this.#grant(message),
            () => {},
          );
          break;
        }
        if (message.type === 'resumed') this.#measured.resumed();
        if (message.type === 'refused') this.#refusal.resolve(fromPeer(message.code, message.message));
        this.#commit.message(message);
    }
  }

  /** Nothing comes between the guest's word that it stands and GRANT. */
  #grant(ready: Extract<DestinationMessage, { type: 'ready' }>): void {
    const look = this.#commit.committed ? undefined : this.#paused?.stillPaused;
    if (!look) {
      this.#commit.message(ready);
      return;
    }
    look().then(
      () => this.#commit.message(ready),
      (error) => this.#fail(error),
    );
  }

  #baseOffered(basePages: readonly number[]): void {
    if (this.options.base === 'off' || this.#base) return;
    const { options } = this;
    this.#base = new StartFromBase(
      // A base of more pages than there are is one of something else.
      this.guest.regions.map(({ region }, index) => {
        const pages = basePages[index] ?? 0;
        return pages <= region.pages ? pages : 0;
      }),
      options,
      (message) => this.#session?.send(message),
      this.#abort.signal,
    );
  }

  /** Tells the destination of memory that has grown, before the engine may send pages of it. */
  async #followGrowth(): Promise<void> {
    for (const [index, { region }] of this.guest.regions.entries()) {
      const lengthBytes = region.measure();
      if (lengthBytes <= region.lengthBytes) continue;
      await this.#images?.grow(index, lengthBytes / region.pageSize);
      this.#grown = deferred();
      this.#session?.send({ type: 'grow', region: index, lengthBytes });
      const grown = untilAborted(this.#grown.promise, this.#abort.signal);
      // While the guest stands.
      await within(
        grown,
        this.options.prepareTimeoutMs,
        'PREPARE_TIMEOUT',
        'the memory did not grow with the guest',
      );
      region.native.grow(lengthBytes / region.pageSize);
    }
  }

  async #untilGathered(suspectPages: number): Promise<void> {
    if (!this.#gathersFirst || !this.#tellsMissing) return;
    this.#gatherWait ??= new GatherWait((message) => this.#session?.send(message), this.#abort.signal);
    const asked = this.#switchoverAsked;
    await this.#gatherWait.untilGathered(suspectPages, () => asked.settled, this.options.gatherTimeoutMs);
  }

  /** The guest is here (reclaimed), or nobody knows (in doubt, lost). */
  async #end(settlement: Exclude<Settlement, { outcome: 'departed' }>): Promise<void> {
    let { error } = settlement;
    if (settlement.outcome === 'reclaimed') {
      if (error.code === 'CHANNEL_LOST') error = regionGone(this.guest) ?? (await this.#reasonOf(error));
      else if (['REGION_GONE', 'SYSTEM'].includes(error.code)) error = ownerGone(this.guest) ?? error;
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

  /**
   * A destination that gives up ends its data connections and says why over the control connection: whichever
   * comes first. The guest runs here again already; only the error waits for the better account.
   */
  async #reasonOf(cut: MemferryError): Promise<MemferryError> {
    const late = new Promise<null>((resolve) => setTimeout(resolve, refusalGraceMs, null));
    const refusal = await Promise.race([this.#refusal.promise, late]);
    // What only repeats our own cancel says nothing new.
    return refusal && !['CHANNEL_LOST', 'CANCELLED'].includes(refusal.code) ? refusal : cut;
  }

  /** After the commit: the destination has the guest, and something went wrong with its pages or its account. */
  async #lost(cause: unknown): Promise<void> {
    const pending = this.#evicted.settled ? null : (this.#engine?.stats().pagesPending ?? 0);
    const error = afterCommit(cause, pending);
    try {
      // Whoever hears of it may let go of the guest at once.
      this.#engine?.close(false, error);
      this.#freeMemory();
    } finally {
      this.#to('failed');
      this.#evicted.reject(error);
      this.#done.reject(error);
      await this.#letGo(false, error);
    }
  }

  async #letGo(goodbye: boolean, reason: MemferryError): Promise<void> {
    this.#engine?.close(goodbye, reason);
    // What was staged for a guest that stays here is nobody's; a destination dissolves its own image.
    if (!this.#commit.committed) await this.#images?.dissolve().catch(() => {});
    await this.#images?.close();
    await this.#session?.close(goodbye);
    this.#freeMemory();
  }

  /** Of an engine that is closed. Twice is fine. */
  #freeMemory(): void {
    for (const tracker of this.#trackers) tracker?.close();
    this.#releaseRegions();
  }

  #requireEngine(): SourceEngine {
    if (!this.#engine) throw new MemferryError('CANCELLED', 'the migration is over');
    return this.#engine;
  }

  #to(state: MigrationState): void {
    if (state === this.#state || this.#done.settled) return;
    const previous = this.#state;
    this.#state = state;
    tellListeners(this, 'state', state, previous);
    this.#sample();
  }

  /** The guest's size, as last seen: a guest that was released has none any more. */
  #pagesTotal(): number {
    const regions = this.guest.regions.map(({ region }) => region);
    if (!regions.some((region) => region.closed)) {
      this.#pagesSeen = regions.reduce((sum, region) => sum + region.pages, 0);
    }
    return this.#pagesSeen;
  }

  #sample(): void {
    if (this.#done.settled && this.#state === 'completed') return;
    const sample: Progress = this.#measured.sample({
      state: this.#state,
      stats: this.#engine?.stats() ?? null,
      pagesTotal: this.#pagesTotal(),
      waitingFor: this.#waitingFor,
    });
    this.progress.push(sample);
  }
}
