/**
 * A migration on the terminal while it runs: one line that changes (state, round, dirty rate, throughput,
 * expected downtime, remote faults), the bar being the pages that have left.
 */
import { SingleBar } from 'cli-progress';
import { figure, mebibytes } from '../demo/table.js';
import type { MigrationState, Progress } from '../report.js';

/** Pure: what stands beside the bar. */
export function describeProgress(progress: Progress): string {
  const parts = [
    progress.state,
    `round ${progress.round}`,
    `${mebibytes(progress.bytesPerSecond)} MiB/s`,
    `${mebibytes(progress.bytesOnWire)} MiB sent`,
  ];
  const saved = progress.bytesSaved.compression + progress.bytesSaved.delta;
  if (saved > 0) parts.push(`${mebibytes(saved)} MiB saved`);
  if (progress.dirtyPagesPerSecond !== null)
    parts.push(`${figure(progress.dirtyPagesPerSecond)} dirty pages/s`);
  if (progress.expectedDowntimeMs !== null) parts.push(`downtime ~${figure(progress.expectedDowntimeMs)} ms`);
  if (progress.remoteFaults > 0) parts.push(`${progress.remoteFaults} remote faults`);
  if (progress.pagesDeduplicated > 0) parts.push(`${progress.pagesDeduplicated} deduplicated`);
  if (progress.pagesFromBase > 0) parts.push(`${progress.pagesFromBase} pages there already`);
  return parts.join(', ');
}

export class LiveProgress {
  #bar: SingleBar | null = null;
  #label: string;

  constructor(label: string) {
    this.#label = label;
  }

  state(state: MigrationState): void {
    this.#bar?.update({ text: state });
  }

  update(progress: Progress): void {
    const text = describeProgress(progress);
    const { pagesTotal, pagesPending, bytesOnWire } = progress;
    if (!this.#bar) {
      const format = '{label} [{bar}] {percentage}% {text}';
      this.#bar = new SingleBar({ format, barsize: 20, hideCursor: true, clearOnComplete: true, fps: 10 });
      this.#bar.start(Math.max(1, pagesTotal), 0, { label: this.#label, text });
    }
    if (pagesTotal === 0) {
      // At the end the memory is gone here, and its size with it.
      this.#bar.update({ text });
      return;
    }
    this.#bar.setTotal(pagesTotal);
    // Nothing pending before the first page was queued does not mean that everything has left.
    this.#bar.update(bytesOnWire === 0 ? 0 : Math.max(0, pagesTotal - pagesPending), { text });
  }

  stop(): void {
    this.#bar?.stop();
    this.#bar = null;
  }
}
