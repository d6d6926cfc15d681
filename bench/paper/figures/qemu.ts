/**
 * The paper's own setting, today: the guest of a QEMU with Debian's kernel. To a destination that receives a sixth of
 * the link, Scatter-Gather against QEMU's pre-copy, multifd and post-copy; and to one that receives all of it, memferry's
 * hybrid against QEMU's multifd, the guest idle and dirtying.
 */
import { median } from '../../support/statistics.js';
import { runCommand, startServer } from '../../support/processes.js';
import { migrateByItself, type Qemu, type QemuMode, qemuRig } from '../../support/qemu.js';
import { colours } from '../chart.js';
import type { FigureModule } from '../figure.js';
import { inTurns, repeatedOnce } from '../migrations.js';
import { linkMbits } from '../options.js';
import { atLeast, atMost, quotient, Samples } from '../result.js';
import { memferryCommand, Obstacle, type Rig } from '../rig.js';

const mi = 2 ** 20;
const qemuModes: readonly QemuMode[] = ['pre-copy', 'multifd', 'post-copy'];
const port = 7171;
/** Of the guest: the rest is its kernel's. */
const filled = 0.75;
const kernelMb = 120;
const dirtyPages = 32;
const intermediaries = 2;

interface Outcome {
  evictionMs: number;
  totalMs: number;
  downtimeMs: number;
  bytes: number;
  /** What is wrong with the guest after QEMU's own migration, whose times stand all the same; null: nothing. */
  broken: string | null;
}

interface Plan {
  series: string;
  limited: boolean;
  dirtying: boolean;
}

const tight: readonly Plan[] = [
  ...qemuModes.map((mode) => ({ series: `QEMU ${mode}`, limited: true, dirtying: false })),
  { series: 'scatter', limited: true, dirtying: false },
];
const free: readonly Plan[] = [false, true].flatMap((dirtying) => [
  { series: 'hybrid', limited: false, dirtying },
  { series: 'QEMU multifd', limited: false, dirtying },
]);

const nameOf = ({ limited, dirtying }: Plan) =>
  limited ? 'a sixth, idle' : dirtying ? 'whole link, dirtying' : 'whole link, idle';

async function byMemferry(rig: Rig, source: Qemu, destination: Qemu, mode: string): Promise<Outcome> {
  const bytes = rig.options.guestBytes;
  const stage = await rig.stage(mode === 'scatter' ? intermediaries : 0, bytes + 2 ** 26);
  const common = ['--secret-file', rig.secretFile, '--plaintext', '--json'];
  const waiting = await startServer(
    process.execPath,
    [
      ...[memferryCommand, 'qemu', 'destination', '--qmp', destination.qmp, '--shim', destination.shim],
      ...['--listen', `${rig.destination.address}:${port}`, ...common],
    ],
    { namespace: rig.destination.namespace },
  );
  try {
    const said = await runCommand(
      process.execPath,
      [
        ...[memferryCommand, 'qemu', 'source', '--qmp', source.qmp, '--shim', source.shim, '--mode', mode],
        ...['--to', `${rig.destination.address}:${port}`, ...common],
        ...stage.via.flatMap((via) => ['--via', via]),
      ],
      { namespace: rig.source.namespace, timeoutMs: 300_000 },
    );
    const report = JSON.parse(said.trim().split('\n').at(-1) as string) as Outcome & {
      pagesSent: number;
      pagesResent: number;
      bytesOnWire: number;
    };
    return { ...report, bytes: report.bytesOnWire, broken: null };
  } finally {
    await waiting.stop();
    await Promise.all(stage.servers.map((server) => server.stop()));
  }
}

async function one(rig: Rig, { series, limited, dirtying }: Plan): Promise<Outcome> {
  const { lab, options, source: here, destination: there } = rig;
  await rig.reset();
  const memoryMb = options.guestBytes / mi;
  const args = qemuRig.guestArguments({
    memoryMb,
    fillMb: Math.floor(Math.min(memoryMb * filled, memoryMb - kernelMb)),
    dirtyPages: dirtying ? dirtyPages : 0,
    tickMs: 10,
  });
  const inside = (namespace: string) => ['ip', 'netns', 'exec', namespace];
  const source = await qemuRig.Qemu.start({ args, prefix: inside(here.namespace) });
  const serials: string[] = [];
  let destination: Qemu | null = null;
  try {
    await source.ticks(20, 180_000);
    destination = await qemuRig.Qemu.start({ args, incoming: true, prefix: inside(there.namespace) });
    if (limited) lab.setHostRate(there, 'receive', `${Math.round(linkMbits(options.link) / 6)}mbit`);
    const own = qemuModes.find((mode) => series === `QEMU ${mode}`);
    let outcome: Outcome;
    if (own) {
      const { totalMs, downtimeMs, bytes } = await migrateByItself(source, destination, {
        mode: own,
        host: there.address,
        port,
        timeoutMs: 300_000,
        running: true,
      });
      outcome = { evictionMs: totalMs, totalMs, downtimeMs, bytes, broken: null };
    } else {
      outcome = await byMemferry(rig, source, destination, series);
    }
    serials.push(source.serial);
    try {
      await destination.ticks(20);
      serials.push(destination.serial);
      const problem = qemuRig.problemOf(serials);
      if (problem !== null) throw new Error(problem);
    } catch (error) {
      if (!own) throw new Error(`${series}: the guest did not survive`, { cause: error });
      outcome.broken = String(error);
    }
    return outcome;
  } finally {
    await source.stop();
    await destination?.stop();
  }
}

