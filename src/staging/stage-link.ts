/**
 * The control connection to a VMD server as its client keeps it: made anew when it is cut, with every image opened
 * again, while a request waits or an image is open. Requests are bounded in time; all but those that say otherwise may
 * be sent twice, and are when a connection breaks under them. JavaScript thread.
 */
import { EventEmitter } from 'node:events';
import { ControlChannel } from '../control/channel.js';
import { dial } from '../control/dial.js';
import { MemferryError } from '../errors.js';
import { lastingAbort, untilAborted, within } from '../protocol/bounded.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { fromPeer } from '../protocol/peer-error.js';
import {
  type Announcement,
  type StageAnswer,
  stageAnswer,
  type StageRequest,
} from '../protocol/stage-messages.js';
import { openProof } from './image-secret.js';

export interface StageClientConfig {
  host: string;
  port: number;
  /** In errors; `host:port` without one, until the server says its name. */
  name?: string;
  secret: Uint8Array;
  plaintext?: boolean;
  connectTimeoutMs?: number;
  /** From a request to its answer, redialling included; for one that moves an execution state, on top of its way. */
  requestTimeoutMs?: number;
  peerTimeoutMs?: number;
  /** How long a cut may last while an image is open, before the server counts as gone. */
  recoverTimeoutMs?: number;
  /** Largest execution state, both ways; default 64 MiB. */
  maxStateBytes?: number;
  signal?: AbortSignal;
}

export type Request = Exclude<StageRequest, SourceMessage>;
export type Unnumbered<R> = R extends Request ? Omit<R, 'request'> : never;
export type Answer = Exclude<StageAnswer, DestinationMessage | { type: 'announce' }>;
type AnswerOf<Type extends Answer['type']> = Extract<Answer, { type: Type }>;

export interface Received<Type extends Answer['type']> {
  message: AnswerOf<Type>;
  binary: Uint8Array | null;
  link: Link;
}

/** One connection. */
export interface Link {
  readonly channel: ControlChannel<StageAnswer, StageRequest>;
  readonly sessionKey: Uint8Array;
  readonly remoteAddress: string;
  readonly pending: Map<number, Deferred<{ message: Answer; binary: Uint8Array | null }>>;
  /** Images that are open on it. */
  readonly open: Set<string>;
}

/** An image that stays open over redials. */
export interface OpenImage {
  readonly secret: Uint8Array;
  claim: { claimant: string; epoch: number } | null;
}

const firstRetryMs = 100;
const longestRetryMs = 2000;
const longestStateBytes = 64 * 2 ** 20;
/** 1 Mbit/s: what is slower moves no guest. That a server is gone or takes nothing is the channel's to notice. */
const slowestBytesPerMs = 125;

interface ClientEvents {
  announcement: [Announcement];
  /** The server no longer has this image: dropped, or restarted. */
  lost: [image: string, error: MemferryError];
}

export abstract class StageLink extends EventEmitter<ClientEvents> {
  /** Null after `close`; the reason when the server could not be reached any more. Never rejects. */
  readonly closed: Promise<MemferryError | null>;
  readonly #closed = deferred<MemferryError | null>();
  protected readonly images = new Map<string, OpenImage>();
  readonly #abort = lastingAbort();
  protected link: Link | null = null;
  #dialling: Promise<Link> | null = null;
  #recovering = false;
  #ended: MemferryError | null = null;
  #announcement: Announcement | null = null;
  #remoteAddress: string | null = null;
  #nextRequest = 1;

  protected constructor(protected readonly config: StageClientConfig) {
    super();
    this.closed = this.#closed.promise;
  }

  get name(): string {
    return this.#announcement?.name ?? this.config.name ?? `${this.config.host}:${this.config.port}`;
  }

  /** Numeric: what answered, and where stage connections go. */
  get host(): string {
    return this.#remoteAddress ?? this.config.host;
  }

  get port(): number {
    return this.config.port;
  }

  /** What the server said of itself last; null before its first word. */
  get announcement(): Announcement | null {
    return this.#announcement;
  }

  /** Why nothing works any more; null while it does. */
  get ended(): MemferryError | null {
    return this.#ended;
  }

