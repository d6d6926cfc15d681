/** From the figures of a migration's parts to the report of its eviction. */
import type { Guest } from '../guest.js';
import type { Mode } from '../options.js';
import type { OfferedReferences } from '../protocol/references.js';
import type { EvictionReport } from '../report.js';
import type { ImageSet } from '../staging/image-set.js';
import type { DirtyTracker } from '../trackers.js';
import { dedupReport, nothingDeduplicated } from './dedup-report.js';
import type { SourceEngine } from './engine.js';
import type { Measurements } from './measurements.js';
import type { StartFromBase } from './start-from-base.js';

export interface MigrationParts {
  id: string;
  guest: Guest;
  mode: Mode;
  /** It pages by now, whatever its mode was. */
  paging: boolean;
  engine: SourceEngine;
  measured: Measurements;
  trackers: readonly (DirtyTracker | null)[];
  images: ImageSet | null;
  base: StartFromBase | null;
  references: OfferedReferences | null;
}

export function evictionReport(parts: MigrationParts): EvictionReport {
  const { guest, engine, images } = parts;
  const stats = engine.stats();
  const { totalMs: _total, gatherMs: _gather, ...times } = parts.measured.report();
  const pageSize = guest.regions[0]?.region.pageSize ?? 4096;
  return {
    migrationId: parts.id,
    guest: guest.name,
    mode: parts.mode,
    switchedToPostCopy: parts.paging,
    heapBytes: guest.regions.reduce((sum, { region }) => sum + region.lengthBytes, 0),
    tracker: parts.trackers.find((tracker) => tracker)?.name ?? null,
    ...times,
    bytesOnWire: stats.bytesOnWire,
    pagesSent: stats.pagesSent,
    pagesZero: stats.pagesZero,
    pagesResent: stats.pagesResent,
    compression: stats.compression,
    delta: stats.delta,
    redials: stats.redials,
    // What was sent to the destination itself; without servers that is everything.
    pagesDirect: images
      ? stats.pagesDirect
      : stats.pagesSent + stats.pagesZero + (stats.dedup?.pages ?? 0) - stats.pagesResent,
    pagesWithOneCopy: stats.pagesSingle,
    intermediaries: images?.account(stats.servers) ?? [],
    base: parts.base?.report(engine) ?? null,
    dedup: stats.dedup ? dedupReport(stats.dedup, pageSize) : parts.references && nothingDeduplicated,
  };
}