export const figures: FigureModule = {
  names: ['qemu'],
  async run(rig, _wanted, emit) {
    const obstacle = qemuRig.qemuObstacle();
    if (obstacle !== null) throw new Obstacle(obstacle);
    const { guestBytes, trials, link } = rig.options;
    const samples = new Samples();
    const lines: number[] = [];
    const scattered: number[] = [];
    const broken = new Map<string, number>();
    for (let round = 0; round < trials; round++) {
      await rig.reset();
      const goodput = await rig.goodput();
      lines.push(goodput);
      for (const plan of inTurns([...tight, ...free], round)) {
        const x = nameOf(plan);
        const outcome = await repeatedOnce(rig, `${plan.series}, ${x},`, () => one(rig, plan));
        if (outcome.broken !== null) {
          const name = `${plan.series}, ${x}`;
          broken.set(name, (broken.get(name) ?? 0) + 1);
          rig.tell(`${name}: its guest did not survive: ${outcome.broken.split('\n')[0]}`);
        }
        samples.add(plan.series, 'eviction', x, 's', outcome.evictionMs / 1000);
        samples.add(plan.series, 'total', x, 's', outcome.totalMs / 1000);
        samples.add(plan.series, 'downtime', x, 'ms', outcome.downtimeMs);
        if (plan.series === 'scatter') {
          scattered.push(outcome.evictionMs / 1000 / (outcome.bytes / goodput));
        }
        rig.tell(
          `${plan.series}, ${x}: evicted after ${(outcome.evictionMs / 1000).toFixed(2)} s, ` +
            `downtime ${outcome.downtimeMs.toFixed(1)} ms`,
        );
      }
    }
    const lineSeconds = guestBytes / median(lines);
    const of = (series: string, measure: string, plan: Plan) => samples.median(series, measure, nameOf(plan));
    const [idle, , dirtying] = free as [Plan, Plan, Plan, Plan];
    const limited = tight[0] as Plan;
    const title = 'QEMU: Scatter-Gather of its guest, and its own ways';
    const ticks = tight.map(({ series }, at) => ({ at, label: series }));
    emit({
      figure: 'qemu',
      title,
      xName: 'destination receives',
      setting: {
        guestBytes,
        trials,
        link,
        lineSeconds,
        destinationMbits: Math.round(linkMbits(link) / 6),
        intermediaries,
      },
      points: samples.points(() => lineSeconds),
      checks: [
        atMost('scatter: eviction', median(scattered), 1.05, 'its bytes over the link rate'),
        ...qemuModes.map((mode) =>
          atLeast(
            `QEMU ${mode}: eviction`,
            quotient(of(`QEMU ${mode}`, 'eviction', limited), of('scatter', 'eviction', limited)),
            5,
            "scatter's",
          ),
        ),
        ...[idle, dirtying].flatMap((plan) => [
          atMost(`hybrid, ${nameOf(plan)}: downtime`, of('hybrid', 'downtime', plan), 20, 'ms'),
          atMost(
            `hybrid, ${nameOf(plan)}: total`,
            quotient(of('hybrid', 'total', plan), of('QEMU multifd', 'total', plan)),
            1,
            "QEMU multifd's",
          ),
        ]),
      ],
      charts: [
        {
          name: 'figure-qemu',
          kind: 'bar',
          title,
          xLabel: 'destination at a sixth of the link, idle guest',
          yLabel: 'seconds',
          xTicks: ticks,
          series: (['eviction', 'total'] as const).map((measure) => ({
            name: measure,
            from: 'here' as const,
            colour: colours[measure === 'eviction' ? 'scatter' : 'post-copy'],
            points: tight.flatMap(({ series }, at): [number, number][] => {
              const value = of(series, measure, limited);
              return value === null ? [] : [[at, value]];
            }),
          })),
        },
      ],
      paper: [],
      notes: [
        `the guest has ${Math.round(filled * 100)} % of its memory filled with what no two pages share, on QEMU's TCG`,
        ...[...broken].map(
          ([name, times]) => `${name}: the guest did not survive in ${times} of ${trials}; the times count`,
        ),
        "QEMU's downtime is its own account; memferry's runs from before `stop` to the destination's word",
      ],
    });
  },
};
