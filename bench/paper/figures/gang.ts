/**
 * Figure 11: one to five guests of a quarter of the size, all at once, to a destination that has room for three of
 * them. The gang's eviction lasts from the first guest's start until the last one's eviction.
 */
import { calibrate } from '../../lab/calibrate.js';
import { median } from '../../support/statistics.js';
import { colours, type Series } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import { allModes, boundedRounds, directModes, inTurns, runMigration } from '../migrations.js';
import { paperNumbers } from '../paper-numbers.js';
import { atMost, type Check, quotient, Samples, unavailable } from '../result.js';
import type { Rig } from '../rig.js';

const room = 3;
const kinds = ['idle', 'busy'] as const;
/** Of all guests together, as in figure 10. */
const busyBytesPerSecond = 40e6;
/** What a bare writer of five guests does on the way: well below the link, as the paper's destination at 5 guests. */
const pressedRate = 40;

async function measure(
  rig: Rig,
  counts: number[],
): Promise<{ samples: Samples; lineRate: number; note: string }> {
  const guestBytes = rig.options.guestBytes / 4;
  const host = rig.pressured();
  const wanted = { target: pressedRate, roomBytes: room * guestBytes, thrashBytes: guestBytes };
  const step = await calibrate(host, rig.source, 5 * guestBytes, wanted, rig.tell);
  const samples = new Samples();
  const lines: number[] = [];
  for (let round = 0; round < rig.options.trials; round++) {
    lines.push(await rig.goodput());
    for (const count of inTurns(counts, round)) {
      for (const kind of kinds) {
        for (const mode of inTurns(allModes, round)) {
          const guest: GuestSpec = {
            kind,
            lengthBytes: guestBytes,
            writerBytesPerSecond: busyBytesPerSecond / count,
            port: 0,
          };
          await host.apply(step.pressure);
          const plan = { mode, guest, count, pressured: host, verify: round === 0, migrate: boundedRounds };
          const outcome = await runMigration(rig, plan);
          await host.release();
          if (outcome === null) continue;
          samples.add(`${mode}, ${kind}`, 'eviction', count, 's', outcome.evictionMs / 1000);
          const seconds = (outcome.evictionMs / 1000).toFixed(2);
          rig.tell(`${count} ${kind} guests, ${mode}: evicted after ${seconds} s`);
        }
      }
    }
  }
  const memory = Math.round((step.pressure.memoryBytes ?? 0) / 2 ** 20);
  const note =
    `the destination: ${memory} MiB, of which ${room} guests fit beside the neighbour, ` +
    `${step.pressure.cpuShare?.toFixed(2)} CPU; a bare writer of 5 guests did ${step.measured.toFixed(1)} MB/s` +
    (step.reached ? '' : ` (NOT within 15 % of ${pressedRate})`);
  return { samples, lineRate: median(lines), note };
}

export const figures: FigureModule = {
  names: ['11'],
  async run(rig, _wanted, emit) {
    const counts = (rig.options.counts ?? [1, 2, 3, 4, 5]).filter((count) => count >= 1);
    const { samples, lineRate, note } = await measure(rig, counts);
    const guestBytes = rig.options.guestBytes / 4;
    const line = (count: number): number => (count * guestBytes) / lineRate;
    const points = samples.points((x) => line(Number(x)));
    if (rig.scatterObstacle !== null) {
      for (const kind of kinds) {
        for (const count of counts) {
          points.push(unavailable(`scatter, ${kind}`, 'eviction', count, rig.scatterObstacle));
        }
      }
    }
    const checks: Check[] = [];
    for (const count of counts) {
      const evictions = kinds.map((kind) => samples.median(`scatter, ${kind}`, 'eviction', count));
      for (const [index, kind] of kinds.entries()) {
        const what = `scatter, ${count} ${kind} guests: the gang's eviction`;
        checks.push(atMost(what, quotient(evictions[index] ?? null, line(count)), 1.05, 'its line time'));
      }
      const apart = quotient(evictions[1] ?? null, evictions[0] ?? null);
      checks.push({
        what: `scatter, ${count} guests: busy to idle`,
        reach: 'alike (within 5 %)',
        value: apart,
        reached: apart === null ? null : Math.abs(apart - 1) <= 0.05,
      });
    }
    const series = [...directModes, 'scatter' as const].flatMap((mode) =>
      kinds.map((kind): Series => {
        const own = points.filter((point) => point.series === `${mode}, ${kind}`);
        return {
          name: `${mode}, ${kind}`,
          from: 'here',
          colour: kind === 'busy' ? `${colours[mode]}80` : colours[mode],
          points: own.flatMap(({ x, value }) =>
            value === null ? [] : [[Number(x), value] as [number, number]],
          ),
        };
      }),
    );
    series.push({
      name: 'line time',
      from: 'here',
      colour: colours['reach'],
      plain: true,
      points: counts.map((count) => [count, line(count)]),
    });
    const title = 'Figure 11: several guests at once, eviction of the gang';
    emit({
      figure: '11',
      title,
      xName: 'guests',
      setting: {
        guestBytes,
        room,
        trials: rig.options.trials,
        link: rig.options.link,
        lineMegabytesPerSecond: lineRate / 1e6,
      },
      points,
      checks,
      charts: [
        {
          name: 'figure-11',
          kind: 'line',
          title,
          xLabel: 'guests',
          yLabel: 'seconds',
          xTicks: counts.map((at) => ({ at, label: String(at) })),
          series,
        },
      ],
      paper: paperNumbers['11'] ?? [],
      notes: [note, `pre-copy has at most ${boundedRounds.maxRounds} rounds`],
    });
  },
};
