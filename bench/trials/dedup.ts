/**
 * Deduplication over loopback at full speed, where the link is as fast as the hash: a scatter with it, against one
 * without, of a guest that the servers hold already in part. And the candidates for its hash, side by side.
 */
import { type DedupFigures, evictAlike } from '../support/dedups.js';
import { runFloor } from '../support/processes.js';
import { atLeastTimesFloor } from '../support/result.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';

const guestBytes = 512 * 2 ** 20;
/** Pages in a thousand that the servers hold already. */
const contents = { none: 0, mixed: 500, all: 1000 };
const chosen = 'hmac-sha256, copied by hand';

export async function run(trial: Trial): Promise<void> {
  for (const [name, alike] of Object.entries(contents)) {
    const figures: DedupFigures[] = [];
    const rate = async (dedup: boolean): Promise<number> => {
      const one = await evictAlike(guestBytes, alike, dedup);
      if (dedup) figures.push(one);
      return guestBytes / 1e6 / one.milliseconds;
    };
    const [plain, deduplicated] = (await takeTurns(trial.samples(5), [
      () => rate(false),
      () => rate(true),
    ])) as [number[], number[]];
    const shares = figures.map(({ dedup }) => ((100 * 4096 * (dedup?.pages ?? 0)) / guestBytes).toFixed(0));
    const cpu = figures.map(({ dedup }) => (dedup?.hashMs ?? 0).toFixed(0));
    trial.report(
      `alike-${name}`,
      'GB/s',
      paired(deduplicated, plain),
      atLeastTimesFloor(0.95, 'a plain scatter'),
      `% as references: ${shares.join(', ')}; ms of hashing: ${cpu.join(', ')}`,
    );
  }
  const hashes = await runFloor<Record<string, number>>('content_hash', []);
  for (const [name, gbPerSecond] of Object.entries(hashes)) {
    trial.report(`hash: ${name}`, 'GB/s', [{ value: gbPerSecond, floor: hashes[chosen] ?? null }], null);
  }
}
