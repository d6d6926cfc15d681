/**
 * `park`: a guest leaves with no destination chosen. Its memory and execution state go to VMD servers, and whoever
 * holds the ticket claims it later (`unpark`). The commit is that of a migration, with the image's home server in
 * the role of the destination: whose the guest is, is decided in one place. JavaScript thread.
 *
 *   setup ─ active ─ device (paused, everything to the servers) ─ completed
 */
import { randomBytes } from 'node:crypto';
import { stillArriving } from '../arrivals.js';
import { keepStaleCopy } from '../base-files.js';
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError } from '../errors.js';
import type { Guest, GuestModule } from '../guest.js';
import { lineageOf } from '../lineage.js';
import {
  formatAddress,
  type ParkOptions,
  parseAddress,
  type ResolvedParkOptions,
  resolveParkOptions,
} from '../options.js';
import { abortError, lastingAbort, untilAborted, within } from '../protocol/bounded.js';
import { agreedEncodings, encodingFlags, wantedEncodings } from '../protocol/encodings.js';
import type { DedupReport, EncodingReport, Intermediary } from '../report.js';
import type { StageClient } from '../staging/client.js';
import type { ServerFailure } from '../staging/image-set.js';
import { checkGuest, requireGuest } from './check-guest.js';
import { mayHaveServers } from './choose-servers.js';
import { claimRegions } from './claim-regions.js';
import { CommitDriver, type Settlement } from './commit-driver.js';
import { dedupReport } from './dedup-report.js';
import { SourceEngine } from './engine.js';
import { followGrowth } from './growth.js';
import { releaseGuest, tellDeparted } from './guest-hooks.js';
import { Holdings } from './holdings.js';
import { describeGuest, stageImage } from './stage-image.js';
import { callOut } from '../tell-listeners.js';

/** All that is needed to claim a parked guest: a secret, to be kept like one. */
export interface ParkTicket {
  /** 32 hex digits. */
  image: string;
  /** 64 hex digits. */
  secret: string;
  /** `host:port` of the home server, which knows the others. */
  home: string;
  /** Whose it is, as `park` knew it: its image is a base for the same guest alone (`listen({ base })`). */
  guest?: {
    name: string;
    module: GuestModule | null;
    /** 64 hex digits; whoever unparks the guest has the same. */
    lineage: string;
  };
}

/** What the source knows when the guest is parked. */
export interface ParkReport {
  /** What `unpark` takes. A secret, to be kept like one. */
  ticket: ParkTicket;
  /** The guest's name. */
  guest: string;
  /** Bytes of all regions. */
  heapBytes: number;
  /** Start until the source holds nothing that anyone still needs. */
  evictionMs: number;
  /** From when the guest stood until it was parked. */
  pausedMs: number;
  /** Written to data connections, headers included. */
  bytesOnWire: number;
  /** Pages with content, counted each time that they were sent. */
  pagesSent: number;
  /** Pages that went as zeros. */
  pagesZero: number;
  /** lz4 and zstd. */
  compression: EncodingReport;
  /** With `replicas: 2`: pages that one server alone keeps, since no second one lived. */
  pagesWithOneCopy: number;
  /** What each server holds. */
  intermediaries: Intermediary[];
  /** What deduplication did; null where it was not asked for. */
  dedup: DedupReport | null;
}

/**
 * Parks a guest. Rejects before the commit with the guest running on here; with MIGRATION_IN_DOUBT when the home
 * server did not answer after it (`onInDoubt`): the guest may be parked there, and never runs here again.
 * @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED, VMD_CAPACITY, VMD_LOST, REGION_BUSY, GUEST_BUSY, ...
 */
export async function park(guest: Guest, options: ParkOptions): Promise<ParkReport> {
  const resolved = resolveParkOptions(options);
  requireGuest(guest);
  const secret = await openSecret(resolved);
  const parking = new Parking(guest, resolved, secret);
  try {
    return await parking.run();
  } finally {
    await parking.close();
  }
}

/** That nothing is wrong with them as far as it can be seen without a guest and without dialling anybody. */
export async function checkParkOptions(options: ParkOptions): Promise<void> {
  const resolved = resolveParkOptions(options);
  mayHaveServers(resolved);
  await openSecret(resolved);
}

