/**
 * What the source offers, and what the destination makes of it: how pages are encoded, which of them it refers to
 * instead, whether there is a base to start from. JavaScript thread.
 */
import type { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { untilAborted } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { agreedEncodings, type PageEncoding, wantedEncodings } from '../protocol/encodings.js';
import type { DestinationMessage, SourceMessage } from '../protocol/messages.js';
import { OfferedReferences } from '../protocol/references.js';
import { rehearseSwitchover } from '../rehearsal.js';
import type { ImageSet } from '../staging/image-set.js';
import { makeOffer } from './make-offer.js';
import type { SourceSession } from './session.js';
import { StartFromBase } from './start-from-base.js';

export interface Offered {
  session: SourceSession;
  /** The hosts'. */
  secret: Uint8Array;
  /** 16 bytes. */
  migrationId: Buffer;
  /** Of the guest's regions now, in bytes. */
  lengths: number[];
  mayPage: boolean;
  images: ImageSet | null;
}

export class Negotiation {
  /** Where `dedup` was asked for, and there are no servers. */
  references: OfferedReferences | null = null;
  /** The destination has a base. */
  base: StartFromBase | null = null;
  /** The destination says how much of what servers hold it still has to gather. */
  tellsMissing = false;
  /** With the encodings that the destination takes. */
  readonly #accepted: Deferred<string[]> = deferred();

  constructor(
    private readonly guest: Guest,
    private readonly options: ResolvedMigrateOptions,
    private readonly send: (message: SourceMessage) => void,
    private readonly signal: AbortSignal,
  ) {}

  /** Resolves when the destination has accepted; gives what this side can encode, and what that takes of it. */
  async offer(offered: Offered): Promise<{ wanted: PageEncoding[]; destination: PageEncoding[] }> {
    const { guest, options } = this;
    const { session, secret, migrationId, lengths, mayPage, images } = offered;
    const wanted = wantedEncodings(options);
    if (!images && options.dedup !== false) {
      this.references = await OfferedReferences.make(options.dedup, secret, session.sessionKey, migrationId);
    }
    const offer = makeOffer(guest, lengths, options, {
      migrationId,
      sessionKey: session.sessionKey,
      encodings: wanted,
      mayPage,
      images,
      references: this.references,
    });
    session.send(offer, offer.replay ? (options.replayLog ?? null) : null);
    rehearseSwitchover(); // while the destination makes up its mind
    const accepted = await untilAborted(this.#accepted.promise, this.signal);
    return { wanted, destination: agreedEncodings(accepted, wanted) };
  }

  onAccepted(message: Extract<DestinationMessage, { type: 'accepted' }>): void {
    if (message.basePages) this.#baseOffered(message.basePages);
    this.tellsMissing = message.tellsMissing;
    this.references?.answered(message.references);
    this.#accepted.resolve(message.encodings);
  }

  /** The connection is gone. */
  fail(error: MemferryError): void {
    this.#accepted.reject(error);
    this.base?.fail(error);
  }

  #baseOffered(offered: readonly number[]): void {
    if (this.options.base === 'off' || this.base) return;
    const pages = basePages(
      this.guest.regions.map(({ region }) => region.pages),
      offered,
    );
    this.base = new StartFromBase(pages, this.options, this.send, this.signal);
  }
}

/** Of each region. A base of more pages than there are is one of something else. */
export function basePages(regionPages: readonly number[], offered: readonly number[]): number[] {
  return regionPages.map((most, index) => {
    const pages = offered[index] ?? 0;
    return pages <= most ? pages : 0;
  });
}
