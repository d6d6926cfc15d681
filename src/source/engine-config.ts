/** What a migration has agreed with its destination and its servers, as the native sender takes it. Pure. */
import { baseKey, dataTokens } from '../control/tokens.js';
import type { Guest } from '../guest.js';
import type { NativeSenderConfig } from '../native.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { agreedEncodings, encodingFlags, type PageEncoding } from '../protocol/encodings.js';
import { maxEpochs } from '../protocol/epochs.js';
import type { OfferedReferences } from '../protocol/references.js';
import type { ImageSet } from '../staging/image-set.js';
import type { DirtyTracker } from '../trackers.js';
import type { SourceSession } from './session.js';

export interface Agreed {
  guest: Guest;
  options: ResolvedMigrateOptions;
  session: SourceSession;
  /** 16 bytes. */
  migrationId: Uint8Array;
  /** Of the regions, in bytes, as they were offered. */
  lengths: readonly number[];
  trackers: readonly (DirtyTracker | null)[];
  images: ImageSet | null;
  references: OfferedReferences | null;
  /** What this side can encode, and what the destination takes of it. */
  encodings: { wanted: readonly PageEncoding[]; destination: readonly PageEncoding[] };
  /** Of each region, or null: there is no base to compare with. */
  basePages: number[] | null;
  /** Pages may go to the VMD as references. */
  dedupInVmd: boolean;
}

export function engineConfig(agreed: Agreed): Omit<NativeSenderConfig, 'onEvent'> {
  const { guest, options, session, migrationId, images, references, basePages } = agreed;
  const { wanted, destination } = agreed.encodings;
  return {
    regions: guest.regions.map(({ region }) => region.native),
    trackers: agreed.trackers.map((tracker) => tracker?.native ?? null),
    toldPages: guest.regions.map(({ region }, index) => (agreed.lengths[index] ?? 0) / region.pageSize),
    host: session.remoteAddress,
    port: options.to.port,
    migration: migrationId,
    channels: options.channels,
    tokens: dataTokens(session.sessionKey, migrationId, maxEpochs, options.channels),
    bandwidth: options.bandwidth,
    connectTimeoutMs: options.connectTimeoutMs,
    recoverTimeoutMs: options.recoverTimeoutMs,
    servers: images?.servers ?? [],
    replicas: options.replicas,
    compress: options.compress,
    destinationEncodings: encodingFlags(destination),
    serverEncodings: encodingFlags(agreedEncodings(images?.encodings ?? [], wanted)),
    deltaCacheBytes: options.deltaCacheBytes,
    direct: true,
    stallTimeoutMs: options.stallTimeoutMs,
    releaseAsEvicted: options.releaseAsEvicted,
    ...(basePages ? { basePages, baseKey: baseKey(session.sessionKey, migrationId) } : {}),
    dedupKey: agreed.dedupInVmd ? (images?.domainKey ?? null) : null,
    referencesKey: references?.agreed ? references.key : null,
  };
}
