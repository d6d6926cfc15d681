/**
 * Figures 13 and 14: one to five busy guests of a quarter of the size that leave at once, with 80 % of their pages
 * alike, through one intermediary, with and without deduplication: bytes on the wire, and eviction of the gang. And
 * guests with nothing alike, where deduplication may cost next to nothing. The destination takes in so little by itself
 * that the guests go through the VMD, where pages of several guests meet.
 *
 * Beside it pre-copy, which the paper's deduplication makes worse: the same guests in rounds, with and without.
 */
import { loadAddon } from '../../support/addon.js';
import { median } from '../../support/statistics.js';
import { colours, type Series } from '../chart.js';
import type { FigureModule } from '../figure.js';
import type { GuestSpec } from '../guests.js';
import { boundedRounds, inTurns, type MigrationMode, type Outcome, runMigration } from '../migrations.js';
import { paperNumbers } from '../paper-numbers.js';
import { atMost, type Check, quotient, Samples } from '../result.js';
import type { Rig } from '../rig.js';

/** Pages in a thousand. */
const contents = { '80 % alike': 800, 'nothing alike': 0 } as const;
type Content = keyof typeof contents;
const variants = ['without', 'with'] as const;
const busyBytesPerSecond = 10e6;
/** Of all direct ways together, and of all gathers: one host takes in no more for it that more guests come to it. */
const slow = { bandwidth: 2e6, gatherLimit: 32e6 };
/** Modes in rounds to the end. */
const preCopyModes: readonly MigrationMode[] = ['pre-copy', 'scatter-pre-copy'];
const measuredModes: readonly MigrationMode[] = ['scatter', ...preCopyModes];
const series = (mode: MigrationMode, content: Content, variant: (typeof variants)[number]): string =>
  `${mode} ${variant} deduplication, ${content}`;

/** What no deduplication can do without: every content once. */
function distinctBytes(guestBytes: number, count: number, content: Content): number {
  const alike = contents[content] / 1000;
  return guestBytes * (alike + count * (1 - alike));
}

async function measure(
  rig: Rig,
  counts: number[],
): Promise<{ samples: Samples; lineRate: number; notes: string[] }> {
  const guestBytes = rig.options.guestBytes / 4;
  const samples = new Samples();
  const lines: number[] = [];
  const saved: string[] = [];
  const beyond: string[] = [];
  const measurements = measuredModes.flatMap((mode) =>
    (Object.keys(contents) as Content[]).map((content) => ({ mode, content })),
  );
  for (let round = 0; round < rig.options.trials; round++) {
    lines.push(await rig.goodput());
    for (const count of inTurns(counts, round)) {
      for (const { mode, content } of measurements) {
        for (const variant of inTurns(variants, round)) {
          const guest: GuestSpec = {
            kind: 'busy',
            lengthBytes: guestBytes,
            writerBytesPerSecond: busyBytesPerSecond / count,
            port: 0,
            alike: contents[content],
          };
          const paging = mode === 'scatter';
          const dedup = variant === 'with' ? { dedup: { domain: 'figure 13' } } : {};
          const migrate = { ...dedup, ...(paging ? {} : boundedRounds) };
          const bandwidth = Math.floor(slow.bandwidth / count);
          const listen = paging
            ? { bandwidth, gatherLimit: Math.floor(slow.gatherLimit / count) }
            : mode === 'scatter-pre-copy'
              ? { bandwidth } // what is taken over is whole, so it is gathered as fast as it can be
              : dedup; // with no server between them it is the destination that has pages already
          const outcome = await runMigration(rig, {
            mode,
            guest,
            count,
            verify: round === 0,
            migrate,
            listen,
          });
          if (outcome === null) continue;
          add(samples, series(mode, content, variant), count, outcome);
          const seconds = (outcome.evictionMs / 1000).toFixed(2);
          const mib = (outcome.bytesOnWire / 2 ** 20).toFixed(0);
          const distinct = (distinctBytes(guestBytes, count, content) / 2 ** 20).toFixed(0);
          rig.tell(
            `${count} guests, ${mode}, ${content}, ${variant}: ${mib} MiB (distinct ${distinct}), evicted after ${seconds} s, ` +
              `${outcome.dedupCpuMs.toFixed(0)} ms of hashing`,
          );
          if (variant !== 'with' || round !== 0) continue;
          saved.push(`${count} guests, ${mode}, ${content}: ${outcome.dedupCpuMs.toFixed(0)} ms`);
          if (mode === 'scatter' && contents[content] > 0) {
            beyond.push(
              `${count} guests: ${whatIsBeyond(outcome, distinctBytes(guestBytes, count, content))}`,
            );
          }
        }
      }
    }
  }
  return {
    samples,
    lineRate: median(lines),
    notes: [
      ...(beyond.length > 0
        ? [
            `scatter with deduplication, what went beyond the distinct bytes: ${beyond.join('; ')}. A fault is answered ` +
              'with the page itself, whoever has another copy of it, and a page that was scattered already goes again for it',
          ]
        : []),
      `CPU time of hashing, all guests: ${saved.join('; ')}`,
    ],
  };
}

