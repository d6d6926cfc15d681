/**
 * One image at one server: its claims machine, timers, sessions of stage connections, and the native calls that
 * follow from them. Owned by the table (images.ts); JavaScript thread.
 */
import { MemferryError, native } from '../errors.js';
import type { NativeImageStats, NativeStage } from '../native.js';
import type { SourceMessage } from '../protocol/commit.js';
import type { DestinationState } from '../protocol/commit-destination.js';
import {
  type ClaimsAnswer,
  type ClaimsEvent,
  type ClaimsRequest,
  type ClaimsState,
  type ClaimsTimer,
  type DissolveCause,
  epochOf,
  initialClaims,
  ownerOf,
  stepClaims,
} from '../protocol/image-claims.js';
import type { CreateImage, ImageAccess, ImageInfo, ImagePhase } from '../protocol/stage-messages.js';
import { InTurn } from '../protocol/in-turn.js';
import { NamedTimers } from '../protocol/timers.js';
import {
  chainAttempts,
  chainTable,
  chainTokens,
  firstChainSession,
  roleBits,
  stageRoles,
  stageTokens,
} from './image-secret.js';
import { type CommitLink, ParkCommit } from './park-commit.js';
import { type ArrivingState, readParked } from './parked-state.js';

/**
 * Sessions of one image: its source's, its destination's, those of claimants. Their tokens (8 KiB each) lie outside
 * of the server's memory cap, so there are few; what nobody has open any more makes room.
 */
const maxSessions = 16;
const lastSession = 0xfeff;

/** A control connection that has an image open. */
export interface Opener extends CommitLink {
  readonly sessionKey: Uint8Array;
}

export interface StagedImageConfig {
  create: CreateImage;
  secret: Uint8Array;
  stage: NativeStage;
  claimLeaseMs: number;
  grantTimeoutMs: number;
  parkTtlMs: number | null;
  /** The park's commit has an outcome. */
  decided(state: DestinationState): void;
  /**
   * Nobody finds it any more; `givenBack` resolves when its memory is free. `untouched`: its maker has let go of it before
   * anything came, or anybody else knew of it: its place among the servers is another one, perhaps, and it makes it again.
   */
  gone(cause: DissolveCause, givenBack: Promise<void> | null, untouched: boolean): void;
}

