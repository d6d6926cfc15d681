/**
 * `unpark`: a parked guest is claimed at its home server, resumed here, and gathered by post-copy. The home server
 * grants one claim; until it has granted this one, nothing runs here. JavaScript thread.
 */
import { randomBytes } from 'node:crypto';
import { markArriving, requireFree } from '../arrivals.js';
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError, native } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { inherit } from '../lineage.js';
import {
  parseAddress,
  parseTicket,
  type ResolvedUnparkOptions,
  resolveUnparkOptions,
  type UnparkOptions,
} from '../options.js';
import { abortError, lastingAbort, untilAborted, whileOpening, within } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import { encodingFlags, packedByServers } from '../protocol/encodings.js';
import type { Region } from '../region.js';
import type { ArrivalReport } from '../report.js';
import type { ParkTicket } from '../source/park.js';
import type { Claim } from '../staging/client.js';
import { imageConnection, type ServerAddress } from '../staging/image-member.js';
import { openParkedImage } from '../staging/image-opening.js';
import type { ImageSet } from '../staging/image-set.js';
import { abandonGuest, arrivalReport, pagesLost, resumeHere, tellLost } from './arrived.js';
import { DestinationEngine } from './engine.js';
import { makeArriving } from './make-arriving.js';
import { checkBaseRegions, type UnparkBase, unparkBase } from './unpark-base.js';

/** A guest that was parked and runs here now; its pages follow. */
export interface Unparked extends AsyncDisposable {
  /** What was said of the guest when it was parked. */
  readonly offer: GuestOffer;
  /** What `accept` made; without one, plain regions. */
  readonly guest: ArrivingGuest;
  /** The guest's memory here, in the order of the offer. */
  readonly regions: readonly Region[];
  /**
   * Every page is here, and the servers have let go of the image. Rejects with PAGES_LOST (and the runs) before the lost
   * pages are poisoned, with VERIFICATION_FAILED, and with CANCELLED when the guest was closed before.
   */
  readonly complete: Promise<ArrivalReport>;
  /**
   * No page comes any more: each is here or lost for good, or the guest was closed. After PAGES_LOST the others still come
   * until then, and closing the guest loses them. Never rejects.
   */
  readonly restHere: Promise<void>;
  /** Lets go of the connections to the servers: pages that have not come are lost. The guest's memory stays. Twice is fine. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Between two attempts to learn whether the claim was granted. */
const askAgainMs = 250;
/** Until the servers have told where pages are. */
const askReachMs = 20;

/**
 * Claims and resumes a parked guest. When it rejects the guest does not run here; with MIGRATION_IN_DOUBT nobody
 * knows whether the home server has granted the claim, or whether the guest was let go of here (its `abandon` failed):
 * only `rollback` brings it back.
 * Servers that are away are waited for, for `connectTimeoutMs`; where they have pages that no other has, the guest stays
 * parked (CONNECT_FAILED, PEER_LOST, VMD_LOST, with the server's name), but for `withLosses`.
 * With `base` only pages that differ from what this host has are gathered; the report says how many did not come.
 * @throws INVALID_ARGUMENT, VMD_REFUSED (somebody else has it, or had it), VMD_LOST, AUTH_FAILED, PREPARE_FAILED, ...
 */
export async function unpark(ticket: ParkTicket, options: UnparkOptions = {}): Promise<Unparked> {
  const resolved = resolveUnparkOptions(options);
  const home = parseAddress(parseTicket(ticket).home);
  checkAddressPolicy(home.host, { plaintext: resolved.plaintext });
  const secret = await loadSecret(resolved, { loopback: isLoopback(home.host) });
  const signal = resolved.signal ?? new AbortController().signal;
  const { images, claim } = await claimImage(ticket, home, secret, resolved, signal);
  let guest: ArrivingGuest | null = null;
  let arriving: GatheringGuest | null = null;
  try {
    const offer: GuestOffer = { ...claim.guest, description: claim.guest.description };
    // For `readBase`; not to be shown to whoever looks at `offer` later.
    const known = ticket.guest ? { ...offer, lineage: Buffer.from(ticket.guest.lineage, 'hex') } : offer;
    guest = await makeArriving(resolved.accept, known, { signal, state: claim.state }, resolved).guest;
    requireFree(guest.regions);
    const base = await unparkBase(guest, known, resolved.base);
    arriving = new GatheringGuest(ticket, offer, guest, images, base, resolved);
    const cancelled = AbortSignal.any([signal, arriving.broken]);
    const made = guest;
    // Of a guest that is prepared the signal ends nothing any more.
    const prepared = whileOpening(cancelled, async (signal) => made.prepare(claim.state, { signal }));
    await within(
      untilAborted(prepared, cancelled),
      resolved.prepareTimeoutMs,
      'PREPARE_TIMEOUT',
      `prepare did not end within ${resolved.prepareTimeoutMs} ms`,
    );
    if (!resolved.withLosses) {
      await untilAborted(withinReach(images, arriving.engine, resolved.recoverTimeoutMs), cancelled);
    }
    // The last moment: whatever comes after the question, its answer has to be waited for.
    if (cancelled.aborted) throw abortError(cancelled);
    await granted(images, resolved.inDoubtTimeoutMs);
    arriving.resume();
    return arriving;
  } catch (error) {
    arriving?.abandon(error);
    // Whoever claims the guest next has the only one that may run.
    const letGo = !guest || (await abandonGuest(guest, claim.guest.name, resolved.prepareTimeoutMs));
    if (letGo) await images.release().catch(() => {});
    const reason = letGo ? asPrepareError(error) : await keepClaim(images, error, resolved.inDoubtTimeoutMs);
    await images.close();
    throw reason;
  }
}

/**
 * The owner could not let go of a guest that has its execution state, and perhaps all of its pages: nobody knows whether
 * somebody lets it run. A claim that was not granted would go back by itself soon after this connection's end. A granted
 * one stays, so nobody else gets the guest without saying that this owner is dead. Gives the error to throw.
 */
async function keepClaim(images: ImageSet, cause: unknown, timeoutMs: number): Promise<MemferryError> {
  const why = cause instanceof Error ? cause.message : String(cause);
  const text = `the guest was not let go of (abandon() failed), and may still run here; ${why}`;
  try {
    await granted(images, timeoutMs);
    await within(images.othersTold(), timeoutMs, 'PEER_LOST', 'a server did not hear of it').catch(() => {});
    return new MemferryError(
      'MIGRATION_IN_DOUBT',
      `${text}; its claim stays, only a rollback brings it back`,
      {
        cause,
      },
    );
  } catch (error) {
    // Somebody else has it by now, or the home server is not there to keep it: end what is left of it here.
    const claim = `its claim may go to others: ${(error as Error).message}`;
    return new MemferryError('MIGRATION_IN_DOUBT', `${text}; ${claim}`, { cause });
  }
}

async function claimImage(
  ticket: ParkTicket,
  home: ServerAddress,
  secret: Uint8Array,
  options: ResolvedUnparkOptions,
  signal: AbortSignal,
): Promise<{ images: ImageSet; claim: Claim }> {
  return whileOpening(signal, async (claiming) => {
    const images = await openParkedImage(home, imageConnection(secret, options, claiming), {
      ...{ image: ticket.image, secret: Buffer.from(ticket.secret, 'hex'), access: 'read' },
    });
    try {
      checkBaseRegions(options.base, images.info);
      if (!options.withLosses) await images.openMissing(options.connectTimeoutMs);
      return { images, claim: await images.claim({ rollback: options.rollback }) };
    } catch (error) {
      await images.close();
      throw error;
    }
  });
}

/**
 * Once it is resumed there is no way back, and a page that only a server has that is away would be missed. One that had
 * nothing any more, since it was away as the guest was parked, is not.
 */
async function withinReach(images: ImageSet, engine: DestinationEngine, timeoutMs: number): Promise<void> {
  const away = images.missing;
  const ordinal = away.indexOf(true);
  const failure = images.failures.find((each) => each.ordinal === ordinal);
  if (!failure) return;
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const reach = native(() => engine.receiver.reach(away));
    if (reach.away === 0 && reach.unknown === 0) return;
    if (reach.away > 0 || performance.now() > deadline) {
      throw new MemferryError(
        failure.error.code,
        `${failure.error.message}; ${reach.away} pages are there and nowhere else, and the guest stays parked`,
        { cause: failure.error, facts: { server: failure.name, pages: reach.away } },
      );
    }
    await new Promise((resolve) => setTimeout(resolve, askReachMs));
  }
}

