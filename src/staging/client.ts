/**
 * A VMD server as its users see it: one control connection, made anew when it is cut, with every image opened
 * again. Requests are bounded in time; all of them but `create` may be sent twice, and are when a connection breaks
 * under them. JavaScript thread.
 */
import { EventEmitter } from 'node:events';
import { ControlChannel } from '../control/channel.js';
import { dial } from '../control/dial.js';
import { MemferryError } from '../errors.js';
import { untilAborted, within } from '../protocol/bounded.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { fromPeer } from '../protocol/peer-error.js';
import {
  type Announcement,
  type CreateImage,
  type ImageAccess,
  type ImageInfo,
  type ParkedGuest,
  type StageAnswer,
  stageAnswer,
  type StageRequest,
  type StageStatus,
} from '../protocol/stage-messages.js';
import { memberRoles, openProof, roleBits, sealDomainKey, sealSecret, stageTokens } from './image-secret.js';

export interface StageClientConfig {
  host: string;
  port: number;
  /** In errors; `host:port` without one, until the server says its name. */
  name?: string;
  secret: Uint8Array;
  plaintext?: boolean;
  connectTimeoutMs?: number;
  /** From a request to its answer, redialling included. */
  requestTimeoutMs?: number;
  peerTimeoutMs?: number;
  /** How long a cut may last while an image is open, before the server counts as gone. */
  recoverTimeoutMs?: number;
  /** Largest execution state, both ways; default 64 MiB. */
  maxStateBytes?: number;
  signal?: AbortSignal;
}

/** A session for stage connections: what `NativeStageServer` needs. */
export interface StageSession {
  readonly session: number;
  readonly tokens: Uint8Array;
  /** For writing: the encodings of pages that the server decodes. */
  readonly encodings?: string[];
  /** Of the server's memory, 16 hex digits; null where it is not needed. */
  readonly identity: string | null;
}

export interface Claim {
  readonly epoch: number;
  readonly guest: ParkedGuest;
  readonly state: Uint8Array;
}

/** What the client is told of the park's commit, see `commitLink`. */
export interface CommitEvents {
  onMessage(message: DestinationMessage): void;
  /** The connection is gone, and PREPARE was said. */
  onLost(error: MemferryError): void;
}

type Request = Exclude<StageRequest, SourceMessage>;
type Unnumbered<R> = R extends Request ? Omit<R, 'request'> : never;
type Answer = Exclude<StageAnswer, DestinationMessage | { type: 'announce' }>;
type AnswerOf<Type extends Answer['type']> = Extract<Answer, { type: Type }>;

interface Received<Type extends Answer['type']> {
  message: AnswerOf<Type>;
  binary: Uint8Array | null;
  link: Link;
}

/** One connection. */
interface Link {
  readonly channel: ControlChannel<StageAnswer, StageRequest>;
  readonly sessionKey: Uint8Array;
  readonly remoteAddress: string;
  readonly pending: Map<number, Deferred<{ message: Answer; binary: Uint8Array | null }>>;
  /** Images that are open on it. */
  readonly open: Set<string>;
}

/** An image that stays open over redials. */
interface OpenImage {
  readonly secret: Uint8Array;
  claim: { claimant: string; epoch: number } | null;
}

const firstRetryMs = 100;
const longestRetryMs = 2000;

interface ClientEvents {
  announcement: [Announcement];
  /** The server no longer has this image: dropped, or restarted. */
  lost: [image: string, error: MemferryError];
}

export class StageClient extends EventEmitter<ClientEvents> {
  /** Null after `close`; the reason when the server could not be reached any more. Never rejects. */
  readonly closed: Promise<MemferryError | null>;
  readonly #closed = deferred<MemferryError | null>();
  readonly #images = new Map<string, OpenImage>();
  readonly #abort = new AbortController();
  #link: Link | null = null;
  #dialling: Promise<Link> | null = null;
  #recovering = false;
  #ended: MemferryError | null = null;
  #announcement: Announcement | null = null;
  #remoteAddress: string | null = null;
  #nextRequest = 1;
  #commit: { image: string; events: CommitEvents; spoken: boolean } | null = null;

  private constructor(private readonly config: StageClientConfig) {
    super();
    this.closed = this.#closed.promise;
  }