export class StagedImage {
  readonly id: string;
  readonly bytes: Uint8Array;
  readonly secret: Uint8Array;
  readonly createdMs = performance.now();
  readonly #create: CreateImage;
  readonly #stage: NativeStage;
  readonly #park: ParkCommit | null;
  readonly #timers: NamedTimers<ClaimsTimer>;
  /** What the claims machine answered to each event that is under way. */
  readonly #answers = new Map<ClaimsEvent, ClaimsAnswer>();
  readonly #events = new InTurn<ClaimsEvent>((event) => {
    const { phase } = this.#claims;
    const { state, actions } = stepClaims(this.#claims, event);
    this.#claims = state;
    for (const action of actions) {
      if (action.type === 'answer') this.#answers.set(event, action.answer);
      else if (action.type === 'start-timer') this.#timers.start(action.timer);
      else if (action.type === 'stop-timer') this.#timers.stop(action.timer);
      else this.#drop(action.cause, phase);
    }
  });
  readonly #openers = new Set<Opener>();
  /** Connections of the newest claim's claimant. */
  readonly #holders = new Set<Opener>();
  readonly #sessions: { number: number; access: ImageAccess; opener: Opener }[] = [];
  #nextSession = 1;
  #claims: ClaimsState;
  #digests: string[] | null = null;
  #stateStored = false;
  /** The one that began to come on the newest connection that had this open. */
  #arriving: { connection: number; state: ArrivingState } | null = null;

  /** The image is in the native stage already. */
  constructor(private readonly config: StagedImageConfig) {
    const { create, parkTtlMs } = config;
    this.id = create.image;
    this.bytes = Buffer.from(create.image, 'hex');
    this.secret = config.secret;
    this.#create = create;
    this.#stage = config.stage;
    const home = create.ordinal === 0;
    this.#claims = initialClaims({ kind: create.kind, home, mortal: parkTtlMs !== null });
    this.#timers = new NamedTimers(
      { lease: create.leaseMs, claim: config.claimLeaseMs, ttl: parkTtlMs ?? 0 },
      (timer) => this.#dispatch({ type: `${timer}-over` }),
    );
    this.#park =
      create.kind === 'park' && home
        ? new ParkCommit({
            grantTimeoutMs: config.grantTimeoutMs,
            prepare: () => this.#prepare(),
            park: () => {
              // What a source that is gone from here on could still write, nobody should read.
              this.#endSessions('write');
              this.#dispatch({ type: 'park' });
            },
            abandon: () => this.#dispatch({ type: 'abandon' }),
            decided: config.decided,
          })
        : null;
    if (create.replicas === 2) this.#chain();
  }

  get phase(): ImagePhase {
    return this.#claims.phase;
  }

  get info(): ImageInfo {
    const { name, kind, ordinal, servers, replicas, pageSize, regions } = this.#create;
    return {
      name,
      kind,
      phase: this.#claims.phase,
      ordinal,
      servers,
      replicas,
      pageSize,
      regions,
      sealed: this.stats()?.sealed ?? false,
      digests: this.#digests,
      epoch: epochOf(this.#claims),
      owner: ownerOf(this.#claims),
    };
  }

  stats(): NativeImageStats | null {
    return native(() => this.#stage.image(this.bytes));
  }

  /** A connection that has proved itself. Gives the number of its new session, null for `control`. */
  open(
    opener: Opener,
    access: ImageAccess,
    claim: { claimant: string; epoch: number } | null,
  ): number | null {
    const session = access === 'control' ? null : this.#addSession(opener, access);
    this.#openers.add(opener);
    if (claim && this.#claims.phase === 'claimed' && claim.epoch === this.#claims.epoch) {
      if (claim.claimant === this.#claims.claimant) this.#holders.add(opener);
    }
    this.#dispatch({ type: 'opened', claim });
    return session;
  }

  /** The connection is gone. */
  detach(opener: Opener): void {
    if (!this.#openers.delete(opener)) return;
    this.#park?.detached(opener);
    const epoch = epochOf(this.#claims);
    if (this.#holders.delete(opener) && this.#holders.size === 0) {
      this.#dispatch({ type: 'claimant-lost', epoch });
    }
    if (this.#openers.size === 0) this.#dispatch({ type: 'connection-lost' });
  }

  /** Carries out a request that the claims machine decides, and gives its answer. */
  request(event: Exclude<ClaimsRequest, { type: 'claim' }>): ClaimsAnswer {
    return this.#dispatch(event) as ClaimsAnswer;
  }

  /** With the guest and its execution state when the claim is given; then `state` is to be read, or let go of. */
  claim(
    opener: Opener,
    { claimant, rollback }: { claimant: string; rollback: number | null },
  ): { answer: ClaimsAnswer; parked: ReturnType<typeof readParked> | null } {
    const before = epochOf(this.#claims);
    const whole = this.#stateStored && native(() => this.#stage.whole(this.bytes, this.#pages())) === true;
    const answer = this.#dispatch({ type: 'claim', claimant, rollback, whole }) as ClaimsAnswer;
    if (answer.type !== 'claimed') return { answer, parked: null };
    if (answer.epoch !== before) this.#holders.clear();
    this.#holders.add(opener);
    const held = native(() => this.#stage.state(this.bytes));
    if (!held) throw new MemferryError('VMD_LOST', 'the execution state is not here any more');
    return { answer, parked: readParked(held) };
  }

  noteArriving(connection: number, state: ArrivingState): void {
    if (!this.#arriving || this.#arriving.connection <= connection) this.#arriving = { connection, state };
  }

  /** Another one comes in its place, on a later connection. A whole one waits for its answer. */
  forgetHalfState(connection: number): void {
    const former = this.#arriving;
    if (!former || former.connection >= connection) return;
    if (!former.state.isWhole) former.state.discard();
    this.#arriving = null;
  }

  /** Throws VMD_REFUSED when the image is not its source's any more, VMD_CAPACITY when there was no room. */
  storeState({ bytes, held }: ArrivingState): void {
    this.#mustBeMigrating('a state');
    if (!held) {
      throw new MemferryError('VMD_CAPACITY', `there is no room for an execution state of ${bytes} bytes`, {
        facts: { bytes, free: this.#stage.stats().freeBytes },
      });
    }
    if (!native(() => this.#stage.putState(this.bytes, held))) {
      throw new MemferryError('VMD_LOST', 'the image is gone');
    }
    this.#stateStored = true;
  }

  grow(region: number, pages: number): void {
    const entry = this.#create.regions[region];
    this.#mustBeMigrating('growth');
    if (!entry || pages < entry.pages || pages > entry.capacityPages) {
      throw new MemferryError(
        'PROTOCOL_ERROR',
        'growth of a region that is not there, or beyond its capacity',
        {
          facts: { region, pages },
        },
      );
    }
    entry.pages = pages;
  }

  seal(digests: string[] | null): void {
    this.#digests = digests;
    native(() => this.#stage.seal(this.bytes));
  }

  /** A word of the park's commit; false when this image has none. */
  commit(opener: Opener, message: SourceMessage): boolean {
    this.#park?.message(opener, message);
    return this.#park !== null;
  }

  /** The server ends: timers stop, nothing is decided any more. */
  close(): void {
    this.#timers.close();
    this.#park?.fail(new MemferryError('CANCELLED', 'the VMD server was closed'));
  }

  #mustBeMigrating(what: string): void {
    if (this.#claims.phase !== 'migrating' && this.#claims.phase !== 'committed') {
      throw new MemferryError('VMD_REFUSED', `${what} for an image that is ${this.#claims.phase}`, {
        facts: { reason: 'not-migrating' },
      });
    }
  }

  #pages(): number[] {
    return this.#create.regions.map(({ pages }) => pages);
  }

  /** Everything that can fail about parking. */
  #prepare(): void {
    if (!this.#stateStored) throw new MemferryError('PROTOCOL_ERROR', 'PREPARE without a state');
    if (native(() => this.#stage.whole(this.bytes, this.#pages())) !== true) {
      throw new MemferryError(
        'PREPARE_FAILED',
        'the map of the parked guest does not have all of its pages',
        {
          facts: { ...(this.stats() ?? {}) },
        },
      );
    }
    this.#dispatch({ type: 'prepared' });
    if (this.#claims.phase !== 'parking') {
      throw new MemferryError('VMD_LOST', 'the image is not being parked any more');
    }
  }

  #addSession(opener: Opener, access: ImageAccess): number {
    if (this.#sessions.length >= maxSessions) {
      // The oldest whose control connection is gone makes room; its stage connections end.
      const at = this.#sessions.findIndex((session) => !this.#openers.has(session.opener));
      const [oldest] = at < 0 ? [] : this.#sessions.splice(at, 1);
      if (!oldest) {
        throw new MemferryError('LIMIT_EXCEEDED', `no more than ${maxSessions} sessions of one image`, {
          facts: { limit: maxSessions },
        });
      }
      native(() => this.#stage.removeSession(this.bytes, oldest.number));
    }
    if (this.#nextSession > lastSession) {
      throw new MemferryError('LIMIT_EXCEEDED', 'the image has used up its sessions', {
        facts: { limit: lastSession },
      });
    }
    const number = this.#nextSession++;
    const tokens = stageTokens(opener.sessionKey, this.bytes, number, roleBits[access]);
    if (!native(() => this.#stage.addSession(this.bytes, number, roleBits[access], tokens))) {
      throw new MemferryError('VMD_LOST', 'the image is gone');
    }
    this.#sessions.push({ number, access, opener });
    return number;
  }

  #endSessions(access: ImageAccess): void {
    for (let at = this.#sessions.length - 1; at >= 0; at--) {
      const session = this.#sessions[at];
      if (session?.access !== access) continue;
      this.#sessions.splice(at, 1);
      native(() => this.#stage.removeSession(this.bytes, session.number));
    }
  }

  /** Every server may pass pages on to every other one: which does, the source says page by page. */
  #chain(): void {
    const { servers, ordinal: own } = this.#create;
    const attempts = chainAttempts(servers.length);
    const chainRole = 1 << stageRoles.chain;
    for (const [other, { host, port }] of servers.entries()) {
      if (other === own) continue;
      const out = chainTokens(this.secret, this.bytes, own, other, attempts);
      const back = chainTable(chainTokens(this.secret, this.bytes, other, own, attempts));
      native(() => this.#stage.setChain(this.bytes, other, host, port, out));
      native(() => this.#stage.addSession(this.bytes, firstChainSession + other, chainRole, back));
    }
  }

  /** Gives the answer that the event itself got. */
  #dispatch(event: ClaimsEvent): ClaimsAnswer | null {
    this.#events.dispatch(event);
    const answer = this.#answers.get(event) ?? null;
    this.#answers.delete(event);
    return answer;
  }

  #isUntouched(): boolean {
    const { bytesIn, pagesKnown } = this.stats() ?? { bytesIn: 1, pagesKnown: 0 };
    return bytesIn === 0 && pagesKnown === 0 && !this.#stateStored && this.#nextSession <= 2;
  }

  #drop(cause: DissolveCause, phase: ImagePhase): void {
    const untouched = cause === 'dissolve' && phase === 'migrating' && this.#isUntouched();
    this.#timers.stopAll();
    this.#openers.clear();
    this.#holders.clear();
    this.config.gone(
      cause,
      native(() => this.#stage.drop(this.bytes)),
      untouched,
    );
    if (untouched) return; // nobody asks about its park
    // A source that is READY hears at once that its guest will not be parked.
    this.#park?.fail(new MemferryError('VMD_LOST', `the image is gone (${cause})`));
  }
}
