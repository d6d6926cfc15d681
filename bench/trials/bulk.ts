/**
 * One full copy of 1 GiB of random bytes over loopback. Touched: the clock runs from the start of the round
 * until every page is acknowledged, the connections being up. Fresh: it starts before the destination maps
 * its memory, and takes in the receiver's construction and the connections too; before it, as much memory is
 * touched and freed on either side of the comparison, so that no hypervisor's own first touch is measured.
 */
import { EnginePair } from '../support/engine-pair.js';
import { monotonicMs } from '../support/peer.js';
import { runFloor } from '../support/processes.js';
import { atLeastTimesFloor, type Reach } from '../support/result.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';

const lengthBytes = 2 ** 30;
type MemoryState = 'touched' | 'fresh';

export async function copyOnce(channels: number, state: MemoryState): Promise<number> {
  const pair = new EnginePair({ channels });
  try {
    await pair.source.call('allocate', { lengthBytes, seed: 1 });
    if (state === 'touched') await pair.destination.call('allocate', { lengthBytes, touched: true });
    else await runFloor('back_memory', ['--bytes', (lengthBytes * 5) / 4]);
    const freshStartMs = monotonicMs();
    if (state === 'fresh') await pair.destination.call('allocate', { lengthBytes, touched: false });
    await pair.connect({ pagingFromStart: false, mayPage: false, discardFirst: state === 'fresh' });
    const { startMs, endMs } = await pair.source.call<{ startMs: number; endMs: number }>('copy');
    await pair.compare();
    return lengthBytes / 1e6 / (endMs - (state === 'fresh' ? freshStartMs : startMs));
  } finally {
    await pair.stop();
  }
}

function floorOf(channels: number, state: MemoryState, hash: boolean): () => Promise<number> {
  const args = [
    '--bytes',
    lengthBytes,
    '--channels',
    channels,
    '--memory',
    state,
    ...(hash ? ['--hash'] : []),
  ];
  return async () => (await runFloor<{ gbPerSecond: number }>('bulk_floor', args)).gbPerSecond;
}

const betterThanBare: Reach = {
  words: 'better than bare raw sockets into fresh memory',
  met: ({ ratio }) => ratio !== null && ratio > 1,
};

export async function run(trial: Trial): Promise<void> {
  for (const state of ['touched', 'fresh'] as const) {
    for (const channels of [1, 2]) {
      const [ours, hashed, bare] = (await takeTurns(trial.samples(5), [
        () => copyOnce(channels, state),
        floorOf(channels, state, true),
        floorOf(channels, state, false),
      ])) as [number[], number[], number[]];
      const name = `${state}-${channels}-channel${channels > 1 ? 's' : ''}`;
      trial.report(
        `${name}-hashed-floor`,
        'GB/s',
        paired(ours, hashed),
        atLeastTimesFloor(0.9, 'raw sockets plus one XXH3 over each chunk'),
      );
      trial.report(
        `${name}-bare-floor`,
        'GB/s',
        paired(ours, bare),
        state === 'touched' ? atLeastTimesFloor(0.8, 'bare raw sockets') : betterThanBare,
      );
    }
  }
}
