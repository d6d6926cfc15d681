/** One scatter with or without deduplication, between fresh processes, of a guest that others are like. */
import { randomBytes } from 'node:crypto';
import type { NativeDedupStats, NativeSenderStats } from '../../lib/native.js';
import { EnginePair, type PairOptions } from './engine-pair.js';
import { EngineServers, serversOnLoopback } from './engine-servers.js';
import type { SharedContent } from './engine-source.js';

const scatterTimeoutMs = 120_000;
/** A destination that takes next to nothing: nearly all of it goes to the servers. */
const slow = { bandwidth: 2 ** 20, gatherLimit: 2 ** 20 };
/** Of the guest that was there before: a link over which deduplication looks at every page. */
const slowLink = 60e6;

export interface DedupFigures {
  /** From the push's start until the source could go. */
  milliseconds: number;
  bytesOnWire: number;
  dedup: NativeDedupStats | null;
}

/** The servers hold a guest already, of which `alike` pages in a thousand are this one's too. */
export async function evictAlike(lengthBytes: number, alike: number, dedup: boolean): Promise<DedupFigures> {
  const memoryBytes = 2.25 * lengthBytes + 64 * 2 ** 20;
  const servers = await EngineServers.start(serversOnLoopback(2), memoryBytes);
  const domainKey = new Uint8Array(randomBytes(32));
  try {
    const options: PairOptions = { channels: 2, servers, domainKey, limits: slow };
    const before = await evict(
      { lengthBytes, seed: 1, ownSeed: 1, alike: 1000 },
      {
        ...options,
        dedup: true,
        bandwidth: slowLink,
      },
    );
    if ((before.dedup?.examined ?? 0) < (0.9 * lengthBytes) / 4096)
      throw new Error('the first guest is not known');
    return await evict({ lengthBytes, seed: 1, ownSeed: 2, alike }, { ...options, dedup });
  } finally {
    await servers.stop();
  }
}

async function evict(content: SharedContent, options: PairOptions): Promise<DedupFigures> {
  const pair = new EnginePair(options);
  try {
    await Promise.all([
      pair.source.call('allocateShared', content, scatterTimeoutMs),
      pair.destination.call('allocate', { lengthBytes: content.lengthBytes, touched: false }),
    ]);
    await pair.connect({ pagingFromStart: true, mayPage: true, discardFirst: true });
    await pair.source.call('switchOver');
    await pair.source.call('startPush');
    const milliseconds = await pair.source.call<number>('evicted', null, scatterTimeoutMs);
    const { bytesOnWire, dedup } = await pair.source.call<NativeSenderStats>('stats');
    return { milliseconds, bytesOnWire, dedup };
  } finally {
    await pair.stop();
  }
}