  /** The first announcement; it comes unasked with the connection. */
  async firstAnnouncement(): Promise<Announcement> {
    if (this.#announcement) return this.#announcement;
    const heard = new Promise<Announcement>((resolve) => this.once('announcement', resolve));
    const gone = this.closed.then((error) => {
      throw error ?? new MemferryError('CANCELLED', 'the connection was closed');
    });
    return this.bounded(Promise.race([heard, gone]), 'no announcement came');
  }

  /** A word of a park's commit. */
  protected abstract told(message: DestinationMessage): void;
  /** The connection is gone. */
  protected abstract cut(error: MemferryError): void;

  /** Says goodbye. Images stay as they are: uncommitted ones for their lease. Twice is fine. */
  async close(): Promise<void> {
    const link = this.link;
    this.#end(null, new MemferryError('CANCELLED', `the connection to ${this.name} was closed`));
    await link?.channel.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  protected readonly onAbort = (): void => void this.close();

  protected askAbout<Type extends Answer['type']>(
    type: Type,
    message: Unnumbered<Request> & { image: string },
    options: { binary?: Uint8Array | null; patient?: boolean; answerBytes?: number } = {},
  ): Promise<Received<Type>> {
    return this.ask(type, () => message, { patient: true, ...options, image: message.image });
  }

  /** Of an execution state that comes with an answer. */
  protected get maxStateBytes(): number {
    return this.config.maxStateBytes ?? longestStateBytes;
  }

  /** Sends and waits for the answer; over a new connection, with `image` opened again, if this one breaks. */
  protected async ask<Type extends Answer['type']>(
    type: Type,
    make: (link: Link) => Unnumbered<Request>,
    {
      image = null,
      binary = null,
      repeat = true,
      patient = image !== null,
      answerBytes = 0,
    }: {
      image?: string | null;
      binary?: Uint8Array | null;
      repeat?: boolean;
      patient?: boolean;
      /** The most that its binary part may have. */
      answerBytes?: number;
    } = {},
  ): Promise<Received<Type>> {
    const movedBytes = (binary?.length ?? 0) + answerBytes;
    let over = false;
    const attempt = async (): Promise<Received<Type>> => {
      for (let tries = repeat ? 2 : 1; ; tries--) {
        const link = patient ? await this.#connectedPatiently(() => over) : await this.connected();
        try {
          if (image !== null) await this.reopen(link, image);
          return await this.#exchange(link, type, make(link), binary, movedBytes);
        } catch (error) {
          if (tries <= 1 || over || this.#ended || !link.channel.reason) throw error;
        }
      }
    };
    try {
      const answered = untilAborted(attempt(), this.#abort.signal);
      return await this.bounded(answered, `no answer to '${type}'`, movedBytes);
    } catch (error) {
      throw this.named(error);
    } finally {
      over = true;
    }
  }

  async #exchange<Type extends Answer['type']>(
    link: Link,
    type: Type,
    message: Unnumbered<Request>,
    binary: Uint8Array | null,
    movedBytes = 0,
  ): Promise<Received<Type>> {
    const request = this.#nextRequest;
    this.#nextRequest = (request % (2 ** 31 - 1)) + 1;
    const answer = deferred<{ message: Answer; binary: Uint8Array | null }>();
    link.pending.set(request, answer);
    try {
      link.channel.send({ ...message, request } as Request, binary).catch((error) => answer.reject(error));
      const got = await this.bounded(answer.promise, `no answer to '${message.type}'`, movedBytes);
      if (got.message.type === 'declined') {
        const { code, message: text, reason } = got.message;
        const told = fromPeer(code, text);
        throw new MemferryError(told.code, text, { facts: { ...told.facts, reason } });
      }
      if (got.message.type !== type) {
        const error = new MemferryError(
          'PROTOCOL_ERROR',
          `'${got.message.type}' as answer to '${message.type}'`,
        );
        link.channel.destroy(error);
        throw error;
      }
      return { message: got.message as AnswerOf<Type>, binary: got.binary, link };
    } finally {
      link.pending.delete(request);
    }
  }

  /** Opens an image that was open before; nothing on a connection where it is. */
  protected async reopen(link: Link, image: string): Promise<void> {
    const known = this.images.get(image);
    if (link.open.has(image)) return;
    if (!known) {
      throw new MemferryError('VMD_REFUSED', 'the image was not opened here', {
        facts: { reason: 'not-open' },
      });
    }
    try {
      await this.#exchange(
        link,
        'opened',
        {
          type: 'open',
          image,
          proof: openProof(known.secret, link.sessionKey),
          access: 'control',
          claim: known.claim,
        },
        null,
      );
    } catch (error) {
      if (error instanceof MemferryError && error.code === 'VMD_LOST') {
        this.emit('lost', image, this.named(error));
      }
      throw error;
    }
    link.open.add(image);
  }

  protected connected(): Promise<Link> {
    if (this.#ended) return Promise.reject(this.#ended);
    if (this.link) return Promise.resolve(this.link);
    this.#dialling ??= this.#dial().finally(() => {
      this.#dialling = null;
    });
    return this.#dialling;
  }

  /** While the server may come back, its image with it; the caller's bound ends it. */
  async #connectedPatiently(isOver: () => boolean): Promise<Link> {
    for (let retryMs = firstRetryMs; ; retryMs = Math.min(retryMs * 2, longestRetryMs)) {
      try {
        return await this.connected();
      } catch (error) {
        if (this.#ended || isOver()) throw error;
        await new Promise((resolve) => setTimeout(resolve, retryMs));
        if (isOver()) throw error;
      }
    }
  }

  async #dial(): Promise<Link> {
    const { host, port, secret, plaintext, connectTimeoutMs = 5000, peerTimeoutMs } = this.config;
    const session = await dial({
      host: this.#remoteAddress ?? host,
      port,
      secret,
      plaintext,
      connectTimeoutMs,
      signal: this.#abort.signal,
    });
    const link: Link = {
      channel: new ControlChannel(session, {
        incoming: stageAnswer,
        maxBinaryBytes: this.maxStateBytes,
        admits: ({ type }) => (type === 'claimed' ? this.maxStateBytes : null),
        ...(peerTimeoutMs === undefined ? {} : { peerTimeoutMs }),
      }),
      sessionKey: session.sessionKey,
      remoteAddress: session.remoteAddress,
      pending: new Map(),
      open: new Set(),
    };
    if (this.#ended) {
      link.channel.destroy();
      throw this.#ended;
    }
    this.#remoteAddress = session.remoteAddress;
    this.link = link;
    void this.#read(link);
    return link;
  }

