/**
 * `npm run bench:paper [-- FIGURE…] [--json] [--write]`: the paper's evaluation on this machine. A reach that is
 * missed is reported and changes no exit status; a figure that breaks does, and the others still run.
 */
import type { FigureModule } from './figure.js';
import { figures as bandwidth } from './figures/bandwidth.js';
import { figures as dedup } from './figures/dedup.js';
import { figures as gang } from './figures/gang.js';
import { figures as intermediaries } from './figures/intermediaries.js';
import { figures as pressure } from './figures/pressure.js';
import { figures as qemu } from './figures/qemu.js';
import { figures as serving } from './figures/serving.js';
import { type PaperOptions, parseOptions, UsageError, usage } from './options.js';
import { terminalTable, writeDocumentation } from './report.js';
import type { FigureResult } from './result.js';
import { Obstacle, Rig, rigObstacle } from './rig.js';

const modules: FigureModule[] = [pressure, gang, bandwidth, serving, dedup, intermediaries, qemu];
const known = modules.flatMap(({ names }) => names);

function options(): PaperOptions {
  try {
    return parseOptions(process.argv.slice(2), known);
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    process.stderr.write(`${error.message}\n${usage}`);
    process.exit(2);
  }
}

const chosen = options();
const obstacle = rigObstacle();
if (obstacle !== null) {
  process.stderr.write(`bench:paper: ${obstacle}\n`);
  process.exit(1);
}
// Signals end the process by way of 'exit', where everything that the rig made is taken down. `on`: a second one (npm and
// the terminal both pass Ctrl-C on) must not end it in the middle of that.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => process.exit(1));

const tell = (text: string): void => void process.stderr.write(`${text}\n`);
const emit = (measured: FigureResult): void => {
  const result = { ...measured, notes: [...measured.notes, ...rig.failures] };
  process.stdout.write(chosen.json ? `${JSON.stringify(result)}\n` : terminalTable(result));
  if (chosen.write) writeDocumentation(result);
};

let broken = false;
const rig = await Rig.open(chosen, tell);
if (rig.scatterObstacle !== null) tell(`mode scatter is not available: ${rig.scatterObstacle}`);
for (const module of modules) {
  const wanted = new Set(chosen.figures.filter((name) => module.names.includes(name)));
  if (wanted.size === 0) continue;
  await rig.reset();
  rig.failures.length = 0;
  try {
    await module.run(rig, wanted, emit);
  } catch (error) {
    broken = true;
    if (error instanceof Obstacle) {
      tell(`figure ${[...wanted].join(', ')} cannot be measured here: ${error.message}`);
      continue;
    }
    tell(
      `figure ${[...wanted].join(', ')}: ${error instanceof Error ? (error.stack ?? error.message) : error}`,
    );
  }
}
rig.close();
process.exit(broken ? 1 : 0);
