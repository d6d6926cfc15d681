/**
 * `listen`: the destination's entry. One port; control connections are authenticated here, data connections in
 * the native listener. JavaScript thread.
 */
import { Socket } from 'node:net';
import { loadAddon } from '../addon.js';
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { ControlChannel } from '../control/channel.js';
import { HandshakeGate } from '../control/gate.js';
import { loadSecret } from '../control/secret.js';
import { baseKey, dataTokens } from '../control/tokens.js';
import { MemferryError, native } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { mayBeBase } from '../lineage.js';
import type { NativeListener } from '../native.js';
import {
  type ListenOptions,
  parseAddress,
  type ResolvedListenOptions,
  resolveListenOptions,
} from '../options.js';
import { whileOpening, within } from '../protocol/bounded.js';
import { Tombstones } from '../protocol/commit-tombstones.js';
import { deferred } from '../protocol/deferred.js';
import { agreedEncodings, decodedHere } from '../protocol/encodings.js';
import {
  type DestinationMessage,
  type OfferMessage,
  type SourceMessage,
  sourceMessage,
} from '../protocol/messages.js';
import { toPeer } from '../protocol/peer-error.js';
import { type AgreedReferences, agreeOnReferences } from '../protocol/references.js';
import { provesResume } from '../protocol/resume-proof.js';
import { sharePath } from '../share/share-path.js';
import { dedupDomainKey } from '../source/dedup-domain.js';
import { unsealLineage, unsealSecret } from '../staging/image-secret.js';
import { ImageSet, imageConnection } from '../staging/image-set.js';
import type { Region } from '../region.js';
import { rehearseSwitchover } from '../rehearsal.js';
import type { ArrivalReport, MigrationState } from '../report.js';
import { maxEpochs } from '../protocol/epochs.js';
import { Arrival as ArrivalInProgress } from './arrival.js';
import { basesOf } from './base.js';
import { ParkedBase } from './parked-base.js';
import { allocateGuest } from './plain-guest.js';

/** A guest on its way in, or arrived. */
export interface Arrival extends AsyncDisposable {
  /** 32 hex digits, the source's. */
  readonly id: string;
  readonly offer: GuestOffer;
  readonly guest: ArrivingGuest;
  readonly regions: readonly Region[];
  readonly state: MigrationState;
  /** When the source has paused the guest; rejects when the migration fails before. */
  readonly executionState: Promise<Uint8Array>;
  /** The guest runs here. Rejects when it never will. */
  readonly resumed: Promise<void>;
  /** Every page is here. Rejects with PAGES_LOST (and the runs) before the lost pages are poisoned. */
  readonly complete: Promise<ArrivalReport>;
  on(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
}

/** Yields each guest when its first page is about to come. */
export interface Listening extends AsyncDisposable, AsyncIterable<Arrival> {
  readonly host: string;
  readonly port: number;
  /** New limits for what is arriving and what will arrive, in bytes a second; 0 for none. */
  limit(limits: { bandwidth?: number; gatherLimit?: number }): void;
  /** Ends the listening; arrivals that have not resumed fail, missing pages of those that have are lost. */
  close(): Promise<void>;
}

/** Arrivals that nobody has taken from the iterator yet; where none of them may go, further offers are declined. */
const maxUntaken = 64;
/** An authenticated peer that says nothing. */
const firstMessageMs = 5000;

type Channel = ControlChannel<SourceMessage, DestinationMessage>;

/**
 * Listens for guests.
 * @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED, AUTH_FAILED (secret file), SYSTEM (the port is taken)
 */
export async function listen(options: ListenOptions = {}): Promise<Listening> {
  const resolved = resolveListenOptions(options);
  checkAddressPolicy(resolved.host, { plaintext: resolved.plaintext });
  if (resolved.base) {
    checkAddressPolicy(parseAddress(resolved.base.parked.home).host, { plaintext: resolved.plaintext });
  }
  const secret = await loadSecret(resolved, { loopback: isLoopback(resolved.host) });
  resolved.signal?.throwIfAborted();
  rehearseSwitchover();
  const domain = await domainOf(resolved, secret);
  return new DestinationListener(resolved, secret, domain);
}

class DestinationListener implements Listening {
  readonly host: string;
  readonly #native: NativeListener;
  readonly #gate = new HandshakeGate();
  readonly #tombstones = new Tombstones();
  readonly #arrivals = new Map<
    string,
    { arrival: ArrivalInProgress; sessionKey: Uint8Array; bytes: number }
  >();
  /** Offers being accepted: they count, but have no arrival yet. */
  readonly #accepting = new Map<string, number>();
  readonly #making = new Set<Promise<void>>();
  /** Of the replay under way; one at a time. */
  #replayBytes = 0;
  readonly #channels = new Set<Channel>();
  readonly #closing = new AbortController();
  readonly #keepAlive: NodeJS.Timeout;
  readonly #untaken: ArrivalInProgress[] = [];
  readonly #takers: ((arrival: ArrivalInProgress | null) => void)[] = [];

