/**
 * Which nodes of the hash trees are looked at first, to learn whether a base is worth comparing with: a few, evenly
 * spread. Both sides compute it: the destination lays these out before all others, so that a base that has nothing in
 * common costs milliseconds. Should they not agree, pages are sent that need not be, and nothing else. Pure.
 */

/** Pages of a node (wire::kTreeNodePages). */
export const nodePages = 256;

/** Of so many nodes: a small part, and enough to say something of the rest. */
export function sampleNodes(nodes: number): number {
  return Math.max(1, Math.min(16, Math.ceil(nodes / 64)));
}

/** Runs of pages of the sample; `basePages`: of each region, 0 for none. As native/transfer/base_comparison.cc chooses. */
export function samplePages(
  basePages: readonly number[],
): { region: number; first: number; count: number }[] {
  const nodesOf = (pages: number) => Math.ceil(pages / nodePages);
  const nodes = basePages.reduce((sum, pages) => sum + nodesOf(pages), 0);
  if (nodes === 0) return [];
  const step = Math.max(1, Math.ceil(nodes / sampleNodes(nodes)));
  const runs = [];
  let seen = 0;
  for (const [region, pages] of basePages.entries()) {
    for (let node = 0; node < nodesOf(pages); node++) {
      if (seen++ % step !== Math.floor(step / 2)) continue;
      const first = node * nodePages;
      runs.push({ region, first, count: Math.min(nodePages, pages - first) });
    }
  }
  return runs;
}
