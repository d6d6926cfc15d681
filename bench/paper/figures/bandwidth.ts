/**
 * Table 1: an idle guest moves to a destination whose Redis serves a client over the same link. The price of a limit on
 * the migration's bandwidth: the eviction's length in the direct modes, nothing in Scatter-Gather, where what the
 * destination takes in is limited and not what the source sends.
 */
import { median, quantile } from '../../support/statistics.js';
import { Peer, startServer } from '../../support/processes.js';
import { colours } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import { allModes, inTurns, type Outcome, type PaperMode, runMigration } from '../migrations.js';
import type { OpenLoopFigures } from '../open-loop.js';
import { paperLineSeconds, paperNumbers } from '../paper-numbers.js';
import { atMost, quotient, Samples, unavailable } from '../result.js';
import type { Rig } from '../rig.js';

/** 256 Mb/s. */
const limitBytesPerSecond = 256e6 / 8;
const limits = ['256 Mb/s', 'unlimited'] as const;
const redisPort = 6379;
const valueBytes = 10_000;
const keys = 8192;
const connections = 8;
/** At first; less where the client would take more of a core than it may. */
const requestsPerSecond = 2000;
const mostCpuShare = 0.4;
const maxOutstanding = 4096;
const baselineMs = 4000;
/** The connections' first seconds do not count. */
const warmUpMs = 500;

interface Load {
  meanMs: number;
  p50Ms: number;
  p99Ms: number;
  cpuShare: number;
}

function between(figures: OpenLoopFigures, fromMs: number, toMs: number): Load {
  const latencies = figures.latencyMs.filter((_, i) => {
    const atMs = figures.answeredAtMs[i] as number;
    return atMs >= fromMs && atMs <= toMs;
  });
  if (latencies.length === 0) throw new Error('the client got no answer during the migration');
  return {
    meanMs: latencies.reduce((sum, one) => sum + one, 0) / latencies.length,
    p50Ms: quantile(latencies, 0.5),
    p99Ms: quantile(latencies, 0.99),
    cpuShare: figures.cpuShare,
  };
}

const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

async function withoutMigration(client: Peer, ratePerSecond: number): Promise<Load> {
  await client.call('start', { ratePerSecond, maxOutstanding });
  await wait(baselineMs);
  const figures = await client.call<OpenLoopFigures>('stop');
  const last = figures.answeredAtMs.at(-1) ?? 0;
  return between(figures, last - baselineMs + warmUpMs, last);
}

/** What each mode's limit is a limit of. */
function limited(mode: PaperMode): { migrate?: Record<string, unknown>; listen?: Record<string, unknown> } {
  // What the destination takes in, over both of its ways: from the source itself, and from the intermediaries.
  return mode === 'scatter'
    ? { listen: { bandwidth: limitBytesPerSecond / 4, gatherLimit: (limitBytesPerSecond * 3) / 4 } }
    : { migrate: { bandwidth: limitBytesPerSecond } };
}

async function measureOne(
  rig: Rig,
  client: Peer,
  ratePerSecond: number,
  mode: PaperMode,
  limit: (typeof limits)[number],
): Promise<{ outcome: Outcome; load: Load } | null> {
  const guest: GuestSpec = {
    kind: 'idle',
    lengthBytes: rig.options.guestBytes,
    writerBytesPerSecond: 0,
    port: 0,
  };
  let outcome: Outcome | null = null;
  let figures: OpenLoopFigures;
  await client.call('start', { ratePerSecond, maxOutstanding });
  try {
    await wait(warmUpMs);
    const options = limit === 'unlimited' ? {} : limited(mode);
    outcome = await runMigration(rig, { mode, guest, verify: false, ...options });
  } finally {
    figures = await client.call<OpenLoopFigures>('stop', null, 60_000);
  }
  if (outcome === null) return null;
  const { startedAtMs, totalMs } = outcome;
  return { outcome, load: between(figures, startedAtMs, startedAtMs + totalMs) };
}

