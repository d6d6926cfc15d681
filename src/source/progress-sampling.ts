/** The samples of `progress`: one at each interval, at each change of state, and at the end. JavaScript thread. */
import type { Guest } from '../guest.js';
import type { NativeSenderStats } from '../native.js';
import { ProgressStream } from '../progress.js';
import type { MigrationState } from '../report.js';
import type { Measurements } from './measurements.js';

export class ProgressSampling {
  readonly stream = new ProgressStream();
  /** What keeps the migration from beginning, if anything. */
  waitingFor: string | null = null;
  #timer: NodeJS.Timeout | null = null;
  #pagesSeen = 0;

  constructor(
    private readonly guest: Guest,
    private readonly measured: Measurements,
    /** Null: the migration's last word has been said. */
    private readonly now: () => { state: MigrationState; stats: NativeSenderStats | null } | null,
  ) {}

  start(intervalMs: number): void {
    this.#timer = setInterval(() => this.sample(), intervalMs);
    this.#timer.unref();
  }

  sample(): void {
    const now = this.now();
    if (!now) return;
    this.stream.push(
      this.measured.sample({ ...now, pagesTotal: this.#pagesTotal(), waitingFor: this.waitingFor }),
    );
  }

  /** With a last sample. */
  end(): void {
    if (this.#timer) clearInterval(this.#timer);
    this.sample();
    this.stream.end();
  }

  /** The guest's size, as last seen: a guest that was released has none any more. */
  #pagesTotal(): number {
    const regions = this.guest.regions.map(({ region }) => region);
    if (!regions.some((region) => region.closed)) {
      this.#pagesSeen = regions.reduce((sum, region) => sum + region.pages, 0);
    }
    return this.#pagesSeen;
  }
}