/** Rejects with PLAINTEXT_REQUIRED, AUTH_FAILED, INVALID_ARGUMENT. */
async function openSecret(options: ResolvedParkOptions): Promise<Uint8Array> {
  const hosts = options.via.map((address) => parseAddress(address).host);
  for (const host of hosts) checkAddressPolicy(host, { plaintext: options.plaintext });
  return loadSecret(options, { loopback: hosts.every(isLoopback) });
}

class Parking {
  readonly #id = randomBytes(16);
  readonly #abort = lastingAbort();
  readonly #held = new Holdings();
  #parked = false;
  readonly #stop = (): void => this.#abort.abort(abortError(this.options.signal as AbortSignal));
  /** For the stale copy. */
  #pausedState: Uint8Array = new Uint8Array();

  constructor(
    private readonly guest: Guest,
    private readonly options: ResolvedParkOptions,
    private readonly secret: Uint8Array,
  ) {
    const { signal } = options;
    if (signal?.aborted) this.#stop();
    else signal?.addEventListener('abort', this.#stop, { once: true });
  }

  async run(): Promise<ParkReport> {
    const { guest, options } = this;
    const started = performance.now();
    const arriving = stillArriving(guest.regions.map(({ region }) => region));
    await untilAborted(Promise.all(arriving), this.#abort.signal);
    await checkGuest(guest, this.#abort.signal);
    const regions = guest.regions.map(({ region }) => region);
    this.#held.releaseRegions = claimRegions(guest);
    const lengths = regions.map((region) => region.refresh());
    const image = this.#id.toString('hex');
    const images = await stageImage({
      guest,
      lengths,
      options,
      secret: this.secret,
      image,
      kind: 'park',
      signal: this.#abort.signal,
    });
    if (!images)
      throw new MemferryError('VMD_CAPACITY', 'no server was named, and nobody else can hold the guest');
    this.#held.images = images;
    const [home] = images.list;
    const ticket: ParkTicket = {
      image,
      secret: Buffer.from(images.secret).toString('hex'),
      home: formatAddress(home?.host ?? '', home?.port),
      guest: {
        name: guest.name,
        module: guest.module,
        lineage: Buffer.from(lineageOf(regions)).toString('hex'),
      },
    };
    const engine = new SourceEngine(
      {
        regions: regions.map((region) => region.native),
        toldPages: regions.map(({ pageSize }, index) => (lengths[index] ?? 0) / pageSize),
        trackers: regions.map(() => null),
        host: '127.0.0.1',
        port: 0,
        migration: this.#id,
        channels: 1,
        tokens: new Uint8Array(2 * 32),
        bandwidth: options.bandwidth,
        connectTimeoutMs: options.connectTimeoutMs,
        recoverTimeoutMs: options.recoverTimeoutMs,
        servers: images.servers,
        replicas: options.replicas,
        compress: options.compress,
        destinationEncodings: 0,
        serverEncodings: encodingFlags(agreedEncodings(images.encodings, wantedEncodings(options))),
        deltaCacheBytes: 0,
        direct: false,
        stallTimeoutMs: options.stallTimeoutMs,
        releaseAsEvicted: false,
        dedupKey: images.domainKey,
      },
      { paused: () => {}, recovered: () => {}, failed: (error) => driver.fail(error) },
    );
    this.#held.engine = engine;
    const link = images.home.commitLink(image, {
      onMessage: (message) => (message.type === 'ready' ? driver.ready(message) : driver.message(message)),
      onLost: (error) => driver.connectionLost(error),
    });
    const driver: CommitDriver = new CommitDriver(guest, {
      timeoutsMs: {
        pause: options.pauseTimeoutMs,
        ready: options.prepareTimeoutMs,
        doubt: options.inDoubtTimeoutMs,
        retry: 500,
      },
      ...link,
    });
    this.#abort.signal.addEventListener('abort', () => driver.fail(this.#abort.signal.reason), {
      once: true,
    });
    let pausedAt = started;
    const flow = (async () => {
      await untilAborted(engine.connect(), this.#abort.signal);
      await untilAborted(engine.queuePopulated(), this.#abort.signal);
      const paused = await driver.pause();
      pausedAt = performance.now();
      if (options.keepStaleCopy) this.#pausedState = paused.state;
      // Memory that has grown since the image was made.
      await followGrowth(guest.regions, lengths, engine, (index, _, pages) => images.grow(index, pages));
      engine.queueDirtyNow();
      const { suspects, failed } = await untilAborted(engine.settle(true), this.#abort.signal);
      if (suspects > 0) {
        throw new MemferryError(
          'PROTOCOL_ERROR',
          `${suspects} pages of the paused guest changed while they were sent`,
        );
      }
      for (const ordinal of failed) images.giveUp(ordinal, "it did not take the guest's pages");
      await images.seal(await Promise.all(regions.map((_, index) => engine.digest(index))));
      await images.putState(
        describeGuest(
          guest,
          regions.map((region) => region.refresh()),
        ),
        paused.state,
      );
      await images.commit();
      throwIfLost(images.failures, failed, options.replicas);
      // The guest stands meanwhile, and nothing else would end this.
      await within(
        untilAborted(Promise.resolve(options.onTicket?.(ticket)), this.#abort.signal),
        options.prepareTimeoutMs,
        'PREPARE_TIMEOUT',
        `onTicket did not end within ${options.prepareTimeoutMs} ms`,
      );
      driver.transferred();
    })().catch((error) => driver.fail(error));
    const settlement = await this.#untilKnown(driver, await driver.settled);
    await flow;
    if (settlement.outcome !== 'departed') {
      if (settlement.outcome === 'reclaimed') {
        await within(cancelAtHome(link), options.connectTimeoutMs, 'PEER_LOST', 'not heard').catch(() => {});
        await images.dissolve().catch(() => {});
        // Whoever hears of it may let go of the guest at once, or move it again.
        await driver.unpaused();
      } else this.#parked = true; // perhaps
      throw settlement.error;
    }
    this.#parked = true;
    const stats = engine.stats();
    const now = performance.now();
    const heapBytes = regions.reduce((sum, region) => sum + region.lengthBytes, 0);
    await tellDeparted(guest);
    engine.close(true, new MemferryError('CANCELLED', 'the guest is parked'));
    if (options.keepStaleCopy) await keepStaleCopy(guest, this.#pausedState, options.keepStaleCopy);
    await releaseGuest(guest);
    return {
      ticket,
      guest: guest.name,
      heapBytes,
      evictionMs: now - started,
      pausedMs: now - pausedAt,
      bytesOnWire: stats.bytesOnWire,
      pagesSent: stats.pagesSent,
      pagesZero: stats.pagesZero,
      compression: stats.compression,
      pagesWithOneCopy: stats.pagesSingle,
      intermediaries: images.account(stats.servers),
      dedup: stats.dedup && dedupReport(stats.dedup, regions[0]?.pageSize ?? 4096),
    };
  }

  /** In doubt it asks on, where the caller wants that. */
  async #untilKnown(driver: CommitDriver, first: Settlement): Promise<Settlement> {
    const { onInDoubt } = this.options;
    if (first.outcome !== 'in-doubt' || !onInDoubt) return first;
    callOut(
      { what: 'the guest is in doubt, and onInDoubt', code: 'MEMFERRY_IN_DOUBT_THREW' },
      onInDoubt,
      first.error,
    );
    let last: Settlement = first;
    try {
      // Each time for as long as it took to be in doubt.
      while (last.outcome === 'in-doubt')
        last = await untilAborted(driver.resolve('ask-again'), this.#abort.signal);
    } catch {
      driver.release();
      return first; // given up
    }
    return last;
  }

  async close(): Promise<void> {
    this.options.signal?.removeEventListener('abort', this.#stop);
    const over = new MemferryError('CANCELLED', 'the parking is over');
    await this.#held.letGo(this.#parked, over, false);
  }
}

/**
 * What a server had that does not hold it is lost when its lease ends, if not already. With a second copy of everything
 * one may go; but where one was given up before, its pages have had one copy since.
 */
function throwIfLost(failures: readonly ServerFailure[], givenUp: readonly number[], replicas: number): void {
  const away = failures.filter(({ ordinal }) => !givenUp.includes(ordinal));
  const [first] = away;
  if (first && away.length + (replicas > 1 ? givenUp.length : 0) >= replicas) throw first.error;
}

/** A home server that was READY when its connection was cut has not heard of it, and lets nobody dissolve the image. */
async function cancelAtHome(link: ReturnType<StageClient['commitLink']>): Promise<void> {
  const cancel = () =>
    link.send({ type: 'cancel', epoch: 0, code: 'CANCELLED', message: 'the guest was not parked' });
  try {
    cancel();
  } catch {
    await link.redial();
    cancel();
  }
}