  /** Rejects with CONNECT_FAILED, AUTH_FAILED, PLAINTEXT_REQUIRED, ...; the facts name the server. */
  static async dial(config: StageClientConfig): Promise<StageClient> {
    const client = new StageClient(config);
    try {
      config.signal?.addEventListener('abort', client.#onAbort, { once: true });
      if (config.signal?.aborted) client.#onAbort();
      await client.#connected();
    } catch (error) {
      await client.close();
      throw client.#named(error);
    }
    return client;
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
    return this.#bounded(Promise.race([heard, gone]), 'no announcement came');
  }

  /** Makes an image there and opens it for writing; `domainKey`: of its deduplication domain, or null. Not repeated: a create that was cut leaves what its lease ends. */
  async create(
    create: Omit<CreateImage, 'type' | 'request' | 'sealedSecret' | 'sealedDomain'>,
    secret: Uint8Array,
    domainKey: Uint8Array | null = null,
  ): Promise<StageSession> {
    const { link, message } = await this.#ask(
      'created',
      ({ sessionKey }) => ({
        ...create,
        type: 'create',
        sealedSecret: sealSecret(sessionKey, bytesOf(create.image), secret),
        sealedDomain: domainKey ? sealDomainKey(sessionKey, bytesOf(create.image), domainKey) : null,
      }),
      { repeat: false },
    );
    this.#images.set(create.image, { secret, claim: null });
    link.open.add(create.image);
    const { encodings, identity } = message;
    return { ...sessionOf(link, create.image, message.session, 'write'), encodings, identity };
  }

