/** What a source says of a guest before the destination decides whether it takes it. Pure. */
import type { Guest } from '../guest.js';
import { lineageOf } from '../lineage.js';
import type { ResolvedMigrateOptions } from '../options.js';
import type { PageEncoding } from '../protocol/encodings.js';
import type { OfferMessage } from '../protocol/messages.js';
import type { OfferedReferences } from '../protocol/references.js';
import { sealLineage, sealSecret } from '../staging/image-secret.js';
import type { ImageSet } from '../staging/image-set.js';
import { describeGuest } from './stage-image.js';

/** @param lengths of each region, in bytes. @param migrationId 16 bytes. */
export function makeOffer(
  guest: Guest,
  lengths: number[],
  options: ResolvedMigrateOptions,
  parts: {
    migrationId: Buffer;
    sessionKey: Uint8Array;
    encodings: PageEncoding[];
    mayPage: boolean;
    images: ImageSet | null;
    references: OfferedReferences | null;
  },
): OfferMessage {
  const { migrationId, sessionKey, images } = parts;
  const regions = guest.regions.map(({ region }) => region);
  return {
    type: 'offer',
    migrationId: migrationId.toString('hex'),
    mode: options.mode,
    mayPage: parts.mayPage,
    verify: options.verify,
    channels: options.channels,
    encodings: parts.encodings,
    base: options.base !== 'off',
    replay: options.base !== 'off' && options.replayLog !== undefined,
    references: parts.references?.offer ?? null,
    lineage: sealLineage(sessionKey, migrationId, lineageOf(regions)),
    scatter: images
      ? {
          servers: images.list,
          sealedSecret: sealSecret(sessionKey, migrationId, images.secret),
          gatherTimeoutMs: options.gatherTimeoutMs,
        }
      : null,
    guest: describeGuest(guest, lengths),
  };
}
