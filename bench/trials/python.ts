/**
 * Downtime of a Python interpreter (npm: pyodide) with a heap of 40 MiB and more, which runs a generator all the
 * while. The floor is the bare scan that finds as many dirty pages in as large a region; post-copy has no scan, and a
 * floor of 0. Where the downtime goes is reported by part.
 */
import type { MigrationReport } from 'memferry';
import { loadAddon } from '../support/addon.js';
import { Peer, runFloor } from '../support/processes.js';
import type { Reach } from '../support/result.js';
import { median } from '../support/statistics.js';
import { paired, type Trial } from '../support/trial.js';

const parts = ['scanMs', 'transferMs', 'stateMs', 'prepareMs', 'commitMs'] as const;
const reach: Reach = { words: 'below 10 ms', met: ({ value }) => value < 10 };
const program = `
import random
random.seed(1)
ballast = [random.randbytes(65536) for _ in range(640)]
def numbers():
    total = 0
    while True:
        total += 1
        ballast[total % 640] = ballast[(total + 1) % 640]
        yield total
running = numbers()
def work():
    for _ in range(200): last = next(running)
    return last
`;

export async function run(trial: Trial): Promise<void> {
  for (const mode of ['hybrid', 'post-copy'] as const) {
    const taken: MigrationReport[] = [];
    const floors: number[] = [];
    for (let round = trial.samples(7); round > 0; round--) {
      const report = await once(mode);
      taken.push(report);
      floors.push(mode === 'post-copy' ? 0 : await scanFloor(report));
    }
    const heap = `${(median(taken.map(({ heapBytes }) => heapBytes)) / 2 ** 20).toFixed(0)} MiB of heap`;
    trial.report(
      `${mode}-downtime`,
      'ms',
      paired(
        taken.map(({ downtimeMs }) => downtimeMs),
        floors,
      ),
      reach,
      heap,
    );
    for (const part of parts) {
      const figures = taken.map(({ downtimeParts }) => downtimeParts[part]);
      trial.report(`${mode}-${part.slice(0, -2)}`, 'ms', paired(figures, []), null);
    }
    trial.report(
      `${mode}-pause-wait`,
      'ms',
      paired(
        taken.map(({ pauseWaitMs }) => pauseWaitMs),
        [],
      ),
      null,
    );
  }
}

/** Fails unless the generator has gone on exactly where it was. */
async function once(mode: 'hybrid' | 'post-copy'): Promise<MigrationReport> {
  const [source, destination] = [
    Peer.start('support/interpreter-host'),
    Peer.start('support/interpreter-host'),
  ];
  try {
    const [port] = await Promise.all([destination.call<number>('listen'), source.call('start', { program })]);
    const { report, steps } = await source.call<{ report: MigrationReport; steps: number }>('migrate', {
      port,
      mode,
      step: 'work()',
    });
    const next = await destination.call<number>('run', { code: 'next(running)' });
    if (report.verified !== true) throw new Error('the heap at the destination was not verified');
    if (next !== steps * 200 + 1) throw new Error(`the generator gave ${next} after ${steps * 200}`);
    return report;
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
  }
}

async function scanFloor({ rounds, heapBytes }: MigrationReport): Promise<number> {
  const { pageSize } = loadAddon();
  const dirty = Math.min(rounds.at(-1)?.dirtyPagesAfter ?? 0, heapBytes / pageSize);
  const args = ['--bytes', heapBytes, '--dirty', dirty, '--scans', 3];
  return median((await runFloor<{ scanMs: number[] }>('scan_floor', args)).scanMs);
}
