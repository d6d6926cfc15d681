/** Medians and percentiles of raw figures. */

export function median(figures: readonly number[]): number {
  if (figures.length === 0) throw new RangeError('median of nothing');
  const sorted = Float64Array.from(figures).sort();
  const middle = sorted.length >> 1;
  const upper = sorted[middle] as number;
  return sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] as number) + upper) / 2;
}

/** The same definition as in the floors: the element at index floor(count * q). */
export function quantile(figures: ArrayLike<number>, q: number): number {
  if (figures.length === 0) throw new RangeError('quantile of nothing');
  const sorted = Float64Array.from(figures).sort();
  return sorted[Math.min(Math.floor(sorted.length * q), sorted.length - 1)] as number;
}
