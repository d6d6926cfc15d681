/**
 * One full copy of real memory (the SQLite heap, a Python heap) and of random bytes, with compression left to the engine
 * and without it, in turns: over a link of 200 Mb/s, one of 1 Gb/s, and loopback. The clock runs from the start of the
 * round until every page is acknowledged. Pages of zeros go as such either way.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { NativeSenderStats } from '../../lib/native.js';
import { type Host, Lab, labObstacle } from '../lab/namespaces.js';
import { EnginePair } from '../support/engine-pair.js';
import { repositoryRoot } from '../support/paths.js';
import { writePythonHeap, writeSqliteHeap } from '../support/real-heaps.js';
import { atMostTimesFloor, type Reach } from '../support/result.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';

type Compress = 'auto' | 'off';
interface Content {
  name: string;
  /** null: random bytes. */
  file: string | null;
  real: boolean;
}
interface Link {
  name: string;
  /** As tc writes it; null: loopback. */
  rate: string | null;
  lengthBytes: number;
  samples: number;
}

const MiB = 2 ** 20;
/** Each long enough for its link to be full nearly all of the time. */
const links: readonly Link[] = [
  { name: '200mbit', rate: '200mbit', lengthBytes: 64 * MiB, samples: 5 },
  { name: '1gbit', rate: '1gbit', lengthBytes: 256 * MiB, samples: 5 },
  { name: 'loopback', rate: null, lengthBytes: 1024 * MiB, samples: 7 },
];
const neverSlower: Reach = atMostTimesFloor(1.03, 'without compression');
const muchFaster: Reach = atMostTimesFloor(1 / 1.6, 'without compression (1.6 times faster)');

export async function run(trial: Trial): Promise<void> {
  const directory = mkdtempSync(join(tmpdir(), 'memferry-heaps-'));
  try {
    const contents: Content[] = [
      { name: 'sqlite', file: join(directory, 'sqlite'), real: true },
      { name: 'python', file: join(directory, 'python'), real: true },
      { name: 'random', file: null, real: false },
    ];
    await writeSqliteHeap(join(repositoryRoot, 'node_modules'), join(directory, 'sqlite'));
    await writePythonHeap(join(directory, 'python'));
    const obstacle = labObstacle();
    for (const link of links) {
      if (link.rate !== null && obstacle !== null) {
        trial.skip(link.name, obstacle);
        continue;
      }
      const lab = link.rate === null ? null : Lab.open({ hosts: 2, rate: link.rate });
      try {
        for (const content of contents) await measure(trial, link, content, lab);
      } finally {
        lab?.close();
      }
    }
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

async function measure(trial: Trial, link: Link, content: Content, lab: Lab | null): Promise<void> {
  const compressed: NativeSenderStats[] = [];
  const copy = (compress: Compress) => async (): Promise<number> => {
    const { milliseconds, stats } = await copyOnce(link, content, lab, compress);
    if (compress === 'auto') compressed.push(stats);
    return milliseconds;
  };
  const [off, auto] = (await takeTurns(trial.samples(link.samples), [copy('off'), copy('auto')])) as [
    number[],
    number[],
  ];
  const sums = compressed.map(({ bytesOnWire, pagesSent, compression }) => {
    const share = Math.round((100 * bytesOnWire) / (pagesSent * 4096));
    return `${share} % on the wire, ${Math.round(compression.cpuMs)} ms of CPU`;
  });
  const real = content.real && link.rate === '200mbit';
  trial.report(
    `${link.name}-${content.name}`,
    'ms',
    paired(auto, off),
    real ? muchFaster : neverSlower,
    sums.join('; '),
  );
}

async function copyOnce(
  link: Link,
  content: Content,
  lab: Lab | null,
  compress: Compress,
): Promise<{ milliseconds: number; stats: NativeSenderStats }> {
  const [source, destination] = (lab?.hosts ?? []) as [Host?, Host?];
  const pair = new EnginePair({
    channels: 2,
    compress,
    ...(source && destination
      ? {
          host: destination.address,
          sourceNamespace: source.namespace,
          destinationNamespace: destination.namespace,
        }
      : {}),
  });
  try {
    const { lengthBytes } = link;
    await pair.source.call('allocate', { lengthBytes, seed: 1, file: content.file });
    await pair.destination.call('allocate', { lengthBytes, touched: true });
    await pair.connect({ pagingFromStart: false, mayPage: false, discardFirst: false });
    const { startMs, endMs } = await pair.source.call<{ startMs: number; endMs: number }>('copy');
    const stats = await pair.source.call<NativeSenderStats>('stats');
    await pair.compare();
    return { milliseconds: endMs - startMs, stats };
  } finally {
    await pair.stop();
  }
}
