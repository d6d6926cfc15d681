/**
 * Figures 1, 9 and 10: one guest, idle or busy, to a destination under memory pressure that grows in the paper's five
 * steps. Direct modes and Scatter-Gather in turns; line time by a raw socket once a round.
 */
import { calibrate, paperSteps, type Step } from '../../lab/calibrate.js';
import { median } from '../../support/statistics.js';
import { colours, type Chart, type Series } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import {
  allModes,
  boundedRounds,
  directModes,
  inTurns,
  type PaperMode,
  runMigration,
} from '../migrations.js';
import { paperLineSeconds, paperNumbers } from '../paper-numbers.js';
import {
  atLeast,
  atMost,
  type Check,
  type FigureResult,
  type Point,
  quotient,
  Samples,
  unavailable,
} from '../result.js';
import type { Rig } from '../rig.js';

/** A third of a link of 1 Gb/s: pre-copy still converges, after half as many bytes again. */
const busyBytesPerSecond = 40e6;
const measures = ['eviction', 'total'] as const;

interface Session {
  samples: Samples;
  lineSeconds: number;
  steps: Step[];
  modes: readonly PaperMode[];
  kind: 'idle' | 'busy';
}

async function measure(rig: Rig, kind: 'idle' | 'busy', modes: readonly PaperMode[]): Promise<Session> {
  const { guestBytes, trials } = rig.options;
  const host = rig.pressured();
  const guest: GuestSpec = {
    kind,
    lengthBytes: guestBytes,
    writerBytesPerSecond: busyBytesPerSecond,
    port: 0,
  };
  const steps: Step[] = [];
  for (const [index, wanted] of paperSteps(guestBytes).entries()) {
    if (!rig.options.steps.includes(index + 1)) continue;
    steps.push(await calibrate(host, rig.source, guestBytes, wanted, rig.tell));
  }
  const samples = new Samples();
  const lines: number[] = [];
  for (let round = 0; round < trials; round++) {
    lines.push(guestBytes / (await rig.goodput()));
    for (const step of inTurns(steps, round)) {
      for (const mode of inTurns(modes, round)) {
        await host.apply(step.pressure);
        // Under pressure the digests take as long again: once a cell shows that the bytes are right.
        const plan = { mode, guest, pressured: host, verify: round === 0, migrate: boundedRounds };
        const outcome = await runMigration(rig, plan);
        await host.release();
        if (outcome === null) continue;
        samples.add(mode, 'eviction', step.target, 's', outcome.evictionMs / 1000);
        samples.add(mode, 'total', step.target, 's', outcome.totalMs / 1000);
        samples.add(mode, 'remote faults', step.target, '', outcome.remoteFaults);
        const seconds = (outcome.evictionMs / 1000).toFixed(2);
        rig.tell(`${kind} guest, ${step.target} MB/s, ${mode}: evicted after ${seconds} s`);
      }
    }
  }
  return { samples, lineSeconds: median(lines), steps, modes, kind };
}

function checks({ samples, lineSeconds, steps, modes, kind }: Session): Check[] {
  const list: Check[] = [];
  const of = (mode: string, measure: string, { target }: Step): number | null =>
    samples.median(mode, measure, target);
  for (const mode of directModes) {
    const evictions = steps.map((step) => of(mode, 'eviction', step));
    const last = evictions.at(-1) ?? null;
    const grows = evictions.every((value, i) => i === 0 || (value ?? 0) >= (evictions[i - 1] ?? 0) * 0.95);
    if (steps.length > 1) {
      list.push({
        what: `${mode}, ${kind} guest: eviction grows with the pressure`,
        reach: 'step by step',
        value: null,
        reached: grows,
      });
    }
    if (steps.at(-1)?.target === 17) {
      const what = `${mode}, ${kind} guest: eviction at the last step`;
      list.push(atLeast(what, quotient(last, lineSeconds), 6, 'line time'));
    }
  }
  if (!modes.includes('scatter')) return list;
  for (const step of steps) {
    const where = `${kind} guest, ${step.target} MB/s`;
    const eviction = quotient(of('scatter', 'eviction', step), lineSeconds);
    list.push(atMost(`scatter, ${where}: eviction`, eviction, 1.05, 'line time'));
    const total = quotient(of('scatter', 'total', step), of('post-copy', 'total', step));
    list.push(atMost(`scatter, ${where}: total time`, total, 1.05, "post-copy's (the paper: 1.10)"));
  }
  return list;
}

