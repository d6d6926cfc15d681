/**
 * Figure 12: a guest that answers a client's queries before, while and after it moves to a destination under pressure.
 * Eviction, and the throughput that the client sees. Every answer is checked; a wrong one ends the figure.
 */
import { calibrate, paperSteps } from '../../lab/calibrate.js';
import { median } from '../../support/statistics.js';
import { Peer } from '../../support/processes.js';
import { colours, type Series } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import { slotBytes } from '../key-value.js';
import type { KeyValueParameters } from '../key-value-target.js';
import { allModes, inTurns, type Outcome, type PaperMode, runMigration } from '../migrations.js';
import type { OpenLoopFigures } from '../open-loop.js';
import { paperNumbers } from '../paper-numbers.js';
import { atMost, quotient, Samples, unavailable } from '../result.js';
import type { Rig } from '../rig.js';

const port = 7070;
const requestsPerSecond = 3000;
/** YCSB's client threads: while the guest waits for a page they all wait. */
const maxOutstanding = 64;
/** YCSB's workload A; over the whole dataset, as in the paper. */
const writes = 0.5;
const keysBy = 'uniform';
/** Of the pressure's steps: the destination takes in a third of what the link brings. */
const stepIndex = 3;
const beforeMs = 3000;
const afterMs = 3000;
const binMs = 500;

interface Run {
  outcome: Outcome;
  /** Seconds since the migration's start, and answers a second. */
  throughput: [number, number][];
}

const wait = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

function bins(figures: OpenLoopFigures, startedAtMs: number, endMs: number): [number, number][] {
  const counts = new Map<number, number>();
  for (const atMs of figures.answeredAtMs) {
    const bin = Math.floor((atMs - startedAtMs) / binMs);
    counts.set(bin, (counts.get(bin) ?? 0) + 1);
  }
  const list: [number, number][] = [];
  const last = Math.floor((endMs - startedAtMs) / binMs);
  for (let bin = Math.ceil(-beforeMs / binMs) + 1; bin < last; bin++) {
    list.push([((bin + 0.5) * binMs) / 1000, ((counts.get(bin) ?? 0) * 1000) / binMs]);
  }
  return list;
}