async function measure(
  rig: Rig,
): Promise<{ samples: Samples; lineSeconds: number; rate: number; cpuShare: number }> {
  // A host has one port: what the source, intermediaries and the client send to it shares its link.
  rig.lab.setHostRate(rig.destination, 'receive', rig.options.link);
  const place = { namespace: rig.destination.namespace };
  const redis = await startServer(
    'redis-server',
    ['--port', String(redisPort), '--bind', rig.destination.address, '--protected-mode', 'no']
      .concat(['--save', '', '--appendonly', 'no'])
      .concat(['--dir', '/tmp']),
    place,
  );
  const client = Peer.start('paper/client', { namespace: rig.client.namespace });
  try {
    const target = { host: rig.destination.address, port: redisPort, connections, keys, valueBytes };
    await client.call('redis', { ...target, writes: 0.5 });
    const alone = await withoutMigration(client, requestsPerSecond);
    const rate = Math.floor(requestsPerSecond * Math.min(1, mostCpuShare / alone.cpuShare));
    const samples = new Samples();
    const lines: number[] = [];
    const shares: number[] = [];
    const add = (series: string, x: string, load: Load): void => {
      samples.add(series, 'latency', x, 'ms', load.meanMs);
      samples.add(series, 'latency p50', x, 'ms', load.p50Ms);
      samples.add(series, 'latency p99', x, 'ms', load.p99Ms);
      shares.push(load.cpuShare);
    };
    for (let round = 0; round < rig.options.trials; round++) {
      lines.push(rig.options.guestBytes / (await rig.goodput()));
      add('no migration', 'no migration', await withoutMigration(client, rate));
      for (const limit of inTurns(limits, round)) {
        for (const mode of inTurns(allModes, round)) {
          const taken = await measureOne(rig, client, rate, mode, limit);
          if (taken === null) continue;
          samples.add(mode, 'eviction', limit, 's', taken.outcome.evictionMs / 1000);
          samples.add(mode, 'total', limit, 's', taken.outcome.totalMs / 1000);
          add(mode, limit, taken.load);
          const seconds = (taken.outcome.evictionMs / 1000).toFixed(2);
          rig.tell(
            `${mode}, ${limit}: evicted after ${seconds} s, latency ${taken.load.meanMs.toFixed(2)} ms`,
          );
        }
      }
    }
    return { samples, lineSeconds: median(lines), rate, cpuShare: Math.max(...shares) };
  } finally {
    await client.stop();
    await redis.stop();
  }
}

/** The paper's, in line times and in ms. */
const paperTable: Record<PaperMode, { eviction: [number, number]; latency: [number, number] }> = {
  'pre-copy': { eviction: [160.8, 109.7], latency: [6, 18.74] },
  'post-copy': { eviction: [164.3, 109.3], latency: [6.92, 18.94] },
  scatter: { eviction: [49.8, 49.2], latency: [5.47, 18.66] },
};

export const figures: FigureModule = {
  names: ['table-1'],
  async run(rig, _wanted, emit) {
    const { samples, lineSeconds, rate, cpuShare } = await measure(rig);
    const points = samples.points(() => lineSeconds);
    if (rig.scatterObstacle !== null) {
      for (const limit of limits) {
        points.push(unavailable('scatter', 'eviction', limit, rig.scatterObstacle));
        points.push(unavailable('scatter', 'latency', limit, rig.scatterObstacle));
      }
    }
    const of = (mode: string, measure: string, limit: (typeof limits)[number]): number | null =>
      samples.median(mode, measure, limit);
    const title = 'Table 1: bandwidth pressure at the destination, idle guest';
    const bars = (measure: 'eviction' | 'latency') =>
      allModes.flatMap((mode) => [
        {
          name: `${mode}, here`,
          from: 'here' as const,
          colour: colours[mode],
          points: limits.flatMap((limit, at): [number, number][] => {
            const value = of(mode, measure, limit);
            return value === null ? [] : [[at, measure === 'eviction' ? value / lineSeconds : value]];
          }),
        },
        {
          name: `${mode}, the paper`,
          from: 'paper' as const,
          colour: colours[mode],
          points: paperTable[mode][measure].map((value, at): [number, number] => [
            at,
            measure === 'eviction' ? value / paperLineSeconds : value,
          ]),
        },
      ]);
    const chart = (measure: 'eviction' | 'latency', yLabel: string) => ({
      name: `table-1-${measure}`,
      kind: 'bar' as const,
      title: `Table 1: ${measure}`,
      xLabel: 'limit of the migration (Scatter-Gather: of what the destination takes in)',
      yLabel,
      xTicks: limits.map((label, at) => ({ at, label })),
      series: bars(measure),
    });
    emit({
      figure: 'table-1',
      title,
      xName: 'limit',
      setting: {
        guestBytes: rig.options.guestBytes,
        trials: rig.options.trials,
        link: rig.options.link,
        lineSeconds,
        requestsPerSecond: rate,
        valueBytes,
      },
      points,
      checks: [
        atMost(
          'scatter: eviction limited',
          quotient(of('scatter', 'eviction', limits[0]), of('scatter', 'eviction', limits[1])),
          1.03,
          'unlimited',
        ),
        atMost(
          "scatter limited: the client's latency",
          quotient(of('scatter', 'latency', limits[0]), of('post-copy', 'latency', limits[0])),
          1.1,
          "post-copy's limited",
        ),
        atMost("the client's CPU time", cpuShare, mostCpuShare, 'a core'),
      ],
      charts: [chart('eviction', 'times line time'), chart('latency', 'mean latency, ms')],
      paper: paperNumbers['table-1'] ?? [],
      notes: [
        "limited, Scatter-Gather's destination takes in 64 Mb/s from the source itself and 192 Mb/s from the intermediaries, 256 Mb/s together: with the gather alone limited the direct way takes the rest of the link",
        `the client asks ${rate} times a second, half reads, half writes, values of ${valueBytes} bytes; latency is the mean from when a request was due, over the migration's total time`,
      ],
    });
  },
};
