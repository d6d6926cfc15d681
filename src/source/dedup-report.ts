/** From the engine's figures to what a report says of deduplication. Pure. */
import type { NativeDedupStats } from '../native.js';
import type { DedupReport } from '../report.js';

export function dedupReport(stats: NativeDedupStats, pageSize: number): DedupReport {
  const { pages, refused, examined, probes, overheadBytes, hashMs } = stats;
  return {
    pagesDeduplicated: pages,
    bytesSaved: pages * pageSize - overheadBytes,
    pagesHashed: examined,
    cpuMs: hashMs,
    probes,
    refused,
  };
}

/** The destination is of no such domain. */
export const nothingDeduplicated: DedupReport = {
  pagesDeduplicated: 0,
  bytesSaved: 0,
  pagesHashed: 0,
  cpuMs: 0,
  probes: 0,
  refused: 0,
};
