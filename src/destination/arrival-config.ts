/** What an arrival is given, and of that, what the native receiver takes. */
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { NativeListener, NativeReceiverConfig } from '../native.js';
import type { ResolvedListenOptions } from '../options.js';
import type { DestinationState } from '../protocol/commit-destination.js';
import { agreedEncodings, decodedHere, encodingFlags } from '../protocol/encodings.js';
import type { DestinationMessage, OfferMessage } from '../protocol/messages.js';
import type { ImageSet } from '../staging/image-set.js';

/** The control connection, as far as an arrival cares. */
export interface ArrivalLink {
  /** Tells one connection from another. */
  readonly channel: object;
  /** Of its listener's connections, by when each had proved itself. */
  readonly order: number;
  send(message: DestinationMessage): void;
  close(): Promise<void>;
}

export interface ArrivalConfig {
  offer: OfferMessage;
  /** The same as the guest's owner was given it. */
  given: GuestOffer;
  guest: ArrivingGuest;
  listener: NativeListener;
  link: ArrivalLink;
  tokens: Uint8Array;
  /** 64 bytes: for comparing a base. */
  baseKey: Uint8Array;
  /** What the regions start from: the guest's own word, or the listener's. */
  bases: ArrivingGuest['bases'];
  options: ResolvedListenOptions;
  /** Scatter modes: the servers that hold a part of the guest. */
  images: ImageSet | null;
  /** Whose pages count as known here, where that was agreed on with the source. */
  known: { key: Uint8Array; share: string | null } | null;
  /** So many bytes more are about to be taken; throws when they may not be. */
  grows(bytes: number): void;
  /** The commit has an outcome: remember it. */
  decided(state: DestinationState): void;
  /** Nothing is left of the arrival here. */
  ended(): void;
}

/** `bases`: as basesOf gives them. Pure. */
export function receiverConfig(
  config: ArrivalConfig,
  bases: NativeReceiverConfig['bases'] | null,
): Omit<NativeReceiverConfig, 'onEvent'> {
  const { offer, guest, options, images } = config;
  return {
    regions: guest.regions.map((region) => region.native),
    migration: Buffer.from(offer.migrationId, 'hex'),
    channels: offer.channels,
    tokens: config.tokens,
    discardFirst: true,
    pagingFromStart: false,
    mayPage: offer.mayPage,
    keepPageHashes: offer.verify,
    recoverTimeoutMs: options.recoverTimeoutMs,
    lossGraceMs: 250,
    servers: images?.servers ?? [],
    gatherLimit: options.gatherLimit,
    bandwidth: options.bandwidth,
    sourceless: false,
    encodings: encodingFlags(agreedEncodings(offer.encodings, decodedHere)),
    ...(bases ? { bases, baseKey: config.baseKey } : {}),
    known: config.known,
  };
}