/** Asks until the home server has said yes or no: a claim that was granted once stays granted for its claimant. */
async function granted(images: ImageSet, timeoutMs: number): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  // Nothing was asked yet: the claim goes back with its connection.
  if (images.home.ended) throw images.home.ended;
  for (;;) {
    try {
      return await images.grant();
    } catch (error) {
      const { code } = error as MemferryError;
      if (code === 'VMD_REFUSED' || code === 'VMD_LOST' || code === 'INVALID_ARGUMENT') throw error;
      if (images.home.ended || performance.now() > deadline) {
        throw new MemferryError(
          'MIGRATION_IN_DOUBT',
          'the home server did not say whether the claim was granted; the guest does not run here: ' +
            (error as Error).message,
          { cause: error },
        );
      }
      await new Promise((resolve) => setTimeout(resolve, askAgainMs));
    }
  }
}

class GatheringGuest implements Unparked {
  readonly engine: DestinationEngine;
  readonly #complete = deferred<ArrivalReport>();
  readonly #everyPage = deferred<void>();
  readonly #restHere = deferred<void>();
  /** The guest was granted and runs here: from then on its image may go. */
  readonly #granted = deferred<void>();
  #resumedAt = 0;
  #closed = false;
  #notRunning: string | null | Promise<string | null> = null;
  readonly #broken = lastingAbort();
  #arrival: Promise<void> | null = null;

