/**
 * From an offer that a listener admits to an arrival: what the guest needs here is opened and made, or let go of again.
 * JavaScript thread.
 */
import { baseKey, dataTokens } from '../control/tokens.js';
import { requireFree } from '../arrivals.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { mayBeBase } from '../lineage.js';
import type { NativeListener } from '../native.js';
import type { ResolvedListenOptions } from '../options.js';
import { whileOpening } from '../protocol/bounded.js';
import type { DestinationState } from '../protocol/commit-destination.js';
import { maxEpochs } from '../protocol/epochs.js';
import type { OfferMessage } from '../protocol/messages.js';
import type { AgreedReferences } from '../protocol/references.js';
import { unsealLineage, unsealSecret } from '../staging/image-secret.js';
import { imageConnection } from '../staging/image-member.js';
import { openImage } from '../staging/image-opening.js';
import type { ImageSet } from '../staging/image-set.js';
import { Arrival } from './arrival.js';
import type { ArrivalLink } from './arrival-config.js';
import { abandonGuest } from './arrived.js';
import { basesOf } from './base.js';
import type { Domain } from './dedup-domain.js';
import { makeArriving } from './make-arriving.js';
import type { Booking, MemoryBudget } from './memory-budget.js';
import { ParkedBase } from './parked-base.js';

/** What a listener has for all of its arrivals. */
export interface AcceptanceHost {
  secret: Uint8Array;
  domain: Domain;
  listener: NativeListener;
  budget: MemoryBudget;
  /** The listener closes. */
  closing: AbortSignal;
}

/** What came over one connection. */
export interface OfferReceived {
  offer: OfferMessage;
  replayLog: Uint8Array | null;
  sessionKey: Uint8Array;
}

export class Acceptance {
  readonly #migration: Buffer;
  /** The offer, as the guest's owner is given it. */
  readonly #given: GuestOffer;
  #images: ImageSet | null = null;
  #guest: ArrivingGuest | null = null;
  #making: Promise<void> = Promise.resolve();
  #parked: ParkedBase | null = null;
  #parkedMemory: Booking | null = null;
  #replayMemory: Booking | null = null;
  #references: AgreedReferences | null = null;

  /** `booking`: the guest's memory. Throws AUTH_FAILED: a lineage that was not sealed for this session. */
  constructor(
    private readonly host: AcceptanceHost,
    private readonly received: OfferReceived,
    private readonly booking: Booking,
  ) {
    const { offer, replayLog, sessionKey } = received;
    this.#migration = Buffer.from(offer.migrationId, 'hex');
    this.#given = {
      ...offer.guest,
      description: offer.guest.description,
      ...(replayLog ? { replayLog } : {}),
      ...(offer.lineage ? { lineage: unsealLineage(sessionKey, this.#migration, offer.lineage) } : {}),
    };
  }

  /** For the source: both are of one deduplication domain. */
  get referencesProof(): string | null {
    return this.#references?.proof ?? null;
  }

  /** Never rejects. Until then the owner's `accept` goes on, whether anybody waits for it or not. */
  get made(): Promise<void> {
    return this.#making;
  }

  /** All that takes time. Rejects why the offer is declined. */
  async make(options: ResolvedListenOptions): Promise<void> {
    this.#images = await this.#openImages(options);
    this.#guest = await this.#makeGuest(options);
    this.host.closing.throwIfAborted();
  }

  /** In one go, so that nothing of the arrival happens before its listener knows it. Throws why the offer is declined. */
  arrive(
    options: ResolvedListenOptions,
    link: ArrivalLink,
    tell: { decided(state: DestinationState): void; ended(): void },
  ): Arrival {
    const { listener, budget, domain } = this.host;
    const { offer, sessionKey } = this.received;
    const guest = this.#guest as ArrivingGuest;
    const given = this.#given;
    const migration = this.#migration;
    if (given.replayLog && guest.replay?.memoryBytes) {
      this.#replayMemory = budget.tryBookReplay(guest.replay.memoryBytes);
      // Its base is what it is.
      if (!this.#replayMemory) delete given.replayLog;
    }
    requireFree(guest.regions);
    if (offer.base) this.#openParked(guest, options);
    this.#references = offer.scatter ? null : domain.agree(offer, sessionKey, migration);
    const arrival = new Arrival({
      offer,
      given,
      guest,
      listener,
      link,
      baseKey: baseKey(sessionKey, migration),
      bases: this.#parked?.bases(offer.guest.regions.map(({ name }) => name)) ?? guest.bases,
      tokens: dataTokens(sessionKey, migration, maxEpochs, offer.channels),
      options,
      images: this.#images,
      known: this.#references && {
        key: this.#references.key,
        share: (this.#references.ofDomain && domain.share?.path) || null,
      },
      grows: (bytes) => this.booking.grow(bytes, `the guest grows by ${bytes} bytes`),
      decided: tell.decided,
      ended: () => {
        this.booking.release();
        this.#parkedMemory?.release();
        tell.ended();
      },
    });
    const filled = () => this.#baseFilled();
    arrival.baseFilled.then(filled, filled).catch((error) => {
      // So it counts for as long as the arrival does.
      process.emitWarning(`what was read of the parked base is still held: ${String(error)}`, {
        code: 'MEMFERRY_CLOSE_FAILED',
      });
    });
    return arrival;
  }

  /** It came to nothing. */
  async undo({ prepareTimeoutMs }: ResolvedListenOptions): Promise<void> {
    this.#baseFilled();
    if (this.#guest) await abandonGuest(this.#guest, this.#given.name, prepareTimeoutMs);
    await this.#images?.close();
  }

  #baseFilled(): void {
    this.#replayMemory?.release();
    this.#parked?.close();
    this.#parkedMemory?.release();
  }

  /** The servers that hold what the source does not send here itself. Rejects when one cannot be reached. */
  async #openImages(options: ResolvedListenOptions): Promise<ImageSet | null> {
    const { secret: hostsSecret, closing } = this.host;
    const { offer, sessionKey } = this.received;
    if (!offer.scatter) return null;
    const secret = unsealSecret(sessionKey, this.#migration, offer.scatter.sealedSecret);
    const { servers } = offer.scatter;
    // An arrival that is complete when the listener closes has an image to let go of.
    return whileOpening(closing, (opening) =>
      openImage(servers, imageConnection(hostsSecret, options, opening), {
        ...{ image: offer.migrationId, secret, access: 'read', required: 'all' },
      }),
    );
  }

  async #makeGuest(options: ResolvedListenOptions): Promise<ArrivingGuest> {
    const making = makeArriving(options.accept, this.#given, { signal: this.host.closing }, options);
    this.#making = making.over;
    return making.guest;
  }

  /** Not where the listener has none for this guest, nor where there is no room to read it. */
  #openParked(guest: ArrivingGuest, options: ResolvedListenOptions): void {
    const { secret, budget } = this.host;
    const { base, gatherLimit, recoverTimeoutMs } = options;
    const known = base?.parked.guest;
    if (!base || !known || basesOf(guest)) return;
    const stored = { ...known, lineage: Buffer.from(known.lineage, 'hex') };
    if (!mayBeBase(stored, this.#given, base)) return;
    this.#parkedMemory = budget.tryBook(this.booking.bytes);
    if (!this.#parkedMemory) return;
    const connection = imageConnection(secret, options);
    const reading = { connection, maxBytes: this.booking.bytes, recoverTimeoutMs, gatherLimit };
    this.#parked = new ParkedBase(base.parked, reading);
  }
}