const paperPoints: Record<string, Series[]> = {
  '1': [
    {
      name: 'direct modes, the paper',
      from: 'paper',
      colour: '#555',
      points: [
        [0, 52 / paperLineSeconds],
        [4, 328 / paperLineSeconds],
      ],
    },
  ],
  '9': [
    {
      name: 'SG eviction, the paper',
      from: 'paper',
      colour: colours['scatter'],
      points: [0, 1, 2, 3, 4].map((x) => [x, 49 / paperLineSeconds]),
    },
    {
      name: 'direct eviction, the paper',
      from: 'paper',
      colour: '#555',
      points: [
        [0, 52 / paperLineSeconds],
        [4, 328 / paperLineSeconds],
      ],
    },
  ],
  '10': [],
};

function chart(figure: string, title: string, { steps, kind }: Session, points: Point[]): Chart {
  const all = paperSteps(2 ** 30).map(({ target }) => target);
  const shown = figure === '1' ? directModes : allModes;
  const series = shown.flatMap((mode) =>
    (figure === '1' ? (['eviction'] as const) : measures).map((measure): Series => {
      const own = points.filter((point) => point.series === mode && point.measure === measure);
      return {
        name: `${mode}, ${measure}`,
        from: 'here',
        colour: measure === 'total' ? `${colours[mode]}80` : colours[mode],
        points: own.flatMap(({ x, lineTimes }) =>
          lineTimes === null ? [] : [[all.indexOf(Number(x)), lineTimes] as [number, number]],
        ),
      };
    }),
  );
  return {
    name: `figure-${figure}`,
    kind: 'line',
    title,
    xLabel: `what the destination takes in, MB/s (${kind} guest; the paper: 16 to 12 GB)`,
    yLabel: 'times line time',
    xTicks: all.map((target, at) => ({
      at,
      label: `${steps.find((step) => step.target === target)?.measured.toFixed(0) ?? target}`,
    })),
    series: [...series, ...(paperPoints[figure] ?? [])],
  };
}

function result(rig: Rig, figure: string, title: string, session: Session): FigureResult {
  const { samples, lineSeconds, steps, kind } = session;
  const points = samples.points(() => lineSeconds);
  if (session.modes.includes('scatter') && rig.scatterObstacle !== null) {
    for (const { target } of steps) {
      points.push(unavailable('scatter', 'eviction', target, rig.scatterObstacle));
      points.push(unavailable('scatter', 'total', target, rig.scatterObstacle));
    }
  }
  const shown = figure === '1' ? points.filter(({ series }) => series !== 'scatter') : points;
  const verdicts = checks(session);
  return {
    figure,
    title,
    xName: 'MB/s',
    setting: {
      guest: kind,
      guestBytes: rig.options.guestBytes,
      trials: rig.options.trials,
      link: rig.options.link,
      lineSeconds,
    },
    points: shown,
    checks: figure === '1' ? verdicts.filter(({ what }) => !what.startsWith('scatter')) : verdicts,
    charts: [chart(figure, title, session, shown)],
    paper: paperNumbers[figure] ?? [],
    notes: [
      `pre-copy has at most ${boundedRounds.maxRounds} rounds`,
      ...steps.map(({ target, measured, reached, pressure }) => {
        const mib = (bytes: number): string => `${Math.round(bytes / 2 ** 20)} MiB`;
        const memory = pressure.memoryBytes === null ? 'no limit' : mib(pressure.memoryBytes);
        const cpu = pressure.cpuShare === null ? 'no quota' : `${pressure.cpuShare.toFixed(2)} CPU`;
        return (
          `step ${target} MB/s: a bare writer did ${measured.toFixed(1)} MB/s${reached ? '' : ' (NOT within 15 %)'}; ` +
          `memory ${memory}, ${mib(pressure.thrashBytes)} of it thrashed, ${cpu}`
        );
      }),
    ],
  };
}

export const figures: FigureModule = {
  names: ['1', '9', '10'],
  async run(rig, wanted, emit) {
    if (wanted.has('1') || wanted.has('9')) {
      const session = await measure(rig, 'idle', wanted.has('9') ? allModes : directModes);
      if (wanted.has('1')) {
        emit(result(rig, '1', 'Figure 1: direct modes, idle guest, eviction', session));
      }
      if (wanted.has('9')) emit(result(rig, '9', 'Figure 9: idle guest, eviction and total time', session));
    }
    if (wanted.has('10')) {
      const session = await measure(rig, 'busy', allModes);
      emit(result(rig, '10', 'Figure 10: busy guest, eviction and total time', session));
    }
  },
};
