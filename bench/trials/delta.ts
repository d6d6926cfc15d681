/**
 * A guest that changes 64 bytes of a page between rounds: what the later rounds put on the wire as deltas, against the
 * same rounds without them. Bytes are counted, so the machine's speed has no part in it; the rounds' times over a link
 * of 1 Gb/s are given beside it.
 */
import type { NativeSenderStats } from '../../lib/native.js';
import { type Host, Lab, labObstacle } from '../lab/namespaces.js';
import { EnginePair } from '../support/engine-pair.js';
import { atMostTimesFloor } from '../support/result.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';

const MiB = 2 ** 20;
const lengthBytes = 64 * MiB;
const deltaCacheBytes = 96 * MiB;
const laterRounds = 4;
/** Of the pages, written before each round. */
const writtenShare = 0.5;
const bytesAPage = 64;

interface Later {
  bytes: number;
  milliseconds: number;
  delta: NativeSenderStats['delta'];
}

export async function run(trial: Trial): Promise<void> {
  const obstacle = labObstacle();
  const lab = obstacle === null ? Lab.open({ hosts: 2, rate: '1gbit' }) : null;
  try {
    const times: { with: number[]; without: number[] } = { with: [], without: [] };
    const cpu: string[] = [];
    const [without, withDeltas] = (await takeTurns(trial.samples(3), [
      async () => {
        const later = await rounds(lab, 0);
        times.without.push(later.milliseconds);
        return later.bytes;
      },
      async () => {
        const later = await rounds(lab, deltaCacheBytes);
        times.with.push(later.milliseconds);
        cpu.push(`${later.delta.pages} pages, ${Math.round(later.delta.cpuMs)} ms of CPU`);
        return later.bytes;
      },
    ])) as [number[], number[]];
    trial.report(
      'later-rounds',
      'bytes',
      paired(withDeltas, without),
      atMostTimesFloor(0.1, 'the same rounds without deltas'),
      cpu.join('; '),
    );
    if (lab) trial.report('later-rounds-1gbit', 'ms', paired(times.with, times.without), null);
    else trial.skip('later-rounds-1gbit', obstacle as string);
  } finally {
    lab?.close();
  }
}

async function rounds(lab: Lab | null, cacheBytes: number): Promise<Later> {
  const [source, destination] = (lab?.hosts ?? []) as [Host?, Host?];
  const pair = new EnginePair({
    channels: 2,
    compress: 'off',
    deltaCacheBytes: cacheBytes,
    tracked: true,
    ...(source && destination
      ? {
          host: destination.address,
          sourceNamespace: source.namespace,
          destinationNamespace: destination.namespace,
        }
      : {}),
  });
  try {
    await pair.source.call('allocate', { lengthBytes, seed: 1 });
    await pair.destination.call('allocate', { lengthBytes, touched: true });
    await pair.connect({ pagingFromStart: false, mayPage: false, discardFirst: false });
    await pair.source.call('copy');
    const before = await pair.source.call<NativeSenderStats>('stats');
    let milliseconds = 0;
    for (let round = 0; round < laterRounds; round++) {
      const written = { share: writtenShare, bytes: bytesAPage, seed: round + 1 };
      const times = await pair.source.call<{ startMs: number; endMs: number }>('writeAndCopy', written);
      milliseconds += times.endMs - times.startMs;
    }
    const after = await pair.source.call<NativeSenderStats>('stats');
    await pair.compare();
    return { bytes: after.bytesOnWire - before.bytesOnWire, milliseconds, delta: after.delta };
  } finally {
    await pair.stop();
  }
}
