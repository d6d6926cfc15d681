/**
 * One image over all servers of its list (made or opened there by image-opening.ts): committed, sealed and dissolved at
 * all that live, claimed and granted at home. Owned by one migration, park or claim; JavaScript thread. The first server
 * is the home server; the order is the ordinals', for everyone and for good.
 */
import { randomBytes } from 'node:crypto';
import { MemferryError } from '../errors.js';
import type { NativeServerStats, NativeStageServer } from '../native.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import type { ImageInfo, ImageKind, ParkedGuest } from '../protocol/stage-messages.js';
import type { Intermediary } from '../report.js';
import { type Claim, StageClient } from './client.js';
import { asError, dissolveAt, type ImageSetConnection, isAway, type Member, openAt } from './image-member.js';
import { stageAttempts, stageRoleCount } from './image-secret.js';

/** What one server did not do. */
export interface ServerFailure {
  readonly ordinal: number;
  readonly name: string;
  readonly error: MemferryError;
}

/** Rejects when the engine gives the server up: its answers are not waited for any longer. */
type GivenUp = Deferred<never>;

/** Between two attempts at a server that is away. */
const tryAgainMs = 250;
const dissolveAgainMs = 1_000;

export class ImageSet {
  readonly image: string;
  readonly secret: Uint8Array;
  readonly kind: ImageKind;
  /** At the image's maker, where it shares content: the key of its deduplication domain. */
  readonly domainKey: Uint8Array | null;
  /** As the home server has it; null at the image's maker. */
  readonly info: ImageInfo | null;
  /** Servers that were named and did not answer when the image was made. */
  readonly #unanswered: readonly Intermediary[];
  readonly #members: Member[];
  readonly #givenUp: GivenUp[];
  readonly #connection: ImageSetConnection;
  #claim: { claimant: string; epoch: number } | null = null;
  #granted = 0;
  #othersTold: Promise<unknown> | null = null;
  #closed = false;

