/**
 * One authenticated control connection at a VMD server: takes its requests one after the other and answers each.
 * Owned by the server; JavaScript thread.
 */
import type { BinarySource } from '../control/binary-part.js';
import type { ControlChannel } from '../control/channel.js';
import { MemferryError } from '../errors.js';
import type { DestinationMessage, SourceMessage } from '../protocol/commit.js';
import { answerUnknown } from '../protocol/commit-destination.js';
import { decodedByServers } from '../protocol/encodings.js';
import type { ClaimsAnswer } from '../protocol/image-claims.js';
import { toPeer } from '../protocol/peer-error.js';
import type { Announcement, StageAnswer, StageRequest, StageStatus } from '../protocol/stage-messages.js';
import type { Opener, StagedImage } from './image.js';
import { provesOpen, unsealDomainKey, unsealSecret } from './image-secret.js';
import type { StagedImages } from './images.js';
import type { StagedMembers } from './members.js';
import { ArrivingState } from './parked-state.js';

export type StageChannel = ControlChannel<StageRequest, StageAnswer>;
type Request = Exclude<StageRequest, SourceMessage>;
type Answer = Exclude<StageAnswer, DestinationMessage | { type: 'announce' }>;
/** An answer without the number that it repeats. */
type Said = Answer extends infer A ? (A extends Answer ? Omit<A, 'request'> : never) : never;

/** Images that one connection may have open: a client has one, or a few. */
const maxOpen = 64;

export class StageConnection implements Opener {
  /** By id; also those that have gone since. */
  readonly #open = new Map<string, StagedImage>();
  /** The image that commit messages are about, whether or not it is here (any more). */
  #commitImage: string | null = null;

  /** `number`: goes up from one connection to the next. */
  constructor(
    private readonly number: number,
    private readonly channel: StageChannel,
    readonly sessionKey: Uint8Array,
    private readonly images: StagedImages,
    private readonly members: StagedMembers,
    private readonly status: () => StageStatus,
  ) {}

  announce(announcement: Announcement): void {
    void this.channel.send({ type: 'announce', ...announcement });
  }

  /** To the source of a park. */
  send(message: DestinationMessage): void {
    void this.channel.send(message);
  }

  /** Where a state goes as it comes: whose it is, and whether it may be stored, is looked at when it is whole. */
  sink(message: StageRequest, bytes: number): ArrivingState | null {
    if (message.type !== 'state') return null;
    // A client that lost its connection says it again on the next one, perhaps before this side has noticed.
    const image = this.#open.get(message.image);
    image?.forgetHalfState(this.number);
    const arriving = new ArrivingState(bytes, message.guest, (room) => this.images.makeState(room));
    image?.noteArriving(this.number, arriving);
    return arriving;
  }

  /** Until the connection ends. */
  async serve(): Promise<void> {
    try {
      for await (const { message, sink } of this.channel) {
        if (isCommit(message)) {
          this.#onCommit(message);
          continue;
        }
        // Awaiting the send is the backpressure: a peer that takes no answers is asked for no more questions.
        await this.#answer(message, sink as ArrivingState | null);
      }
    } finally {
      for (const image of this.#open.values()) image.detach(this);
      this.#open.clear();
      this.members.leaveAll(this);
    }
  }

  async #answer(message: Request, arrived: ArrivingState | null): Promise<void> {
    const { request } = message;
    let said: Said;
    let part: BinarySource | null = null;
    try {
      [said, part] = this.#carryOut(message, arrived);
    } catch (error) {
      const { code, message: text } = toPeer(error, 'SYSTEM');
      const reason = error instanceof MemferryError ? error.facts['reason'] : null;
      said = { type: 'declined', code, message: text, reason: typeof reason === 'string' ? reason : null };
    } finally {
      arrived?.discard();
    }
    // Who is told that it is gone may make another at once, and counts on its memory.
    if (message.type === 'dissolve' || message.type === 'drop') await this.images.givenBack(message.image);
    await this.channel.send({ ...said, request } as Answer, part);
  }

