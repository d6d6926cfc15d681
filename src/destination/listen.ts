/**
 * `listen`: the destination's entry. One port: control connections are authenticated here, data connections in the
 * native listener. Which offers are taken (acceptance.ts goes on with them), and whom a connection belongs to that
 * replaces a cut one. JavaScript thread.
 */
import { Socket } from 'node:net';
import { loadAddon } from '../addon.js';
import { checkOptions } from '../check-options.js';
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { ControlChannel } from '../control/channel.js';
import { HandshakeGate } from '../control/gate.js';
import { numericHost } from '../control/numeric-host.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError, native } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { NativeListener } from '../native.js';
import {
  type ListenOptions,
  mostReplayBytes,
  parseAddress,
  type ResolvedListenOptions,
  resolveListenOptions,
} from '../options.js';
import { lastingAbort, throwIfCancelled, within } from '../protocol/bounded.js';
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
import { provesResume } from '../protocol/resume-proof.js';
import type { Region } from '../region.js';
import { rehearseSwitchover } from '../rehearsal.js';
import type { ArrivalReport, MigrationState } from '../report.js';
import { Acceptance } from './acceptance.js';
import type { Arrival as ArrivalInProgress } from './arrival.js';
import { ArrivalQueue, maxUntaken } from './arrival-queue.js';
import { offeredBytes } from './check-offer.js';
import { type Domain, domainOf } from './dedup-domain.js';
import { type Booking, MemoryBudget } from './memory-budget.js';