  constructor(
    private options: ResolvedListenOptions,
    private readonly secret: Uint8Array,
    private readonly domain: Domain,
  ) {
    this.host = options.host;
    const numeric = options.host === 'localhost' ? '127.0.0.1' : options.host;
    this.#native = native(() =>
      loadAddon().createListener(numeric, options.port, (fd) => {
        this.#onControl(fd).catch(() => {
          // A stranger, or a peer that broke the rules: it was told, and there is nobody else to tell.
        });
      }),
    );
    options.signal?.addEventListener('abort', () => void this.close(), { once: true });
    // The native listener's thread is none that Node waits for: this timer stands for it.
    this.#keepAlive = setInterval(() => {}, 2 ** 30);
  }

  get port(): number {
    return this.#native.port;
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Arrival> {
    for (;;) {
      const next = this.#untaken.shift();
      if (next) {
        yield next;
        continue;
      }
      if (this.#closing.signal.aborted) return;
      const arrival = await new Promise<ArrivalInProgress | null>((resolve) => this.#takers.push(resolve));
      if (!arrival) return;
      yield arrival;
    }
  }

  limit(limits: { bandwidth?: number; gatherLimit?: number }): void {
    for (const [name, value] of Object.entries(limits)) {
      if (!Number.isSafeInteger(value) || value < 0) {
        throw new MemferryError('INVALID_ARGUMENT', `limit.${name}: not a number of bytes a second`);
      }
    }
    this.options = { ...this.options, ...limits };
    for (const { arrival } of this.#arrivals.values()) arrival.limit(this.options);
  }

  async close(): Promise<void> {
    if (!this.#closing.signal.aborted) {
      this.#closing.abort(new MemferryError('CANCELLED', 'the listener was closed'));
      this.#gate.close();
      for (const taker of this.#takers.splice(0)) taker(null);
    }
    const { prepareTimeoutMs } = this.options;
    // Guests that were being made are abandoned.
    const made = Promise.all([...this.#making]);
    await within(made, prepareTimeoutMs, 'PREPARE_TIMEOUT', 'accept() goes on').catch(() => {});
    await Promise.all([...this.#arrivals.values()].map(({ arrival }) => arrival[Symbol.asyncDispose]()));
    await Promise.all([...this.#channels].map((channel) => channel.close()));
    this.#native.close();
    clearInterval(this.#keepAlive);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #onControl(fd: number): Promise<void> {
    const socket = new Socket({ fd, readable: true, writable: true });
    socket.setNoDelay(true);
    if (this.#closing.signal.aborted) {
      socket.destroy();
      return;
    }
    const session = await this.#gate.accept(socket, { secret: this.secret, signal: this.#closing.signal });
    const channel: Channel = new ControlChannel(session, {
      incoming: sourceMessage,
      maxBinaryBytes: this.options.maxStateBytes,
      peerTimeoutMs: this.options.peerTimeoutMs,
    });
    this.#channels.add(channel);
    void channel.closed.then(() => this.#channels.delete(channel));
    try {
      const first = await within(
        channel.receive(),
        firstMessageMs,
        'PEER_LOST',
        'an authenticated peer says nothing',
      );
      if (first?.message.type === 'offer') {
        await this.#onOffer(first.message, first.binary, channel, session.sessionKey);
      } else if (first?.message.type === 'resume-session') {
        await this.#onResume(first.message, channel);
      } else {
        channel.destroy();
      }
    } catch (error) {
      channel.destroy(error instanceof MemferryError ? error : null);
    }
  }

  async #onOffer(
    offer: OfferMessage,
    replayLog: Uint8Array | null,
    channel: Channel,
    sessionKey: Uint8Array,
  ): Promise<void> {
    let guest: ArrivingGuest | null = null;
    let images: ImageSet | null = null;
    let arrival: ArrivalInProgress;
    let replays = false;
    let parked: ParkedBase | null = null;
    let references: AgreedReferences | null = null;
    let booked = false;
    const made = deferred<void>();
    this.#making.add(made.promise);
    try {
      if (offer.replay !== (replayLog !== null)) {
        throw new MemferryError('PROTOCOL_ERROR', 'a log that was not announced, or one that is missing');
      }
      const bytes = this.#admit(offer);
      const migration = Buffer.from(offer.migrationId, 'hex');
      const given: GuestOffer = {
        ...offer.guest,
        description: offer.guest.description,
        ...(replayLog ? { replayLog } : {}),
        ...(offer.lineage ? { lineage: unsealLineage(sessionKey, migration, offer.lineage) } : {}),
      };
      this.#accepting.set(offer.migrationId, bytes);
      booked = true;
      images = await this.#openImages(offer, sessionKey);
      guest = await this.#makeGuest(offer, given);
      this.#closing.signal.throwIfAborted();
      if (channel.reason) throw new MemferryError('PEER_LOST', 'the source is gone');
      if (given.replayLog && guest.replay?.memoryBytes) {
        replays = this.#admitReplay(guest.replay.memoryBytes);
        if (!replays) delete given.replayLog;
      }
      parked = offer.base ? this.#parkedBase(guest, given, bytes) : null;
      references = offer.scatter ? null : this.domain.agree(offer, sessionKey, migration);
      arrival = new ArrivalInProgress({
        offer,
        given,
        guest,
        listener: this.#native,
        link: linkOver(channel),
        baseKey: baseKey(sessionKey, Buffer.from(offer.migrationId, 'hex')),
        bases: parked?.bases(offer.guest.regions.map(({ name }) => name)) ?? guest.bases,
        tokens: dataTokens(sessionKey, Buffer.from(offer.migrationId, 'hex'), maxEpochs, offer.channels),
        options: this.options,
        images,
        known: references && { key: references.key, share: references.ofDomain ? this.domain.share : null },
        grows: (more) => this.#admitGrowth(offer.migrationId, more),
        decided: (state) => this.#tombstones.record(offer.migrationId, state),
        ended: () => this.#arrivals.delete(offer.migrationId),
      });
      const entry = { arrival, sessionKey, bytes: parked ? 2 * bytes : bytes };
      this.#arrivals.set(offer.migrationId, entry);
      const filled = () => {
        if (replays) this.#replayBytes = 0;
        parked?.close();
        // What the guest has grown by since stays.
        if (parked) entry.bytes -= bytes;
      };
      arrival.baseFilled.then(filled, filled).catch((error) => {
        // So it counts for as long as the arrival does.
        process.emitWarning(`what was read of the parked base is still held: ${String(error)}`, {
          code: 'MEMFERRY_CLOSE_FAILED',
        });
      });
    } catch (error) {
      if (replays) this.#replayBytes = 0;
      parked?.close();
      await Promise.resolve(guest?.abandon()).catch(() => {});
      await images?.close();
      const { code, message, names } = toPeer(error, 'PREPARE_FAILED');
      await channel.send({ type: 'declined', code, message, names }).catch(() => {});
      await channel.close();
      return;
    } finally {
      made.resolve();
      this.#making.delete(made.promise);
      // Of an offer that comes twice, the first one's stays.
      if (booked) this.#accepting.delete(offer.migrationId);
    }
    const taker = this.#takers.shift();
    if (taker) taker(arrival);
    else this.#untaken.push(arrival);
    void channel.send({
      type: 'accepted',
      encodings: agreedEncodings(offer.encodings, decodedHere),
      basePages: arrival.basePages,
      tellsMissing: true,
      references: references?.proof ?? null,
    });
    await serve(arrival, channel);
  }

  /** Gives the guest's size in bytes. Throws why the offer is declined, before anything is allocated for it. */
  #admit(offer: OfferMessage): number {
    const { maxMigrations } = this.options;
    this.#closing.signal.throwIfAborted();
    const id = offer.migrationId;
    if (this.#arrivals.has(id) || this.#accepting.has(id) || this.#tombstones.has(id)) {
      throw new MemferryError('PROTOCOL_ERROR', 'a migration with this id is known already');
    }
    if (this.#arrivals.size + this.#accepting.size >= maxMigrations) {
      throw new MemferryError('LIMIT_EXCEEDED', `no more than ${maxMigrations} migrations at a time`, {
        facts: { limit: maxMigrations },
      });
    }
    if (!this.#mayWait()) {
      throw new MemferryError(
        'LIMIT_EXCEEDED',
        `${maxUntaken} guests here wait to be taken by the listener`,
        {
          facts: { limit: maxUntaken },
        },
      );
    }
    const { pageSize } = loadAddon();
    let bytes = 0;
    for (const region of offer.guest.regions) {
      if (region.pageSize !== pageSize) {
        throw new MemferryError(
          'LIMIT_EXCEEDED',
          `pages of ${region.pageSize} bytes; here they have ${pageSize}`,
        );
      }
      if (
        region.lengthBytes % pageSize !== 0 ||
        region.lengthBytes === 0 ||
        region.capacityBytes < region.lengthBytes
      ) {
        throw new MemferryError('PROTOCOL_ERROR', `region '${region.name}' has a length that cannot be`);
      }
      bytes += region.lengthBytes;
    }
    this.#mustFit(bytes, `the guest has ${bytes} bytes`);
    return bytes;
  }

  /** Counts what a guest on its way in grows by; throws when there is no room for it. */
  #admitGrowth(id: string, bytes: number): void {
    this.#mustFit(bytes, `the guest grows by ${bytes} bytes`);
    const entry = this.#arrivals.get(id);
    if (entry) entry.bytes += bytes;
  }

  #mustFit(bytes: number, what: string): void {
    const { maxBytes } = this.options;
    const free = maxBytes - this.#usedBytes();
    if (bytes <= free) return;
    throw new MemferryError('NO_MEMORY', `${what}; ${free} of ${maxBytes} are free`, {
      facts: { bytes, free, limit: maxBytes },
    });
  }

  /**
   * Room for one more in the iterator's queue. An arrival that is over may go from it, but for a guest that was
   * accepted by default: it is here, and nothing else leads to its memory.
   */
  #mayWait(): boolean {
    if (this.#untaken.length < maxUntaken) return true;
    const mayGo = ({ id, state }: ArrivalInProgress) =>
      !this.#arrivals.has(id) && (this.options.accept !== undefined || state !== 'completed');
    const at = this.#untaken.findIndex(mayGo);
    if (at >= 0) this.#untaken.splice(at, 1);
    return at >= 0;
  }

  #usedBytes(): number {
    let used = this.#replayBytes;
    for (const other of this.#arrivals.values()) used += other.bytes;
    for (const other of this.#accepting.values()) used += other;
    return used;
  }

  /** Whether a log may be applied to a second copy of the guest; if not, its base is what it is. */
  #admitReplay(bytes: number): boolean {
    if (this.#replayBytes > 0 || this.#usedBytes() + bytes > this.options.maxBytes) return false;
    this.#replayBytes = bytes;
    return true;
  }

  /** Null where there is none for this guest, or no room to read it; `bytes`: the guest's. */
  #parkedBase(guest: ArrivingGuest, given: GuestOffer, bytes: number): ParkedBase | null {
    const { base, maxBytes, gatherLimit, recoverTimeoutMs } = this.options;
    const known = base?.parked.guest;
    if (!base || !known || basesOf(guest) || this.#usedBytes() + bytes > maxBytes) return null;
    const stored = { ...known, lineage: Buffer.from(known.lineage, 'hex') };
    if (!mayBeBase(stored, given, base)) return null;
    const connection = imageConnection(this.secret, this.options);
    return new ParkedBase(base.parked, { connection, maxBytes: bytes, recoverTimeoutMs, gatherLimit });
  }

  /** The servers that hold what the source does not send here itself. Rejects when one cannot be reached. */
  async #openImages(offer: OfferMessage, sessionKey: Uint8Array): Promise<ImageSet | null> {
    if (!offer.scatter) return null;
    const secret = unsealSecret(
      sessionKey,
      Buffer.from(offer.migrationId, 'hex'),
      offer.scatter.sealedSecret,
    );
    const { servers } = offer.scatter;
    // An arrival that is complete when the listener closes has an image to let go of.
    return whileOpening(this.#closing.signal, (opening) =>
      ImageSet.open(servers, imageConnection(this.secret, this.options, opening), {
        ...{ image: offer.migrationId, secret, access: 'read', required: 'all' },
      }),
    );
  }

  async #makeGuest(offer: OfferMessage, given: GuestOffer): Promise<ArrivingGuest> {
    const { accept } = this.options;
    const guest = accept ? await accept(given, { signal: this.#closing.signal }) : allocateGuest(given);
    const short = offer.guest.regions.findIndex(
      (wanted, index) => (guest.regions[index]?.lengthBytes ?? 0) < wanted.lengthBytes,
    );
    if (short >= 0) {
      await guest.abandon();
      throw new MemferryError('NO_MEMORY', `region '${offer.guest.regions[short]?.name}' is too short here`);
    }
    return guest;
  }

  /** A source whose connection was cut asks again: for a migration that is under way, over, or unknown here. */
  async #onResume(message: { migrationId: string; proof: string }, channel: Channel): Promise<void> {
    const id = message.migrationId;
    const entry = this.#arrivals.get(id);
    if (entry && !provesResume(entry.sessionKey, id, message.proof)) {
      throw new MemferryError('AUTH_FAILED', 'the connection does not belong to the migration that it names');
    }
    void channel.send({ type: 'session-resumed', known: entry !== undefined || this.#tombstones.has(id) });
    if (entry) {
      entry.arrival.attach(linkOver(channel));
      await serve(entry.arrival, channel);
      return;
    }
    for await (const { message: asked } of channel) {
      if (asked.type === 'evicted') void channel.send({ type: 'over' });
      if (asked.type !== 'grant' && asked.type !== 'query') continue;
      const answer = this.#tombstones.answer(id, asked);
      if (answer) void channel.send(answer);
    }
  }
}

/** The deduplication domain of a listener. */
interface Domain {
  /** The page share's file; null: none. */
  share: string | null;
  agree(offer: OfferMessage, sessionKey: Uint8Array, migration: Uint8Array): AgreedReferences | null;
}

async function domainOf({ dedup, share }: ResolvedListenOptions, secret: Uint8Array): Promise<Domain> {
  if (dedup === false) return { share: null, agree: () => null };
  const key = dedup === true ? null : await dedupDomainKey(dedup, secret);
  return {
    share: key && share !== undefined ? sharePath(share === 'auto' ? null : share, key) : null,
    agree: (offer, sessionKey, migration) => agreeOnReferences(offer.references, key, sessionKey, migration),
  };
}

function linkOver(channel: Channel) {
  return {
    channel,
    send: (message: DestinationMessage) => void channel.send(message),
    close: () => channel.close(),
  };
}

/** Feeds an arrival from one connection until that ends. */
async function serve(arrival: ArrivalInProgress, channel: Channel): Promise<void> {
  try {
    for await (const { message, binary } of channel) arrival.onMessage(message, binary);
  } catch {
    // However it ended, the arrival is told below.
  }
  arrival.detached(channel);
}