  #carryOut(message: Request, arrived: ArrivingState | null): [Said, BinarySource | null] {
    switch (message.type) {
      case 'create':
        return [this.#create(message), null];
      case 'open':
        return [this.#openImage(message), null];
      case 'seal':
        this.#mine(message.image).seal(message.digests);
        return [{ type: 'sealed' }, null];
      case 'grow':
        this.#mine(message.image).grow(message.region, message.pages);
        return [{ type: 'grown' }, null];
      case 'state':
        if (!arrived) throw new MemferryError('PROTOCOL_ERROR', 'a state without its bytes');
        this.#mine(message.image).storeState(arrived);
        return [{ type: 'stored' }, null];
      case 'claim': {
        const { answer, parked } = this.#mine(message.image).claim(this, message);
        if (answer.type !== 'claimed' || !parked) return [said(answer), null];
        return [{ type: 'claimed', epoch: answer.epoch, guest: parked.guest }, parked.state];
      }
      case 'commit':
      case 'hold':
        return [said(this.#mine(message.image).request({ type: message.type })), null];
      case 'grant-claim':
        return [said(this.#mine(message.image).request({ ...message, type: 'grant' })), null];
      case 'release-claim':
        return [said(this.#mine(message.image).request({ ...message, type: 'release' })), null];
      case 'dissolve': {
        // What is gone already needs no dissolving: the answer to the first one may have been lost.
        const image = this.images.find(message.image);
        if (!image) return [{ type: 'dissolved', known: false }, null];
        return [said(this.#mine(message.image).request({ type: 'dissolve', epoch: message.epoch })), null];
      }
      case 'join': {
        const { member, guest } = message;
        const key = unsealDomainKey(this.sessionKey, Buffer.from(member, 'hex'), message.sealedDomain);
        const session = this.members.join(this, member, key, guest);
        return [{ type: 'joined', session, identity: this.images.identity }, null];
      }
      case 'leave':
        return [{ type: 'left', known: this.members.leave(this, message.member) }, null];
      case 'status':
        return [{ type: 'status', status: this.status() }, null];
      case 'drop':
        return [{ type: 'dropped', known: this.images.drop(message.image) }, null];
    }
  }

  #create(message: Extract<Request, { type: 'create' }>): Said {
    this.#mayOpen(message.image);
    const id = Buffer.from(message.image, 'hex');
    const secret = unsealSecret(this.sessionKey, id, message.sealedSecret);
    const { sealedDomain } = message;
    const domainKey = sealedDomain === null ? null : unsealDomainKey(this.sessionKey, id, sealedDomain);
    const image = this.images.create(message, secret, domainKey);
    let session: number | null;
    try {
      session = image.open(this, 'write', null);
    } catch (error) {
      image.request({ type: 'drop' });
      throw error;
    }
    this.#open.set(image.id, image);
    this.#commitImage = image.id;
    return {
      type: 'created',
      session: session as number,
      encodings: [...decodedByServers],
      identity: this.images.identity,
    };
  }

  #openImage(message: Extract<Request, { type: 'open' }>): Said {
    // Also when it is not here: a source that asks about its park gets the answer that can be given.
    this.#commitImage = message.image;
    this.#mayOpen(message.image);
    const image = this.images.get(message.image);
    if (!provesOpen(image.secret, this.sessionKey, message.proof)) {
      throw new MemferryError('AUTH_FAILED', "the image's secret was not shown", {
        facts: { reason: 'proof' },
      });
    }
    const session = image.open(this, message.access, message.claim);
    this.#open.set(image.id, image);
    return { type: 'opened', session, info: image.info };
  }

  #mayOpen(id: string): void {
    for (const [other, image] of this.#open) if (this.images.find(other) !== image) this.#open.delete(other);
    if (this.#open.has(id) || this.#open.size < maxOpen) return;
    throw new MemferryError('LIMIT_EXCEEDED', `no more than ${maxOpen} images on one connection`, {
      facts: { limit: maxOpen },
    });
  }

  /** An image that this connection has opened. Throws VMD_LOST when it is gone, VMD_REFUSED when it was not opened. */
  #mine(id: string): StagedImage {
    const image = this.images.get(id);
    if (this.#open.get(id) === image) return image;
    throw new MemferryError('VMD_REFUSED', 'the image was not opened on this connection', {
      facts: { reason: 'not-open' },
    });
  }

  #onCommit(message: SourceMessage): void {
    const id = this.#commitImage;
    if (id === null) throw new MemferryError('PROTOCOL_ERROR', `'${message.type}' before any image`);
    const image = this.#open.get(id);
    if (image && this.images.find(id) === image && image.commit(this, message)) return;
    // Over, or never here: what was decided, or that nothing is known.
    const known = this.images.tombstones.has(id);
    const answer = known ? this.images.tombstones.answer(id, message) : answerUnknown(message);
    if (answer) this.send(answer);
  }
}

function isCommit(message: StageRequest): message is SourceMessage {
  return ['prepare', 'grant', 'query', 'cancel'].includes(message.type);
}

/** What the claims machine has decided, in the words of the wire. */
function said(answer: ClaimsAnswer): Said {
  switch (answer.type) {
    case 'declined':
      throw new MemferryError(answer.reason === 'gone' ? 'VMD_LOST' : 'VMD_REFUSED', answer.message, {
        facts: { reason: answer.reason },
      });
    case 'dissolved':
    case 'dropped':
      return { type: answer.type, known: true };
    case 'claimed':
      throw new Error('a claim is answered with its guest');
    default:
      return { type: answer.type };
  }
}