function whatIsBeyond({ bytesOnWire, pagesSent }: Outcome, distinct: number): string {
  const sent = pagesSent * loadAddon().pageSize;
  const mib = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);
  return `${mib(sent - distinct)} MiB of pages, ${mib(bytesOnWire - sent)} MiB of names, references and the map`;
}

function add(samples: Samples, name: string, count: number, outcome: Outcome): void {
  samples.add(name, 'bytes', count, 'MiB', outcome.bytesOnWire / 2 ** 20);
  samples.add(name, 'eviction', count, 's', outcome.evictionMs / 1000);
}

export const figures: FigureModule = {
  names: ['13', '14'],
  async run(rig, wanted, emit) {
    const counts = (rig.options.counts ?? [1, 2, 3, 4, 5]).filter((count) => count >= 1);
    const { samples, lineRate, notes } = await measure(rig, counts);
    const guestBytes = rig.options.guestBytes / 4;
    const points = samples.points((x) => (Number(x) * guestBytes) / lineRate);
    const of = (content: Content, variant: (typeof variants)[number], measured: string, count: number) =>
      samples.median(series('scatter', content, variant), measured, count);
    const bytesChecks: Check[] = [];
    const evictionChecks: Check[] = [];
    for (const count of counts) {
      const distinct = distinctBytes(guestBytes, count, '80 % alike') / 2 ** 20;
      const all = (count * guestBytes) / 2 ** 20;
      const bytes = of('80 % alike', 'with', 'bytes', count);
      // 1 % of everything is what its asking may take.
      const limit = Number((1.02 + (0.01 * all) / distinct).toFixed(3));
      bytesChecks.push(
        atMost(`${count} guests, 80 % alike: bytes`, quotient(bytes, distinct), limit, 'the distinct bytes'),
      );
      const evictions = (content: Content) =>
        quotient(of(content, 'with', 'eviction', count), of(content, 'without', 'eviction', count));
      evictionChecks.push(
        atMost(
          `${count} guests, 80 % alike: eviction with deduplication`,
          evictions('80 % alike'),
          Number(((distinct / all) * 1.05).toFixed(3)),
          'that without (the share of distinct bytes, 5 % more)',
        ),
        atMost(
          `${count} guests, nothing alike: eviction with deduplication`,
          evictions('nothing alike'),
          1.02,
          'that without',
        ),
      );
      for (const mode of preCopyModes) {
        for (const content of Object.keys(contents) as Content[]) {
          const eviction = (variant: (typeof variants)[number]) =>
            samples.median(series(mode, content, variant), 'eviction', count);
          evictionChecks.push(
            atMost(
              `${count} guests, ${content}: ${mode} with deduplication`,
              quotient(eviction('with'), eviction('without')),
              1.02,
              "that without (the paper's gets worse)",
            ),
          );
        }
      }
    }
    const chart = (name: string, measured: string, yLabel: string, title: string) => ({
      name,
      kind: 'line' as const,
      title,
      xLabel: 'guests',
      yLabel,
      xTicks: counts.map((at) => ({ at, label: String(at) })),
      series: measuredModes.flatMap((mode) =>
        (Object.keys(contents) as Content[]).flatMap((content) =>
          variants.map(
            (variant): Series => ({
              name: series(mode, content, variant),
              from: 'here',
              colour: `${mode === 'scatter' ? colours.scatter : colours['pre-copy']}${variant === 'with' ? '' : '80'}`,
              plain: content === 'nothing alike',
              points: points.flatMap(({ series: own, measure: what, x, value }) =>
                own === series(mode, content, variant) && what === measured && value !== null
                  ? [[Number(x), value] as [number, number]]
                  : [],
              ),
            }),
          ),
        ),
      ),
    });
    const setting = {
      guestBytes,
      trials: rig.options.trials,
      link: rig.options.link,
      lineMegabytesPerSecond: lineRate / 1e6,
      destinationMegabytesPerSecond: slow.bandwidth / 1e6,
    };
    const common = { xName: 'guests', setting, notes };
    if (wanted.has('13')) {
      const title = 'Figure 13: bytes on the wire of busy guests at once, with and without deduplication';
      emit({
        ...common,
        figure: '13',
        title,
        points: points.filter((point) => point.measure === 'bytes'),
        checks: bytesChecks,
        charts: [chart('figure-13', 'bytes', 'MiB', title)],
        paper: paperNumbers['13'] ?? [],
      });
    }
    if (wanted.has('14')) {
      const title = 'Figure 14: eviction of busy guests at once, with and without deduplication';
      emit({
        ...common,
        figure: '14',
        title,
        points: points.filter((point) => point.measure === 'eviction'),
        checks: evictionChecks,
        charts: [chart('figure-14', 'eviction', 'seconds', title)],
        paper: paperNumbers['14'] ?? [],
      });
    }
  },
};
