/** What a client feels: the latency of each request and the longest time in which it had no answer. */

export interface LatencyFigures {
  answered: number;
  p50Ms: number;
  p99Ms: number;
  maxMs: number;
  /** The longest wait for one answer, or between one answer and the next, whichever is longer. */
  longestGapMs: number;
}

export class LatencyRecord {
  #latenciesMs: number[] = [];
  #longestGapMs = 0;
  #lastAnswerMs: number | null = null;

  /** Both by the same monotonic clock. */
  answered(sentAtMs: number, answeredAtMs: number): void {
    const latencyMs = answeredAtMs - sentAtMs;
    this.#latenciesMs.push(latencyMs);
    const silenceMs = this.#lastAnswerMs === null ? 0 : answeredAtMs - this.#lastAnswerMs;
    this.#longestGapMs = Math.max(this.#longestGapMs, latencyMs, silenceMs);
    this.#lastAnswerMs = answeredAtMs;
  }

  /** The figures since the last call; the silence that is going on belongs to the next ones. */
  take(): LatencyFigures {
    const sorted = Float64Array.from(this.#latenciesMs).sort();
    const at = (share: number) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? 0;
    const figures: LatencyFigures = {
      answered: sorted.length,
      p50Ms: at(0.5),
      p99Ms: at(0.99),
      maxMs: at(1),
      longestGapMs: this.#longestGapMs,
    };
    this.#latenciesMs = [];
    this.#longestGapMs = 0;
    return figures;
  }
}
