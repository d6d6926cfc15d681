/**
 * The destination's base: what it puts into a guest's regions before the first page, so that only what differs has to
 * come. Nothing of it is believed: the source confirms each page by hash (docs/protocol.md, "Starting from a base").
 * JavaScript thread; the bytes go from files and other regions straight into memory, on threads of the pool.
 */
import { native, nativeAsync } from '../errors.js';
import type { ArrivingGuest, RegionBase } from '../guest.js';
import type { Region } from '../region.js';

/** What became of it. */
export interface BaseOutcome {
  /** Something is there that may be compared. */
  ready: boolean;
  /** Why not all of it, or nothing; for reports. */
  problem: string | null;
  filledBytes: number;
  fillMs: number;
  replayMs: number;
}

/** Between two looks at whether it is still wanted: some ms. */
const pieceBytes = 8 * 2 ** 20;
const tellEveryMs = 50;

export class BaseFilling {
  readonly #stop = new AbortController();
  readonly outcome: Promise<BaseOutcome>;

  constructor(
    private readonly guest: ArrivingGuest,
    private readonly replayLog: Uint8Array | null,
    /** How much is there; what the rest is expected to take beyond that, or null where nobody knows. */
    private readonly tell: (fraction: number, expectedMs: number | null) => void,
  ) {
    this.outcome = this.#fill();
  }

  /** Ends it soon: in the middle of a region, or by the signal that a function of the owner's has. */
  stop(): void {
    this.#stop.abort();
  }

  get #replays(): boolean {
    return this.replayLog !== null && this.guest.replay !== undefined;
  }

  async #fill(): Promise<BaseOutcome> {
    const { signal } = this.#stop;
    const outcome: BaseOutcome = { ready: false, problem: null, filledBytes: 0, fillMs: 0, replayMs: 0 };
    const started = performance.now();
    const bases = this.guest.regions.map((region, index) => ({ region, base: this.guest.bases?.[index] }));
    const totalBytes = bases.reduce((sum, { region, base }) => sum + (base ? region.lengthBytes : 0), 0);
    let doneBytes = 0;
    let toldAtMs = 0;
    const done = (bytes: number, filled: number) => {
      doneBytes += bytes;
      outcome.filledBytes += filled;
      if (performance.now() - toldAtMs < tellEveryMs) return;
      toldAtMs = performance.now();
      this.tell(Math.min(1, doneBytes / totalBytes), this.#expectedMs());
    };
    try {
      for (const { region, base } of bases) if (base) await fillRegion(region, base, done, signal);
      outcome.fillMs = performance.now() - started;
      if (this.#replays && !signal.aborted) {
        this.tell(1, this.#expectedMs());
        const replaying = performance.now();
        try {
          await this.guest.replay?.apply(this.replayLog as Uint8Array, { signal });
        } catch (error) {
          // The base is what it was, or something in between: the comparison finds out.
          outcome.problem = `replay: ${String(error)}`;
        }
        outcome.replayMs = performance.now() - replaying;
      }
    } catch (error) {
      outcome.problem = String(error);
      outcome.fillMs ||= performance.now() - started;
    }
    outcome.ready = outcome.filledBytes > 0 && !signal.aborted;
    if (!outcome.ready) outcome.problem ??= signal.aborted ? 'not ready in time' : 'the base is empty';
    return outcome;
  }

  #expectedMs(): number | null {
    return this.#replays ? (this.guest.replay?.expectedMs ?? null) : 0;
  }
}

async function fillRegion(
  region: Region,
  base: RegionBase,
  done: (bytes: number, filled: number) => void,
  signal: AbortSignal,
): Promise<void> {
  const { pages, pageSize, lengthBytes } = region;
  if ('inPlace' in base) {
    done(lengthBytes, lengthBytes);
    return;
  }
  if ('fill' in base) {
    await base.fill(region, { signal });
    done(lengthBytes, lengthBytes);
    return;
  }
  const most = Math.max(1, Math.floor(pieceBytes / pageSize));
  for (let first = 0; first < pages && !signal.aborted; first += most) {
    const count = Math.min(most, pages - first);
    const filled = await nativeAsync(() =>
      'path' in base
        ? region.native.fill(base.path, (base.offsetBytes ?? 0) + first * pageSize, first, count)
        : region.native.fillFrom(
            native(() => base.region.native),
            first,
            count,
          ),
    );
    done(count * pageSize, filled);
    if (filled < count * pageSize) {
      done((pages - first - count) * pageSize, 0);
      return; // the rest of the region is zeros
    }
  }
}

/** As the native receiver takes them; null: no region has a base. */
export function basesOf(guest: ArrivingGuest): ('none' | 'given' | 'in-place')[] | null {
  const kinds = guest.regions.map((_, index) => {
    const base = guest.bases?.[index];
    if (!base) return 'none';
    return 'inPlace' in base ? 'in-place' : 'given';
  });
  return kinds.some((kind) => kind !== 'none') ? kinds : null;
}