export const figures: FigureModule = {
  names: ['12'],
  async run(rig, _wanted, emit) {
    const { guestBytes, trials } = rig.options;
    const host = rig.pressured();
    const wanted = paperSteps(guestBytes)[stepIndex];
    if (wanted === undefined) throw new Error('no such step');
    const step = await calibrate(host, rig.source, guestBytes, wanted, rig.tell);
    const samples = new Samples();
    const lines: number[] = [];
    const shown = new Map<PaperMode, Run>();
    for (let round = 0; round < trials; round++) {
      lines.push(guestBytes / (await rig.goodput()));
      for (const mode of inTurns(allModes, round)) {
        await host.apply(step.pressure);
        const run = await serveThroughout(rig, mode);
        await host.release();
        if (run === null) continue;
        const { outcome } = run;
        samples.add(mode, 'eviction', 'busy', 's', outcome.evictionMs / 1000);
        samples.add(mode, 'total', 'busy', 's', outcome.totalMs / 1000);
        samples.add(mode, 'downtime', 'busy', 'ms', outcome.downtimeMs);
        samples.add(mode, 'remote faults', 'busy', '', outcome.remoteFaults);
        const during = run.throughput.filter(([at]) => at > 0 && at < outcome.totalMs / 1000);
        if (during.length > 0) {
          samples.add(mode, 'throughput', 'busy', 'ops/s', median(during.map(([, rate]) => rate)));
        }
        if (!shown.has(mode)) shown.set(mode, run);
        rig.tell(`serving guest, ${mode}: evicted after ${(outcome.evictionMs / 1000).toFixed(2)} s`);
      }
    }
    const lineSeconds = median(lines);
    const points = samples.points((_, measure) => (measure === 'throughput' ? null : lineSeconds));
    if (rig.scatterObstacle !== null) {
      points.push(unavailable('scatter', 'eviction', 'busy', rig.scatterObstacle));
    }
    const eviction = (mode: PaperMode): number | null => samples.median(mode, 'eviction', 'busy');
    const title = 'Figure 12: a guest that serves queries throughout';
    emit({
      figure: '12',
      title,
      xName: 'guest',
      setting: {
        guestBytes,
        trials,
        link: rig.options.link,
        lineSeconds,
        requestsPerSecond,
        valueBytes: slotBytes,
        writes,
      },
      points,
      checks: [
        atMost('scatter: eviction', quotient(eviction('scatter'), lineSeconds), 1.1, 'line time'),
        {
          what: 'pre-copy (at most 30 rounds) to scatter: eviction',
          reach: 'longer (the paper: 6.6 times)',
          value: quotient(eviction('pre-copy'), eviction('scatter')),
          reached: (() => {
            const times = quotient(eviction('pre-copy'), eviction('scatter'));
            return times === null ? null : times > 1;
          })(),
        },
      ],
      charts: [
        {
          name: 'figure-12',
          kind: 'line',
          title: 'Figure 12: queries answered while the guest moves (from 0 s on)',
          xLabel: 'seconds since the migration began',
          yLabel: 'answers a second',
          xTicks: null,
          series: allModes.flatMap((mode): Series[] => {
            const run = shown.get(mode);
            if (run === undefined) return [];
            const evictedS = run.outcome.evictionMs / 1000;
            return [
              {
                name: mode,
                from: 'here',
                colour: colours[mode],
                plain: true,
                points: run.throughput,
              },
              {
                name: `${mode}: evicted at ${evictedS.toFixed(1)} s`,
                from: 'here',
                colour: colours[mode],
                points: [[evictedS, 0]],
              },
            ];
          }),
        },
      ],
      paper: paperNumbers['12'] ?? [],
      notes: [
        "the destination's process and the worker that will serve were started before the migration began",
        `the destination: a bare writer did ${step.measured.toFixed(1)} MB/s${step.reached ? '' : ' (NOT within 15 %)'}`,
        `one client, ${requestsPerSecond} requests a second at most ${maxOutstanding} at once, ${keysBy} keys; every answer was checked against its key's versions`,
      ],
    });
  },
};

async function serveThroughout(rig: Rig, mode: PaperMode): Promise<Run | null> {
  if (mode === 'scatter' && rig.scatterObstacle !== null) return null;
  const { guestBytes } = rig.options;
  const guest: GuestSpec = { kind: 'serving', lengthBytes: guestBytes, writerBytesPerSecond: 0, port };
  let client: Peer | null = null;
  let figures: OpenLoopFigures | null = null;
  try {
    const outcome = await runMigration(rig, {
      mode,
      guest,
      pressured: rig.pressured(),
      verify: false,
      migrate: { maxRounds: 30 },
      ready: async () => {
        // Of a migration that failed and is repeated.
        await (client as Peer | null)?.stop();
        client = Peer.start('paper/client', { namespace: rig.client.namespace });
        const target: KeyValueParameters = {
          hosts: [rig.source.address, rig.destination.address],
          port,
          keys: guestBytes / slotBytes,
          writes,
          keysBy,
        };
        await client.call('keyValue', target);
        await client.call('start', { ratePerSecond: requestsPerSecond, maxOutstanding });
        await wait(beforeMs);
      },
      over: async () => {
        await wait(afterMs);
        figures = (await client?.call<OpenLoopFigures>('stop', null, 60_000)) ?? null;
        await client?.stop();
      },
    });
    if (outcome === null || figures === null) return null;
    const { startedAtMs, totalMs } = outcome;
    return { outcome, throughput: bins(figures, startedAtMs, startedAtMs + totalMs + afterMs) };
  } finally {
    await (client as Peer | null)?.stop();
  }
}
