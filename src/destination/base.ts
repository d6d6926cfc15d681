/**
 * The destination's base: what it puts into a guest's regions before the first page, so that only what differs has to
 * come. Nothing of it is believed: the source confirms each page by hash (docs/protocol.md, "Starting from a base").
 * JavaScript thread; the bytes go from files and other regions straight into memory, on threads of the pool.
 */
import { native, nativeAsync } from '../errors.js';
import type { ArrivingGuest, RegionBase } from '../guest.js';
import { samplePages } from '../protocol/base-sample.js';
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

export interface BaseProgress {
  sampled: boolean;
  /** A log changes the base afterwards, or is changing it. */
  replays: boolean;
  fraction: number;
  expectedMs: number | null;
}

/** Between two looks at whether it is still wanted: some ms. */
const pieceBytes = 8 * 2 ** 20;
const tellEveryMs = 50;

/** What is left of a replay, by its own pace from its first word on. */
class ReplayPace {
  #first: { atMs: number; fraction: number } | null = null;
  #leftMs: number | null;

  /** `expectedMs`: what its owner says beforehand. */
  constructor(expectedMs: number | undefined) {
    // An owner's word, which goes over the wire.
    this.#leftMs =
      typeof expectedMs === 'number' && expectedMs >= 0 && Number.isFinite(expectedMs) ? expectedMs : null;
  }

  get leftMs(): number | null {
    return this.#leftMs;
  }

  said(fraction: number): void {
    if (!(fraction >= 0 && fraction <= 1)) return;
    const atMs = performance.now();
    this.#first ??= { atMs, fraction };
    const done = fraction - this.#first.fraction;
    if (done > 0) this.#leftMs = ((atMs - this.#first.atMs) * (1 - fraction)) / done;
  }
}

export class BaseFilling {
  readonly #stop = new AbortController();
  /** Of the replay alone. */
  readonly #skip = new AbortController();
  readonly #pace: ReplayPace;
  readonly outcome: Promise<BaseOutcome>;

  constructor(
    private readonly guest: Pick<ArrivingGuest, 'regions' | 'bases' | 'replay'>,
    private readonly replayLog: Uint8Array | null,
    /** How much is there, the sample at least; what the rest is expected to take, or null where nobody knows. */
    private readonly tell: (progress: BaseProgress) => void,
  ) {
    this.#pace = new ReplayPace(guest.replay?.expectedMs);
    this.outcome = this.#fill();
  }

  /** Ends it soon: in the middle of a region, or by the signal that a function of the owner's has. */
  stop(): void {
    this.#stop.abort();
  }

  /** The base is to do as it is. */
  skipReplay(): void {
    this.#skip.abort();
  }