  /** Rejects with VMD_LOST, AUTH_FAILED. The session is null for `control`. */
  async open(
    image: string,
    secret: Uint8Array,
    access: ImageAccess,
  ): Promise<{ info: ImageInfo; session: StageSession | null }> {
    const known = this.#images.get(image);
    const claim = known?.claim ?? null;
    const { link, message } = await this.#ask('opened', ({ sessionKey }) => ({
      type: 'open',
      image,
      proof: openProof(secret, sessionKey),
      access,
      claim,
    }));
    this.#images.set(image, known ?? { secret, claim: null });
    link.open.add(image);
    const { info, session } = message;
    return { info, session: session === null ? null : sessionOf(link, image, session, access) };
  }

  /** The guest runs elsewhere: no lease ends the image any more. */
  async commit(image: string): Promise<void> {
    await this.#askAbout('committed', { type: 'commit', image });
  }

  /** A park's pages stay, at a server that is not its home. */
  async hold(image: string): Promise<void> {
    await this.#askAbout('held', { type: 'hold', image });
  }

  async seal(image: string, digests: string[] | null): Promise<void> {
    await this.#askAbout('sealed', { type: 'seal', image, digests });
  }

  async grow(image: string, region: number, pages: number): Promise<void> {
    await this.#askAbout('grown', { type: 'grow', image, region, pages });
  }

  /** Whether it was there. `epoch`: of the claim by which the guest resumed, else 0. */
  async dissolve(image: string, epoch = 0): Promise<boolean> {
    try {
      const ask = { type: 'dissolve', image, epoch } as const;
      // Nobody waits for pages that nobody needs: a server that is cut now keeps them for its operator.
      const { message } = await this.#askAbout('dissolved', ask, { patient: false });
      this.forget(image);
      return message.known;
    } catch (error) {
      // Lost is what it was to become.
      if (!(error instanceof MemferryError) || error.code !== 'VMD_LOST') throw error;
      this.forget(image);
      return false;
    }
  }

  /**
   * Rejects with VMD_REFUSED (`reason` says why) when somebody else has the guest. `claimant`: 32 hex digits;
   * `rollback`: the owner (`info.owner`) that the caller knows to be dead.
   */
  async claim(image: string, claimant: string, rollback: number | null = null): Promise<Claim> {
    const { message, binary } = await this.#askAbout('claimed', { type: 'claim', image, claimant, rollback });
    const { epoch, guest } = message;
    const open = this.#images.get(image);
    if (open) open.claim = { claimant, epoch };
    if (!binary) throw this.#named(new MemferryError('PROTOCOL_ERROR', 'a claim without an execution state'));
    return { epoch, guest, state: binary };
  }

  /** The commit of a claim: from its answer on, the guest is the claimant's. Without an answer nobody knows. */
  async grant(image: string, claimant: string, epoch: number): Promise<void> {
    await this.#askAbout('granted', { type: 'grant-claim', image, claimant, epoch });
    const open = this.#images.get(image);
    if (open) open.claim = null;
  }

  async release(image: string, claimant: string, epoch: number): Promise<void> {
    await this.#askAbout('released', { type: 'release-claim', image, claimant, epoch });
    const open = this.#images.get(image);
    if (open) open.claim = null;
  }

  /** The guest of a park, beside its pages. */
  async putState(image: string, guest: ParkedGuest, state: Uint8Array): Promise<void> {
    await this.#askAbout('stored', { type: 'state', image, guest }, { binary: state });
  }

  /**
   * Into a domain, for as long as this connection lasts: whoever holds the session notices when it is gone, and joins
   * again. `member`: 32 hex digits, fresh. Rejects with VMD_CAPACITY.
   */
  async join(member: string, domainKey: Uint8Array, guest: string | null): Promise<StageSession> {
    const { link, message } = await this.#ask(
      'joined',
      ({ sessionKey }) => ({
        type: 'join',
        member,
        sealedDomain: sealDomainKey(sessionKey, bytesOf(member), domainKey),
        guest,
      }),
      { repeat: false },
    );
    const { session, identity } = message;
    return { session, tokens: stageTokens(link.sessionKey, bytesOf(member), session, memberRoles), identity };
  }

  /** Whether it was there. */
  async leave(member: string): Promise<boolean> {
    return (await this.#ask('left', () => ({ type: 'leave', member }), { repeat: false })).message.known;
  }

  async status(): Promise<StageStatus> {
    return (await this.#ask('status', () => ({ type: 'status' }))).message.status;
  }

  /** Whether it was there. */
  async drop(image: string): Promise<boolean> {
    return (await this.#ask('dropped', () => ({ type: 'drop', image }))).message.known;
  }

  /** The image is not opened again after a cut. */
  forget(image: string): void {
    this.#images.delete(image);
    this.#link?.open.delete(image);
  }

  /** What a CommitDriver needs to park `image` here: `send` throws without a connection, `redial` makes a new one. */
  commitLink(
    image: string,
    events: CommitEvents,
  ): { send(message: SourceMessage): void; redial(): Promise<void> } {
    const commit = { image, events, spoken: false };
    this.#commit = commit;
    return {
      send: (message) => {
        const link = this.#link;
        // Where the image is gone the server still answers what the commit asks, but never PREPARE.
        if (!link || !(commit.spoken || link.open.has(image))) {
          throw new MemferryError('CHANNEL_LOST', 'there is no control connection');
        }
        commit.spoken = true;
        void link.channel.send(message);
      },
      redial: async () => {
        const old = this.#link;
        this.#link = null;
        old?.channel.destroy();
        const link = await this.#connected();
        await this.#reopen(link, image).catch((error: unknown) => {
          // The server answers for images that are gone, too: QUERY tells what became of the park.
          if (!(error instanceof MemferryError) || error.code !== 'VMD_LOST') throw error;
        });
      },
    };
  }

  /** Says goodbye. Images stay as they are: uncommitted ones for their lease. Twice is fine. */
  async close(): Promise<void> {
    const link = this.#link;
    this.#end(null, new MemferryError('CANCELLED', `the connection to ${this.name} was closed`));
    await link?.channel.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  readonly #onAbort = (): void => void this.close();

  #askAbout<Type extends Answer['type']>(
    type: Type,
    message: Unnumbered<Request> & { image: string },
    { binary = null, patient = true }: { binary?: Uint8Array | null; patient?: boolean } = {},
  ): Promise<Received<Type>> {
    return this.#ask(type, () => message, { image: message.image, binary, patient });
  }

  /** Sends and waits for the answer; over a new connection, with `image` opened again, if this one breaks. */
  async #ask<Type extends Answer['type']>(
    type: Type,
    make: (link: Link) => Unnumbered<Request>,
    {
      image = null,
      binary = null,
      repeat = true,
      patient = image !== null,
    }: { image?: string | null; binary?: Uint8Array | null; repeat?: boolean; patient?: boolean } = {},
  ): Promise<Received<Type>> {
    let over = false;
    const attempt = async (): Promise<Received<Type>> => {
      for (let tries = repeat ? 2 : 1; ; tries--) {
        const link = patient ? await this.#connectedPatiently(() => over) : await this.#connected();
        try {
          if (image !== null) await this.#reopen(link, image);
          return await this.#exchange(link, type, make(link), binary);
        } catch (error) {
          if (tries <= 1 || over || this.#ended || !link.channel.reason) throw error;
        }
      }
    };
    try {
      return await this.#bounded(untilAborted(attempt(), this.#abort.signal), `no answer to '${type}'`);
    } catch (error) {
      throw this.#named(error);
    } finally {
      over = true;
    }
  }

  async #exchange<Type extends Answer['type']>(
    link: Link,
    type: Type,
    message: Unnumbered<Request>,
    binary: Uint8Array | null,
  ): Promise<Received<Type>> {
    const request = this.#nextRequest;
    this.#nextRequest = (request % (2 ** 31 - 1)) + 1;
    const answer = deferred<{ message: Answer; binary: Uint8Array | null }>();
    link.pending.set(request, answer);
    try {
      link.channel.send({ ...message, request } as Request, binary).catch((error) => answer.reject(error));
      const got = await this.#bounded(answer.promise, `no answer to '${message.type}'`);
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
  async #reopen(link: Link, image: string): Promise<void> {
    const known = this.#images.get(image);
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
        this.emit('lost', image, this.#named(error));
      }
      throw error;
    }
    link.open.add(image);
  }

  #connected(): Promise<Link> {
    if (this.#ended) return Promise.reject(this.#ended);
    if (this.#link) return Promise.resolve(this.#link);
    this.#dialling ??= this.#dial().finally(() => {
      this.#dialling = null;
    });
    return this.#dialling;
  }

  /** While the server may come back, its image with it; the caller's bound ends it. */
  async #connectedPatiently(isOver: () => boolean): Promise<Link> {
    for (let retryMs = firstRetryMs; ; retryMs = Math.min(retryMs * 2, longestRetryMs)) {
      try {
        return await this.#connected();
      } catch (error) {
        if (this.#ended || isOver()) throw error;
        await new Promise((resolve) => setTimeout(resolve, retryMs));
        if (isOver()) throw error;
      }
    }
  }

  async #dial(): Promise<Link> {
    const {
      host,
      port,
      secret,
      plaintext,
      connectTimeoutMs = 5000,
      peerTimeoutMs,
      maxStateBytes,
    } = this.config;
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
        maxBinaryBytes: maxStateBytes ?? 64 * 2 ** 20,
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
    this.#link = link;
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
    if (this.#link === link) this.#onLost(error);
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
        if (this.#link === link) this.#commit?.events.onMessage(message);
        break;
      default:
        // An answer that nobody waits for any more was too late.
        link.pending.get(message.request)?.resolve({ message, binary });
    }
  }

  #onLost(error: MemferryError): void {
    this.#link = null;
    if (this.#ended) return;
    if (this.#commit?.spoken) this.#commit.events.onLost(this.#named(error));
    if (this.#images.size > 0) void this.#recover();
  }

  /** While an image is open its lease runs at the server: dials without being asked, up to the bound. */
  async #recover(): Promise<void> {
    if (this.#recovering) return;
    this.#recovering = true;
    const deadline = performance.now() + (this.config.recoverTimeoutMs ?? 30_000);
    let retryMs = firstRetryMs;
    try {
      while (!this.#ended && this.#images.size > 0) {
        try {
          const link = await this.#connected();
          for (const image of [...this.#images.keys()]) {
            await this.#reopen(link, image).catch((error: unknown) => {
              // Its own users hear of it by `lost`, and by their next request; the others' images are there.
              if (link.channel.reason) throw error;
            });
          }
          return;
        } catch (cause) {
          if (performance.now() + retryMs > deadline) {
            const text = `the VMD server ${this.name} did not come back in time`;
            this.#end(this.#named(new MemferryError('PEER_LOST', text, { cause })));
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
    this.config.signal?.removeEventListener('abort', this.#onAbort);
    this.#abort.abort(told);
    const link = this.#link;
    this.#link = null;
    for (const answer of link?.pending.values() ?? []) answer.reject(told);
    if (error) link?.channel.destroy();
    this.#closed.resolve(error);
  }

  #bounded<T>(promise: Promise<T>, what: string): Promise<T> {
    const timeoutMs = this.config.requestTimeoutMs ?? 10_000;
    return within(promise, timeoutMs, 'PEER_LOST', `${what} from ${this.name} within ${timeoutMs} ms`);
  }

  /** The same error with the server's name in its facts and its text. */
  #named(error: unknown): MemferryError {
    if (!(error instanceof MemferryError))
      return new MemferryError('SYSTEM', String(error), { cause: error });
    if (error.facts['server'] !== undefined) return error;
    return new MemferryError(error.code, `VMD server ${this.name}: ${error.message}`, {
      cause: error.cause ?? error,
      facts: { ...error.facts, server: this.name },
    });
  }
}

function sessionOf(link: Link, image: string, session: number, access: ImageAccess): StageSession {
  return {
    session,
    tokens: stageTokens(link.sessionKey, bytesOf(image), session, roleBits[access]),
    identity: null,
  };
}

function bytesOf(image: string): Uint8Array {
  return Buffer.from(image, 'hex');
}