  async #read(link: Link): Promise<void> {
    try {
      for await (const { message, binary } of link.channel) this.#onMessage(link, message, binary);
    } catch {
      // `closed` below has the same reason.
    }
    const reason = await link.channel.closed;
    const error =
      reason.error ?? new MemferryError('PEER_LOST', `the VMD server ${this.name} ended the connection`);
    for (const answer of link.pending.values()) answer.reject(error);
    link.pending.clear();
    if (this.link === link) this.#onLost(error);
  }

  #onMessage(link: Link, message: StageAnswer, binary: Uint8Array | null): void {
    switch (message.type) {
      case 'announce': {
        const { type: _type, ...announcement } = message;
        this.#announcement = announcement;
        this.emit('announcement', announcement);
        break;
      }
      case 'ready':
      case 'resumed':
      case 'refused':
      case 'unknown-migration':
        if (this.link === link) this.told(message);
        break;
      default:
        // An answer that nobody waits for any more was too late.
        link.pending.get(message.request)?.resolve({ message, binary });
    }
  }

  #onLost(error: MemferryError): void {
    this.link = null;
    if (this.#ended) return;
    this.cut(this.named(error));
    if (this.images.size > 0) void this.#recover();
  }

  /** While an image is open its lease runs at the server: dials without being asked, up to the bound. */
  async #recover(): Promise<void> {
    if (this.#recovering) return;
    this.#recovering = true;
    const deadline = performance.now() + (this.config.recoverTimeoutMs ?? 30_000);
    let retryMs = firstRetryMs;
    try {
      while (!this.#ended && this.images.size > 0) {
        try {
          const link = await this.connected();
          for (const image of [...this.images.keys()]) {
            await this.reopen(link, image).catch((error: unknown) => {
              // Its own users hear of it by `lost`, and by their next request; the others' images are there.
              if (link.channel.reason) throw error;
            });
          }
          return;
        } catch (cause) {
          if (performance.now() + retryMs > deadline) {
            const text = `the VMD server ${this.name} did not come back in time`;
            this.#end(this.named(new MemferryError('PEER_LOST', text, { cause })));
            return;
          }
          await new Promise((resolve) => setTimeout(resolve, retryMs));
          retryMs = Math.min(retryMs * 2, longestRetryMs);
        }
      }
    } finally {
      this.#recovering = false;
    }
  }

  #end(error: MemferryError | null, told: MemferryError | null = error): void {
    if (this.#ended) return;
    this.#ended = told;
    this.config.signal?.removeEventListener('abort', this.onAbort);
    this.#abort.abort(told);
    const link = this.link;
    this.link = null;
    for (const answer of link?.pending.values() ?? []) answer.reject(told);
    if (error) link?.channel.destroy();
    this.#closed.resolve(error);
  }

  protected bounded<T>(promise: Promise<T>, what: string, movedBytes = 0): Promise<T> {
    const { requestTimeoutMs = 10_000 } = this.config;
    const timeoutMs = requestTimeoutMs + Math.ceil(movedBytes / slowestBytesPerMs);
    return within(promise, timeoutMs, 'PEER_LOST', `${what} from ${this.name} within ${timeoutMs} ms`);
  }

  /** The same error with the server's name in its facts and its text. */
  protected named(error: unknown): MemferryError {
    if (!(error instanceof MemferryError))
      return new MemferryError('SYSTEM', String(error), { cause: error });
    if (error.facts['server'] !== undefined) return error;
    return new MemferryError(error.code, `VMD server ${this.name}: ${error.message}`, {
      cause: error.cause ?? error,
      facts: { ...error.facts, server: this.name },
    });
  }
}