/** A guest on its way in, or arrived. */
export interface Arrival extends AsyncDisposable {
  /** 32 hex digits, the source's. */
  readonly id: string;
  /** What the source says of the guest, as `accept` was given it. */
  readonly offer: GuestOffer;
  /** What `accept` made; without one, plain regions. */
  readonly guest: ArrivingGuest;
  /** The guest's memory here, in the order of the offer. */
  readonly regions: readonly Region[];
  /** Where the migration stands, as this side sees it. */
  readonly state: MigrationState;
  /** When the source has paused the guest; rejects when the migration fails before. */
  readonly executionState: Promise<Uint8Array>;
  /** The guest runs here. Rejects when it never will. */
  readonly resumed: Promise<void>;
  /**
   * Every page is here, and was compared where the source asked for that. Rejects with PAGES_LOST (and the runs) before the
   * lost pages are poisoned, with VERIFICATION_FAILED, and with what ended the migration before.
   *
   * The source is still being told then, and the VMD servers of a scatter mode: a process that exits at once leaves the
   * image at the servers, committed, until somebody drops it, and the source without its report. So await `close()` of the
   * listener, or this arrival's `Symbol.asyncDispose`, before the process exits.
   */
  readonly complete: Promise<ArrivalReport>;
  /**
   * No page comes any more: each is here or lost for good, or the arrival is over. After PAGES_LOST the others still come
   * until then, and closing the arrival loses them. Never rejects.
   */
  readonly restHere: Promise<void>;
  /** Each change of `state`. What the listener throws, or rejects with, is a warning of the process (MEMFERRY_LISTENER). */
  on(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  /** As `on`, for the next time only. */
  once(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  /** Takes a listener away that `on` or `once` was given. */
  off(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  /**
   * Before the commit: the migration fails, and the guest runs on at the source. After it: pages that have not come are
   * lost, and the guest's memory stays. Resolves when nothing here holds the regions, and source and servers were told.
   * Twice is fine.
   */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Yields each guest when its first page is about to come. */
export interface Listening extends AsyncDisposable, AsyncIterable<Arrival> {
  /** As it was asked for. */
  readonly host: string;
  /** The port that it listens on, also where 0 was asked for. */
  readonly port: number;
  /** New limits for what is arriving and what will arrive, in bytes a second; 0 for none. */
  limit(limits: { bandwidth?: number; gatherLimit?: number }): void;
  /**
   * Ends the listening, and each arrival as its `Symbol.asyncDispose` does: those that have not resumed fail, missing pages
   * of those that have are lost. Resolves when sources and VMD servers were told; a process may exit then. Twice is fine.
   */
  close(): Promise<void>;
}

/** Control connections of peers that have proved themselves: so many, and two for each migration that may be. */
const spareConnections = 256;
/**
 * An authenticated peer that is alive and offers nothing: VMD servers, which may be slow, take its guest's images first.
 */
const firstMessageMs = 60_000;

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
  throwIfCancelled(resolved.signal);
  rehearseSwitchover();
  const numeric = await numericHost(resolved.host, 'listen.host', resolved.signal);
  const domain = await domainOf(resolved, secret);
  return new DestinationListener(resolved, numeric, secret, domain);
}

class DestinationListener implements Listening {
  readonly host: string;
  readonly #native: NativeListener;
  readonly #gate = new HandshakeGate();
  readonly #tombstones = new Tombstones();
  readonly #arrivals = new Map<string, { arrival: ArrivalInProgress; sessionKey: Uint8Array }>();
  /** Offers being accepted: they count, but have no arrival yet. */
  readonly #accepting = new Set<string>();
  readonly #making = new Set<Promise<void>>();
  readonly #budget: MemoryBudget;
  /** With the order in which they proved themselves. */
  readonly #channels = new Map<Channel, number>();
  #accepted = 0;
  readonly #closing = lastingAbort();
  readonly #keepAlive: NodeJS.Timeout;
  readonly #queue = new ArrivalQueue<ArrivalInProgress>();

  constructor(
    private options: ResolvedListenOptions,
    numeric: string,
    private readonly secret: Uint8Array,
    private readonly domain: Domain,
  ) {
    this.host = options.host;
    this.#budget = new MemoryBudget(options.maxBytes);
    this.#native = native(() =>
      loadAddon().createListener(numeric, options.port, (fd) => {
        this.#onControl(fd).catch(() => {
          // A stranger, or a peer that broke the rules: it was told, and there is nobody else to tell.
        });
      }),
    );
    try {
      if (domain.share) this.#native.keepShare(domain.share.key, domain.share.path);
    } catch (error) {
      this.#native.close();
      throw error;
    }
    options.signal?.addEventListener('abort', this.#onSignal, { once: true });
    // The native listener's thread is none that Node waits for: this timer stands for it.
    this.#keepAlive = setInterval(() => {}, 2 ** 30);
  }

  readonly #onSignal = () => void this.close();

  get port(): number {
    return this.#native.port;
  }

  [Symbol.asyncIterator](): AsyncIterator<Arrival> {
    return this.#queue[Symbol.asyncIterator]();
  }

  limit(limits: { bandwidth?: number; gatherLimit?: number }): void {
    checkOptions(limits, 'limit', ['bandwidth', 'gatherLimit']);
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
      this.#queue.close();
    }
    const { prepareTimeoutMs } = this.options;
    // Guests that were being made are abandoned.
    const made = Promise.all([...this.#making]);
    await within(made, prepareTimeoutMs, 'PREPARE_TIMEOUT', 'accept() goes on').catch(() => {});
    await Promise.all([...this.#arrivals.values()].map(({ arrival }) => arrival[Symbol.asyncDispose]()));
    await Promise.all([...this.#channels.keys()].map((channel) => channel.close()));
    this.#native.close();
    clearInterval(this.#keepAlive);
    this.options.signal?.removeEventListener('abort', this.#onSignal);
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
      maxBinaryBytes: Math.max(this.options.maxStateBytes, mostReplayBytes),
      admits: ({ type }) =>
        type === 'offer' ? mostReplayBytes : type === 'state' ? this.options.maxStateBytes : null,
      peerTimeoutMs: this.options.peerTimeoutMs,
    });
    const most = spareConnections + 2 * this.options.maxMigrations;
    if (this.#channels.size >= most) {
      channel.destroy();
      return;
    }
    this.#channels.set(channel, ++this.#accepted);
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
    const id = offer.migrationId;
    const made = deferred<void>();
    this.#making.add(made.promise);
    let booking: Booking | null = null;
    let acceptance: Acceptance | null = null;
    let arrival: ArrivalInProgress | null = null;
    const settled = () => {
      made.resolve();
      this.#making.delete(made.promise);
      // Of an offer that comes twice, the first one's stays.
      if (booking) this.#accepting.delete(id);
      if (!arrival) booking?.release();
    };
    try {
      if (offer.replay !== (replayLog !== null)) {
        throw new MemferryError('PROTOCOL_ERROR', 'a log that was not announced, or one that is missing');
      }
      booking = this.#admit(offer);
      this.#accepting.add(id);
      const host = {
        secret: this.secret,
        domain: this.domain,
        listener: this.#native,
        budget: this.#budget,
        closing: this.#closing.signal,
      };
      acceptance = new Acceptance(host, { offer, replayLog, sessionKey }, booking);
      await acceptance.make(this.options);
      if (channel.reason) throw new MemferryError('PEER_LOST', 'the source is gone');
      arrival = acceptance.arrive(this.options, this.#linkOver(channel), {
        decided: (state) => this.#tombstones.record(id, state),
        ended: () => this.#arrivals.delete(id),
      });
      this.#arrivals.set(id, { arrival, sessionKey });
    } catch (error) {
      await acceptance?.undo(this.options);
      // Whoever hears of it may offer again at once.
      if (acceptance) void acceptance.made.then(settled);
      else settled();
      const { code, message, names } = toPeer(error, 'PREPARE_FAILED');
      await channel.send({ type: 'declined', code, message, names }).catch(() => {});
      await channel.close();
      return;
    }
    settled();
    this.#queue.put(arrival);
    void channel.send({
      type: 'accepted',
      encodings: agreedEncodings(offer.encodings, decodedHere),
      basePages: arrival.basePages,
      tellsMissing: true,
      references: acceptance.referencesProof,
    });
    await serve(arrival, channel);
  }

  /** Books the guest's memory. Throws why the offer is declined, before anything is allocated for it. */
  #admit(offer: OfferMessage): Booking {
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
    const bytes = offeredBytes(offer.guest.regions, loadAddon().pageSize);
    return this.#budget.book(bytes, `the guest has ${bytes} bytes`);
  }

  /**
   * Room for one more in the iterator's queue. An arrival that is over may go from it, but for a guest that was
   * accepted by default: it is here, and nothing else leads to its memory.
   */
  #mayWait(): boolean {
    return this.#queue.makeRoom(
      ({ id, state }) =>
        !this.#arrivals.has(id) && (this.options.accept !== undefined || state !== 'completed'),
    );
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
      entry.arrival.attach(this.#linkOver(channel));
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

  #linkOver(channel: Channel) {
    return {
      channel,
      order: this.#channels.get(channel) ?? 0,
      send: (message: DestinationMessage) => void channel.send(message),
      close: () => channel.close(),
    };
  }
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