  get #replays(): boolean {
    return this.replayLog !== null && this.guest.replay !== undefined && !this.#skip.signal.aborted;
  }

  async #fill(): Promise<BaseOutcome> {
    const { signal } = this.#stop;
    const outcome: BaseOutcome = { ready: false, problem: null, filledBytes: 0, fillMs: 0, replayMs: 0 };
    const started = performance.now();
    const bases = this.guest.regions.map((region, index) => ({ region, base: this.guest.bases?.[index] }));
    const totalBytes = bases.reduce((sum, { region, base }) => sum + (base ? region.lengthBytes : 0), 0);
    let doneBytes = 0;
    let toldAtMs = 0;
    let applying = false;
    /** `underWay`: of a region that an owner's function is filling. */
    const tell = (underWay: number, now = false) => {
      if (!now && performance.now() - toldAtMs < tellEveryMs) return;
      toldAtMs = performance.now();
      const replays = this.#replays || applying;
      const fraction = Math.min(1, (doneBytes + underWay) / totalBytes);
      this.tell({ sampled, replays, fraction, expectedMs: replays ? this.#pace.leftMs : 0 });
    };
    const done = (bytes: number, filled: number) => {
      doneBytes += bytes;
      outcome.filledBytes += filled;
      tell(0);
    };
    // A function of the owner's has an order of its own.
    const samples = bases.some(({ base }) => base && 'fill' in base) ? [] : this.#sample();
    let sampled = false;
    try {
      for (const { region: index, first, count } of samples) {
        const { region, base } = bases[index] as (typeof bases)[number];
        if (!base || signal.aborted) continue;
        const filled = await fillPages(region, base, first, count);
        done(count * region.pageSize, filled);
      }
      if (samples.length > 0 && !signal.aborted) {
        sampled = true;
        tell(0, true);
      }
      for (const [index, { region, base }] of bases.entries()) {
        const there = samples.filter((sample) => sample.region === index);
        if (base) await fillRegion(region, base, there, { done, underWay: tell }, signal);
      }
      outcome.fillMs = performance.now() - started;
      if (this.#replays && !signal.aborted) {
        doneBytes = totalBytes;
        applying = true;
        tell(0, true);
        const replaying = performance.now();
        const progress = (fraction: number) => {
          this.#pace.said(fraction);
          tell(0);
        };
        const wanted = AbortSignal.any([signal, this.#skip.signal]);
        try {
          await this.guest.replay?.apply(this.replayLog as Uint8Array, { signal: wanted, progress });
        } catch (error) {
          // The base is what it was, or something in between: the comparison finds out.
          if (!this.#skip.signal.aborted) outcome.problem = `replay: ${inWords(error)}`;
        }
        outcome.replayMs = performance.now() - replaying;
      }
    } catch (error) {
      outcome.problem = inWords(error);
      outcome.fillMs ||= performance.now() - started;
    }
    outcome.ready = outcome.filledBytes > 0 && !signal.aborted;
    if (!outcome.ready) outcome.problem ??= signal.aborted ? 'not ready in time' : 'the base is empty';
    return outcome;
  }

  #sample() {
    return samplePages(this.guest.regions.map(({ pages }, index) => (this.guest.bases?.[index] ? pages : 0)));
  }
}

/** Owners throw what they like. */
function inWords(error: unknown): string {
  try {
    return String(error);
  } catch {
    return 'something that cannot be said in words was thrown';
  }
}

/** Gives the bytes that there were. */
async function fillPages(region: Region, base: RegionBase, first: number, count: number): Promise<number> {
  const { pageSize } = region;
  if ('path' in base) {
    const offset = (base.offsetBytes ?? 0) + first * pageSize;
    return nativeAsync(() => region.native.fill(base.path, offset, first, count));
  }
  if ('region' in base) {
    return nativeAsync(() =>
      region.native.fillFrom(
        native(() => base.region.native),
        first,
        count,
      ),
    );
  }
  return count * pageSize;
}

/** `there`: pages that are filled already, and perhaps confirmed: they are not touched again. */
async function fillRegion(
  region: Region,
  base: RegionBase,
  there: readonly { first: number; count: number }[],
  { done, underWay }: { done(bytes: number, filled: number): void; underWay(bytes: number): void },
  signal: AbortSignal,
): Promise<void> {
  const { pages, pageSize, lengthBytes } = region;
  if ('fill' in base) {
    const progress = (fraction: number) => {
      if (fraction > 0 && fraction <= 1) underWay(fraction * lengthBytes);
    };
    await base.fill(region, { signal, progress });
    done(lengthBytes, lengthBytes);
    return;
  }
  const most = Math.max(1, Math.floor(pieceBytes / pageSize));
  for (let first = 0; first < pages && !signal.aborted; ) {
    const next = there.find((run) => run.first + run.count > first);
    if (next && next.first <= first) {
      first = next.first + next.count;
      continue;
    }
    const count = Math.min(most, (next?.first ?? pages) - first);
    const filled = await fillPages(region, base, first, count);
    done(count * pageSize, filled);
    first += count;
    if (filled < count * pageSize) {
      // The rest of the region is zeros.
      const sampled = there.reduce((sum, run) => sum + (run.first >= first ? run.count : 0), 0);
      done((pages - first - sampled) * pageSize, 0);
      return;
    }
  }
}

/** As the native receiver takes them; null: no region has a base. */
export function basesOf(
  guest: Pick<ArrivingGuest, 'regions' | 'bases'>,
): ('none' | 'given' | 'in-place')[] | null {
  const kinds = guest.regions.map((region, index) => {
    const base = guest.bases?.[index];
    // Private memory of another process cannot be filled from here.
    if (!base || region.native.attached()?.shared === false) return 'none';
    return 'inPlace' in base ? 'in-place' : 'given';
  });
  return kinds.some((kind) => kind !== 'none') ? kinds : null;
}
