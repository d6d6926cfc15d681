/** What the cases of `scatter` measure, each between fresh processes: a source, a destination, and VMD servers. */
import type { NativeReceiverStats, NativeSenderStats } from '../../lib/native.js';
import type { TouchFigures } from './engine-destination.js';
import { type EnginePair, makeCredentials, type PairOptions } from './engine-pair.js';
import { EngineServers, type ServerPlace } from './engine-servers.js';
import type { SendParameters } from './engine-source.js';
import type { StageFigures } from './engine-stage.js';
import { Peer, runFloor } from './processes.js';
import { postCopyPair, type Touching, touch } from './remote-faults.js';

/** Several times what any scatter takes; one that hangs ends its trial. */
const scatterTimeoutMs = 60_000;

/** Any of the servers could take the whole guest, its index and what is on its way. */
const memoryFor = (lengthBytes: number): number => lengthBytes * 1.25 + 64 * 2 ** 20;

/** Bytes a second: a read a second, so that it lasts no longer until the map is asked for. */
const nextToNothing = { bandwidth: 2 ** 18, gatherLimit: 2 ** 18 };

async function withServers<T>(
  places: readonly ServerPlace[],
  lengthBytes: number,
  measure: (servers: EngineServers) => Promise<T>,
  options: { preallocate: boolean } = { preallocate: false },
): Promise<T> {
  const servers = await EngineServers.start(places, memoryFor(lengthBytes), options);
  try {
    return await measure(servers);
  } finally {
    await servers.stop();
  }
}

/** Milliseconds until all is acknowledged by the servers, without a destination, as a guest is parked. */
export function scatterAll(
  lengthBytes: number,
  places: readonly ServerPlace[],
  preallocate: boolean,
): Promise<number> {
  return withServers(
    places,
    lengthBytes,
    async (servers) => {
      const source = Peer.start('support/engine-source');
      try {
        await source.call('allocate', { lengthBytes, seed: 1 });
        const credentials = makeCredentials(1);
        const lists = await servers.makeImage(credentials.migration, await source.call<number>('pages'));
        const nowhere = { host: '127.0.0.1', port: 0, direct: false };
        const sending: SendParameters = { ...credentials, ...nowhere, servers: lists.source };
        await runFloor('back_memory', ['--bytes', memoryFor(lengthBytes)]);
        await source.call('connect', sending);
        const { startMs, endMs } = await source.call<{ startMs: number; endMs: number }>('copy');
        return endMs - startMs;
      } finally {
        await source.stop();
      }
    },
    { preallocate },
  );
}

export interface IdleFaults {
  source: TouchFigures;
  servers: TouchFigures;
  /** Of the servers, when they hold what the destination lacks. */
  figures: StageFigures[];
}

/** Touched before the records are all there, so that whoever measures does not wait for them. */
const settlingTouches = 64;

/**
 * Faults in one scattered guest: before the push, when the source serves them, and after it has left, when the
 * servers do. Pages come by no other way meanwhile.
 */
export function faultsBeforeAndAfter(
  lengthBytes: number,
  places: readonly ServerPlace[],
  touches: number,
): Promise<IdleFaults> {
  return withServers(places, lengthBytes, async (servers) => {
    const pair = await postCopyPair(lengthBytes, { channels: 2, servers, limits: nextToNothing });
    try {
      const touching = { order: 'random', everyMs: 0 } as const;
      const source = await touch(pair, { ...touching, touches });
      await pair.source.call('startPush');
      await pair.source.call('evicted', null, scatterTimeoutMs);
      await pair.source.call('leave');
      await touch(pair, { ...touching, skip: touches, touches: settlingTouches });
      const byServers = await touch(pair, { ...touching, skip: touches + settlingTouches, touches });
      const figures = await servers.figures();
      await gatherAll(pair);
      return { source, servers: byServers, figures };
    } finally {
      await pair.stop();
    }
  });
}

/** The destination takes in what it lacks; every byte is compared. */
async function gatherAll(pair: EnginePair): Promise<void> {
  await pair.destination.call('limit', { bandwidth: 0, gatherLimit: 0 });
  await pair.destination.call('complete', null, scatterTimeoutMs);
  await pair.destination.call<NativeReceiverStats>('stats');
  await pair.compare();
}

export interface EvictionFigures {
  /** From the push's start until the source could go. */
  milliseconds: number;
  latenciesUs: Float64Array;
  /** What went to the destination itself. */
  pagesDirect: number;
}

/** A full scatter while somebody at the destination touches pages. */
export function evictTouched(
  lengthBytes: number,
  places: readonly ServerPlace[],
  options: PairOptions,
  touching: Touching,
): Promise<EvictionFigures> {
  return withServers(places, lengthBytes, async (servers) => {
    const pair = await postCopyPair(lengthBytes, { ...options, servers });
    try {
      await pair.source.call('startPush');
      const evicted = async (): Promise<number> => {
        const milliseconds = await pair.source.call<number>('evicted', null, scatterTimeoutMs);
        await pair.destination.call('stopTouching');
        return milliseconds;
      };
      const [milliseconds, { latenciesUs }] = await Promise.all([
        evicted(),
        touch(pair, { ...touching, untilTold: true }),
      ]);
      const { pagesDirect } = await pair.source.call<NativeSenderStats>('stats');
      await pair.source.call('leave');
      await gatherAll(pair);
      return { milliseconds, latenciesUs, pagesDirect };
    } finally {
      await pair.stop();
    }
  });
}
