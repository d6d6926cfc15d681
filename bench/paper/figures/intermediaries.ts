/**
 * Figure 15: an idle guest to a destination that receives 100 Mb/s, by way of zero to four intermediaries that receive
 * 200 Mb/s each. Once the source is evicted the destination's limit is lifted: what is left is not in the figure.
 */
import { median } from '../../support/statistics.js';
import { colours, type Series } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import { directModes, inTurns, type PaperMode, runMigration } from '../migrations.js';
import { linkMbits } from '../options.js';
import { paperNumbers } from '../paper-numbers.js';
import { atMost, quotient, Samples, unavailable } from '../result.js';
import { mostIntermediaries, type Rig } from '../rig.js';

const destinationMbits = 100;
const intermediaryMbits = 200;

async function one(rig: Rig, mode: PaperMode, via: number): Promise<number | null> {
  const { lab, destination, intermediaries, options } = rig;
  lab.setHostRate(destination, 'receive', `${destinationMbits}mbit`);
  for (const host of intermediaries) lab.setHostRate(host, 'receive', `${intermediaryMbits}mbit`);
  const guest: GuestSpec = {
    kind: 'idle',
    lengthBytes: options.guestBytes,
    writerBytesPerSecond: 0,
    port: 0,
  };
  const outcome = await runMigration(rig, {
    mode,
    guest,
    via,
    intermediaryMbits,
    evicted: () => lab.setHostRate(destination, 'receive', null),
  });
  if (outcome !== null) {
    rig.tell(`${via} intermediaries, ${mode}: evicted after ${(outcome.evictionMs / 1000).toFixed(2)} s`);
  }
  return outcome === null ? null : outcome.evictionMs / 1000;
}

export const figures: FigureModule = {
  names: ['15'],
  async run(rig, _wanted, emit) {
    const { guestBytes, trials, link } = rig.options;
    const all = Array.from({ length: mostIntermediaries + 1 }, (_, k) => k);
    const counts = (rig.options.counts ?? all).filter((k) => k <= mostIntermediaries);
    const samples = new Samples();
    const lines: number[] = [];
    for (let round = 0; round < trials; round++) {
      await rig.reset();
      lines.push(await rig.goodput());
      const cells: [PaperMode, number][] = [
        // They use no intermediaries: measured once a round, whatever the number.
        ...directModes.map((mode): [PaperMode, number] => [mode, 0]),
        ...counts.map((k): [PaperMode, number] => ['scatter', k]),
      ];
      for (const [mode, k] of inTurns(cells, round)) {
        const seconds = await one(rig, mode, k);
        if (seconds !== null) samples.add(mode, 'eviction', k, 's', seconds);
      }
    }
    const goodput = median(lines);
    /** As the reach says it: of the nominal rates, headers included. */
    const expected = (k: number): number =>
      (guestBytes * 8) / (Math.min(linkMbits(link), destinationMbits + intermediaryMbits * k) * 1e6);
    const points = samples.points((x) => expected(Number(x)));
    if (rig.scatterObstacle !== null) {
      for (const k of counts) points.push(unavailable('scatter', 'eviction', k, rig.scatterObstacle));
    }
    const eviction = (mode: string, k: number): number | null => samples.median(mode, 'eviction', k);
    const flat = (mode: (typeof directModes)[number]): Series => {
      const value = eviction(mode, 0);
      return {
        name: `${mode} (measured at 0)`,
        from: 'here',
        colour: colours[mode],
        points: value === null ? [] : all.map((k): [number, number] => [k, value]),
      };
    };
    const title = 'Figure 15: eviction by the number of intermediaries';
    emit({
      figure: '15',
      title,
      xName: 'intermediaries',
      setting: {
        guestBytes,
        trials,
        link,
        destinationMbits,
        intermediaryMbits,
        rawLinkMbits: (goodput * 8) / 1e6,
      },
      points,
      checks: [
        ...counts.map((k) =>
          atMost(
            `scatter, ${k} intermediaries: eviction`,
            quotient(eviction('scatter', k), expected(k)),
            1.07,
            `${expected(k).toFixed(2)} s, the guest over min(link, ${destinationMbits} + ${intermediaryMbits} × ${k} Mb/s)`,
          ),
        ),
        ...directModes.map((mode) =>
          atMost(`${mode}: eviction`, quotient(eviction(mode, 0), expected(0)), 1.07, 'the same with 0'),
        ),
      ],
      charts: [
        {
          name: 'figure-15',
          kind: 'line',
          title,
          xLabel: 'intermediaries of 200 Mb/s',
          yLabel: 'eviction, seconds',
          xTicks: all.map((at) => ({ at, label: String(at) })),
          series: [
            ...directModes.map(flat),
            {
              name: 'scatter',
              from: 'here',
              colour: colours['scatter'],
              points: counts.flatMap((k): [number, number][] => {
                const value = eviction('scatter', k);
                return value === null ? [] : [[k, value]];
              }),
            },
            {
              name: 'min(link, 100 + 200 k Mb/s)',
              from: 'here',
              colour: colours['reach'],
              plain: true,
              points: all.map((k): [number, number] => [k, expected(k)]),
            },
          ],
        },
      ],
      paper: paperNumbers['15'] ?? [],
      notes: [
        'pre-copy and post-copy use no intermediaries; they were measured with none',
        'the rates are nominal: of 100 Mb/s a raw socket gets about 96 as payload',
      ],
    });
  },
};
