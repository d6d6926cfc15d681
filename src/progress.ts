/**
 * A bounded stream of samples with many possible readers gone slow: at most `kept` samples wait for a
 * reader, the oldest make room. Ends when the migration does; never throws (failures come by `done`).
 */
import type { Progress } from './report.js';

export class ProgressStream implements AsyncIterable<Progress> {
  readonly #readers = new Set<{ queue: Progress[]; wake: (() => void) | null }>();
  #last: Progress | null = null;
  #ended = false;

  constructor(private readonly kept = 64) {}

  push(sample: Progress): void {
    this.#last = sample;
    for (const reader of this.#readers) {
      if (reader.queue.length >= this.kept) reader.queue.shift();
      reader.queue.push(sample);
      reader.wake?.();
    }
  }

  end(): void {
    this.#ended = true;
    for (const reader of this.#readers) reader.wake?.();
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Progress> {
    const reader = { queue: this.#last ? [this.#last] : [], wake: null as (() => void) | null };
    this.#readers.add(reader);
    try {
      for (;;) {
        const sample = reader.queue.shift();
        if (sample) {
          yield sample;
        } else if (this.#ended) {
          return;
        } else {
          await new Promise<void>((resolve) => {
            reader.wake = resolve;
          });
          reader.wake = null;
        }
      }
    } finally {
      this.#readers.delete(reader);
    }
  }
}