  constructor(made: {
    image: string;
    secret: Uint8Array;
    kind: ImageKind;
    info: ImageInfo | null;
    members: Member[];
    unanswered?: readonly Intermediary[];
    domainKey?: Uint8Array | null;
    connection: ImageSetConnection;
  }) {
    this.image = made.image;
    this.secret = made.secret;
    this.kind = made.kind;
    this.domainKey = made.domainKey ?? null;
    this.info = made.info;
    this.#members = made.members;
    this.#unanswered = made.unanswered ?? [];
    this.#givenUp = made.members.map(() => {
      const givenUp: GivenUp = deferred();
      givenUp.promise.catch(() => {}); // nobody may be waiting
      return givenUp;
    });
    this.#connection = made.connection;
    for (const member of made.members) this.#watch(member);
  }

  /**
   * Opens it for reading where that has failed, again and again, until so few servers are missing that every page should have
   * a copy at another, or `timeoutMs` are over.
   */
  async openMissing(timeoutMs: number): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    const mayCome = ({ client, error }: Member) => !client && error?.code !== 'VMD_LOST';
    const tooMany = () => this.missing.filter(Boolean).length >= (this.info?.replicas ?? 1);
    while (tooMany() && this.#members.some(mayCome) && performance.now() < deadline) {
      if (this.#connection.signal?.aborted) return;
      await new Promise((resolve) => setTimeout(resolve, tryAgainMs));
      const away = [...this.#members.entries()].filter(([, member]) => mayCome(member));
      await Promise.all(away.map(([ordinal, member]) => this.#openAgain(ordinal, member)));
    }
  }

  /** By ordinal, whether it could not be opened there. */
  get missing(): boolean[] {
    return this.#members.map(({ client }) => client === null);
  }

  /** For the engines: all of the list, in order. One that failed has a session that it will refuse. */
  get servers(): NativeStageServer[] {
    return this.#members.map(({ address, session }) => ({
      ...address,
      session: session?.session ?? 0,
      identity: session?.identity ?? null,
      tokens: session?.tokens ?? new Uint8Array(stageAttempts * stageRoleCount * 32),
    }));
  }

  /** Of pages, which every server decodes: what comes to one may be passed on to another as it is. */
  get encodings(): string[] {
    const [first, ...others] = this.#members.map(({ session }) => session?.encodings ?? []);
    return (first ?? []).filter((name) => others.every((known) => known.includes(name)));
  }

  /** Its clients by ordinal; null for one that failed. For announcements, mostly. */
  get clients(): readonly (StageClient | null)[] {
    return this.#members.map(({ client }) => client);
  }

  get home(): StageClient {
    const { client, error } = this.#members[0] as Member;
    if (client) return client;
    throw error ?? new MemferryError('VMD_LOST', 'the home server is gone');
  }

  /** The servers that have failed by now. */
  get failures(): ServerFailure[] {
    return this.#members.flatMap(({ address, error }, ordinal) =>
      error ? [{ ordinal, name: address.name, error }] : [],
    );
  }

  /** `add` to an offer: how others reach the same servers in the same order. */
  get list(): { name: string; host: string; port: number }[] {
    return this.#members.map(({ address }) => ({ ...address }));
  }

  /**
   * No lease ends the image from here on. For a migration after its commit, by either end. For a park before
   * `transferred()`: the other servers hold their pages for good, and then GRANT parks the guest at home.
   */
  commit(): Promise<ServerFailure[]> {
    return this.#atAll((client, ordinal) => {
      if (this.kind === 'migration') return client.commit(this.image);
      return ordinal === 0 ? Promise.resolve() : client.hold(this.image);
    });
  }

  seal(digests: string[] | null): Promise<ServerFailure[]> {
    return this.#atAll((client) => client.seal(this.image, digests));
  }

  /** The engine has given the server up: what it holds counts for nothing, and only `dissolve` asks it again. */
  giveUp(ordinal: number, why: string): void {
    const member = this.#members[ordinal];
    if (!member) return;
    member.error ??= new MemferryError('PEER_LOST', `VMD server ${member.address.name}: ${why}`, {
      facts: { server: member.address.name },
    });
    this.#givenUp[ordinal]?.reject(member.error);
  }

  /** For reports: what the servers did, by an engine's figures, and then who did not answer. */
  account(stats: readonly NativeServerStats[]): Intermediary[] {
    const used = this.#members.map(({ address }, ordinal) => {
      const { pages = 0, bytes = 0, failed = null } = stats[ordinal] ?? {};
      return { name: address.name, pages, bytes, failed };
    });
    return [...used, ...this.#unanswered];
  }

  /** What the source sealed the image with; null when it sealed with nothing, or has not sealed yet. */
  async digests(): Promise<string[] | null> {
    for (const { address, error } of this.#members) {
      if (error) continue;
      // By a connection of its own: an image is open once on each.
      const client = await StageClient.dial({ ...this.#connection, ...address }).catch(() => null);
      try {
        const opened = await client?.open(this.image, this.secret, 'control');
        if (opened?.info.digests) return opened.info.digests;
      } catch {
        // It has lost the image, or is going: the next one may know.
      } finally {
        await client?.close();
      }
    }
    return null;
  }

  /** Before pages of the growth are sent; throws the first failure. */
  async grow(region: number, pages: number): Promise<void> {
    const [failure] = await this.#atAll((client) => client.grow(this.image, region, pages));
    if (failure) throw failure.error;
  }

  putState(guest: ParkedGuest, state: Uint8Array): Promise<void> {
    return this.home.putState(this.image, guest, state);
  }

  /**
   * Lets the image go everywhere. Home is asked first: when it refuses (somebody has claimed the guest since), the
   * others keep their pages, and its refusal is thrown. A home server that is gone refuses nothing.
   */
  async dissolve(): Promise<ServerFailure[]> {
    const home = this.#members[0]?.client;
    if (home) {
      try {
        await home.dissolve(this.image, this.#granted);
      } catch (error) {
        if (error instanceof MemferryError && error.code === 'VMD_REFUSED') throw error;
      }
    }
    const away = this.#members
      .slice(1)
      .filter(({ client, error }) => isAway(client) && error?.code !== 'VMD_LOST');
    const [failed] = await Promise.all([
      this.#atAll(
        (client, ordinal) => (ordinal === 0 ? Promise.resolve() : client.dissolve(this.image, this.#granted)),
        { failedToo: true },
      ),
      ...away.map((member) => this.#dissolveLater(member)),
    ]);
    return failed;
  }

  /**
   * Asks the home server for the guest. One claim at a time; the same `claimant` may ask again. `rollback`: the
   * caller knows that the guest's owner is dead and stays so; `true` means the one that there was when the image was
   * opened. Rejects with VMD_REFUSED when somebody else has the guest. After any other failure nobody knows whether
   * there is a claim: the connections are closed, so that it goes back.
   */
  async claim({
    claimant = randomBytes(16).toString('hex'),
    rollback = false,
  }: {
    claimant?: string;
    rollback?: boolean | number;
  } = {}): Promise<Claim> {
    const owner = typeof rollback === 'number' ? rollback : rollback ? (this.info?.owner ?? null) : null;
    try {
      const claim = await this.home.claim(this.image, claimant, owner);
      this.#claim = { claimant, epoch: claim.epoch };
      return claim;
    } catch (error) {
      const { code } = asError(error);
      if (code !== 'VMD_REFUSED' && code !== 'VMD_LOST') await this.close();
      throw error;
    }
  }

  /** The claim's commit. Rejects with VMD_REFUSED when it is over; with anything else the outcome is not known. */
  async grant(): Promise<void> {
    const { claimant, epoch } = this.#mustHaveClaimed();
    await this.home.grant(this.image, claimant, epoch);
    this.#granted = epoch;
    this.#othersTold ??= Promise.all(this.#members.slice(1).map((member) => this.#tellResumed(member)));
  }

  /**
   * After grant(), which does not wait for it: the others know that somebody has resumed from them, so that no time to live
   * ends what they hold. Or they have gone. Never rejects.
   */
  async othersTold(): Promise<void> {
    await this.#othersTold;
  }

  async release(): Promise<void> {
    const { claimant, epoch } = this.#mustHaveClaimed();
    await this.home.release(this.image, claimant, epoch);
    this.#claim = null;
  }

  /** Closes the connections; the image stays as it is. */
  async close(): Promise<void> {
    this.#closed = true;
    await Promise.all(this.#members.map(({ client }) => client?.close()));
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #mustHaveClaimed(): { claimant: string; epoch: number } {
    if (this.#claim) return this.#claim;
    throw new MemferryError('INVALID_ARGUMENT', 'there is no claim to grant or release');
  }

  /** At every server that has not failed; one that fails at it is out from then on, and named. */
  async #atAll(
    act: (client: StageClient, ordinal: number) => Promise<unknown>,
    { failedToo = false } = {},
  ): Promise<ServerFailure[]> {
    const before = new Set(this.failures.map(({ ordinal }) => ordinal));
    await Promise.all(
      this.#members.map(async (member, ordinal) => {
        if (!member.client || (member.error && !failedToo)) return;
        try {
          const acted = act(member.client, ordinal);
          const givenUp = this.#givenUp[ordinal]?.promise;
          await (failedToo ? acted : Promise.race([acted, givenUp]));
        } catch (error) {
          member.error ??= asError(error);
        }
      }),
    );
    return this.failures.filter(({ ordinal }) => !before.has(ordinal));
  }

  async #openAgain(ordinal: number, member: Member): Promise<void> {
    const { image, secret } = this;
    const opened = await openAt(member.address, this.#connection, { image, secret, access: 'read' });
    if (opened.info && opened.info.ordinal !== ordinal) {
      await opened.client?.close();
      return;
    }
    const { address, client, session, error } = opened;
    Object.assign(member, { address, client, session, error });
    this.#watch(member);
  }

  async #tellResumed(member: Member): Promise<void> {
    while (!this.#closed && member.client && !isAway(member.client)) {
      try {
        await member.client.commit(this.image);
        return;
      } catch (error) {
        const { code } = asError(error);
        if (code === 'VMD_LOST' || code === 'VMD_REFUSED') return;
      }
      await new Promise((resolve) => setTimeout(resolve, tryAgainMs));
    }
  }

  /** One that has not answered for long may be back, or come back. Only the first attempt is waited for. */
  async #dissolveLater(member: Member): Promise<void> {
    const until = performance.now() + (this.#connection.recoverTimeoutMs ?? 0);
    const attempt = async () => {
      if (await dissolveAt(member, this.#connection, this, this.#granted)) return;
      // Then it keeps its part until its operator drops it.
      if (performance.now() < until) setTimeout(attempt, dissolveAgainMs).unref();
    };
    await attempt();
  }

  #watch(member: Member): void {
    const { client } = member;
    if (!client) return;
    client.on('lost', (image, error) => {
      if (image === this.image) member.error ??= error;
    });
    void client.closed.then((error) => {
      if (error) member.error ??= error;
    });
  }
}