  constructor(
    ticket: ParkTicket,
    readonly offer: GuestOffer,
    readonly guest: ArrivingGuest,
    private readonly images: ImageSet,
    private readonly base: UnparkBase,
    options: ResolvedUnparkOptions,
  ) {
    this.#complete.promise.catch(() => {});
    const broken = (error: unknown) => this.#broken.abort(asPrepareError(error));
    guest.broken?.then(broken, broken);
    this.engine = new DestinationEngine(
      {
        regions: guest.regions.map((region) => region.native),
        migration: Buffer.from(ticket.image, 'hex'),
        channels: 1,
        // Nobody dials: there is no source.
        tokens: randomBytes(2 * 32),
        discardFirst: true,
        pagingFromStart: true,
        mayPage: true,
        keepPageHashes: options.verify,
        recoverTimeoutMs: options.recoverTimeoutMs,
        lossGraceMs: 250,
        servers: images.servers,
        gatherLimit: options.gatherLimit,
        bandwidth: 0,
        sourceless: true,
        encodings: encodingFlags(packedByServers),
        ...(base.images ? { baseImages: base.images } : {}),
      },
      {
        paused: () => {},
        recovered: () => {},
        lost: (runs, why) => this.#lost(runs, why),
        // The image stays: a server that comes back makes it whole, for `rollback` or its operator.
        restHere: () => this.#restHere.resolve(),
        failed: (error) => {
          this.#fail(error);
          this.#restHere.resolve();
        },
      },
    );
    if (ticket.guest) inherit(guest.regions, Buffer.from(ticket.guest.lineage, 'hex'));
    for (const region of guest.regions) markArriving(region, this.#everyPage.promise);
    this.#everyPage.promise.catch(() => {});
    this.engine.complete.then(
      () => this.#restHere.resolve(),
      () => {},
    );
    // A small guest has all of its pages here before the home server has granted it.
    Promise.all([this.engine.complete, this.#granted.promise])
      .then(() => {
        this.#arrival = this.#arrived(options.verify);
        return this.#arrival;
      })
      .catch((error) => this.#fail(error));
  }

  get regions(): readonly Region[] {
    return this.guest.regions;
  }

  /** It must not be resumed here any more; the reason is a MemferryError. */
  get broken(): AbortSignal {
    return this.#broken.signal;
  }

  /** It was not granted. A prepare that goes on is told. */
  abandon(why: unknown): void {
    this.#broken.abort(asPrepareError(why));
    this.engine.close(new MemferryError('CANCELLED', 'the guest was not granted'));
  }

  get complete(): Promise<ArrivalReport> {
    return this.#complete.promise;
  }

  get restHere(): Promise<void> {
    return this.#restHere.promise;
  }

  resume(): void {
    this.#resumedAt = performance.now();
    this.#notRunning = resumeHere(this.guest, this.offer.name);
    this.#granted.resolve();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    this.#restHere.resolve();
    const error = new MemferryError('CANCELLED', 'the guest was closed before every page was here');
    if (this.#arrival) {
      // Its image is being let go of.
      await this.#arrival.catch(() => {});
    } else {
      this.#reject(error);
    }
    this.engine.close(error);
    await this.images.close();
  }

  async #arrived(verify: boolean): Promise<void> {
    const gatherMs = performance.now() - this.#resumedAt;
    const digests = verify ? (this.images.info?.digests ?? null) : null;
    for (const [index, digest] of digests?.entries() ?? []) {
      if ((await this.engine.receiver.digest(index)) !== digest) {
        throw new MemferryError(
          'VERIFICATION_FAILED',
          `the digest of ${this.offer.regions[index]?.name} differs`,
        );
      }
    }
    this.#everyPage.resolve();
    const stats = this.engine.receiver.stats();
    await this.images.dissolve().catch(() => {});
    await this.images.close();
    const told = {
      migrationId: this.images.image,
      guest: this.offer.name,
      notRunning: await this.#notRunning,
      verified: digests ? true : null,
      prepareMs: 0,
      gatherMs,
      baseProblem: this.base.problem,
      intermediaries: this.images.account(stats.servers),
    };
    this.#complete.resolve(arrivalReport(told, this.regions, stats));
  }

  #lost(runs: { region: number; first: number; count: number }[], why: string): void {
    this.#fail(pagesLost(this.offer.name, runs, why));
    tellLost(this.guest, this.offer.name, runs);
    setImmediate(() => {
      if (!this.#closed) this.engine.receiver.acknowledgeLoss();
    });
  }

  /** Before the guest is granted there is nothing to go on with: `unpark` rejects, and the guest stays parked. */
  #fail(error: MemferryError): void {
    this.#broken.abort(error);
    this.#reject(error);
  }

  #reject(error: MemferryError): void {
    this.#everyPage.reject(error);
    this.#complete.reject(error);
  }
}

function asPrepareError(error: unknown): MemferryError {
  if (error instanceof MemferryError) return error;
  return new MemferryError('PREPARE_FAILED', error instanceof Error ? error.message : String(error), {
    cause: error,
  });
}
