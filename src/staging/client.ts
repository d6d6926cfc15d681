/**
 * A VMD server as its users see it: what can be asked of it, over a connection that is made anew when it is cut
 * (stage-link.ts). JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import type {
  CreateImage,
  ImageAccess,
  ImageInfo,
  ParkedGuest,
  StageStatus,
} from '../protocol/stage-messages.js';
import { memberRoles, openProof, roleBits, sealDomainKey, sealSecret, stageTokens } from './image-secret.js';
import { type Link, StageLink, type StageClientConfig } from './stage-link.js';

export type { StageClientConfig } from './stage-link.js';

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

export class StageClient extends StageLink {
  #commit: { image: string; events: CommitEvents; spoken: boolean } | null = null;

  /** Rejects with CONNECT_FAILED, AUTH_FAILED, PLAINTEXT_REQUIRED, ...; the facts name the server. */
  static async dial(config: StageClientConfig): Promise<StageClient> {
    const client = new StageClient(config);
    try {
      config.signal?.addEventListener('abort', client.onAbort, { once: true });
      if (config.signal?.aborted) client.onAbort();
      await client.connected();
    } catch (error) {
      await client.close();
      throw client.named(error);
    }
    return client;
  }

  /** Makes an image there and opens it for writing; `domainKey`: of its deduplication domain, or null. Not repeated: a create that was cut leaves what its lease ends. */
  async create(
    create: Omit<CreateImage, 'type' | 'request' | 'sealedSecret' | 'sealedDomain'>,
    secret: Uint8Array,
    domainKey: Uint8Array | null = null,
  ): Promise<StageSession> {
    const { link, message } = await this.ask(
      'created',
      ({ sessionKey }) => ({
        ...create,
        type: 'create',
        sealedSecret: sealSecret(sessionKey, bytesOf(create.image), secret),
        sealedDomain: domainKey ? sealDomainKey(sessionKey, bytesOf(create.image), domainKey) : null,
      }),
      { repeat: false },
    );
    this.images.set(create.image, { secret, claim: null });
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
    const known = this.images.get(image);
    const claim = known?.claim ?? null;
    const { link, message } = await this.ask('opened', ({ sessionKey }) => ({
      type: 'open',
      image,
      proof: openProof(secret, sessionKey),
      access,
      claim,
    }));
    this.images.set(image, known ?? { secret, claim: null });
    link.open.add(image);
    const { info, session } = message;
    return { info, session: session === null ? null : sessionOf(link, image, session, access) };
  }

  /** The guest runs elsewhere: no lease ends the image any more. */
  async commit(image: string): Promise<void> {
    await this.askAbout('committed', { type: 'commit', image });
  }

  /** A park's pages stay, at a server that is not its home. */
  async hold(image: string): Promise<void> {
    await this.askAbout('held', { type: 'hold', image });
  }

  async seal(image: string, digests: string[] | null): Promise<void> {
    await this.askAbout('sealed', { type: 'seal', image, digests });
  }

  async grow(image: string, region: number, pages: number): Promise<void> {
    await this.askAbout('grown', { type: 'grow', image, region, pages });
  }

  /** Whether it was there. `epoch`: of the claim by which the guest resumed, else 0. */
  async dissolve(image: string, epoch = 0): Promise<boolean> {
    try {
      const ask = { type: 'dissolve', image, epoch } as const;
      // Nobody waits for pages that nobody needs: a server that is cut now keeps them for its operator.
      const { message } = await this.askAbout('dissolved', ask, { patient: false });
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
    const { message, binary } = await this.askAbout(
      'claimed',
      { type: 'claim', image, claimant, rollback },
      { answerBytes: this.maxStateBytes },
    );
    const { epoch, guest } = message;
    const open = this.images.get(image);
    if (open) open.claim = { claimant, epoch };
    if (!binary) throw this.named(new MemferryError('PROTOCOL_ERROR', 'a claim without an execution state'));
    return { epoch, guest, state: binary };
  }

  /** The commit of a claim: from its answer on, the guest is the claimant's. Without an answer nobody knows. */
  async grant(image: string, claimant: string, epoch: number): Promise<void> {
    await this.askAbout('granted', { type: 'grant-claim', image, claimant, epoch });
    const open = this.images.get(image);
    if (open) open.claim = null;
  }

  async release(image: string, claimant: string, epoch: number): Promise<void> {
    await this.askAbout('released', { type: 'release-claim', image, claimant, epoch });
    const open = this.images.get(image);
    if (open) open.claim = null;
  }

  /** The guest of a park, beside its pages. */
  async putState(image: string, guest: ParkedGuest, state: Uint8Array): Promise<void> {
    await this.askAbout('stored', { type: 'state', image, guest }, { binary: state });
  }

  /**
   * Into a domain, for as long as this connection lasts: whoever holds the session notices when it is gone, and joins
   * again. `member`: 32 hex digits, fresh. Rejects with VMD_CAPACITY.
   */
  async join(member: string, domainKey: Uint8Array, guest: string | null): Promise<StageSession> {
    const { link, message } = await this.ask(
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
    return (await this.ask('left', () => ({ type: 'leave', member }), { repeat: false })).message.known;
  }

  async status(): Promise<StageStatus> {
    return (await this.ask('status', () => ({ type: 'status' }))).message.status;
  }

  /** Whether it was there. */
  async drop(image: string): Promise<boolean> {
    return (await this.ask('dropped', () => ({ type: 'drop', image }))).message.known;
  }

  /** The image is not opened again after a cut. */
  forget(image: string): void {
    this.images.delete(image);
    this.link?.open.delete(image);
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
        const link = this.link;
        // Where the image is gone the server still answers what the commit asks, but never PREPARE.
        if (!link || !(commit.spoken || link.open.has(image))) {
          throw new MemferryError('CHANNEL_LOST', 'there is no control connection');
        }
        commit.spoken = true;
        void link.channel.send(message);
      },
      redial: async () => {
        const old = this.link;
        this.link = null;
        old?.channel.destroy();
        const link = await this.connected();
        await this.reopen(link, image).catch((error: unknown) => {
          // The server answers for images that are gone, too: QUERY tells what became of the park.
          if (!(error instanceof MemferryError) || error.code !== 'VMD_LOST') throw error;
        });
      },
    };
  }

  protected told(message: DestinationMessage): void {
    this.#commit?.events.onMessage(message);
  }

  protected cut(error: MemferryError): void {
    if (this.#commit?.spoken) this.#commit.events.onLost(error);
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
