/** `memferry demo`: a SQLite database moves between two processes while a client keeps using it. */
import { type Command, Option } from 'commander';
import { type DemoReport, runDemo } from '../demo/driver.js';
import { demoSummary } from '../demo/table.js';
import { memferryError } from '../errors.js';
import { type CompressChoice, type Mode, modes } from '../options.js';
import { compressFlag, given } from './leaving-guest.js';
import { LiveProgress } from './live-progress.js';
import { makeOutput } from './output.js';
import { byteCount, wholeNumber } from './parse-values.js';
import { onInterrupt } from './signals.js';

interface DemoFlags {
  mode?: Mode;
  heapMb: number;
  compress?: CompressChoice;
  deltaCache?: number;
  json?: boolean;
}

export function addDemo(program: Command): void {
  program
    .command('demo')
    .description('move a live SQLite database between two processes while a client keeps using it')
    .addOption(new Option('--mode <mode>', 'one move by this mode, not one by each').choices(modes))
    .option('--heap-mb <MiB>', 'size of the database', wholeNumber(16, 3072), 256)
    .addOption(compressFlag())
    .option(
      '--delta-cache <bytes>',
      'modes with rounds: memory for deltas of pages that are sent again, as 256Mi',
      byteCount,
    )
    .option('--json', 'one JSON object a line, the last one the report')
    .action(demo);
}

async function demo(flags: DemoFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  let live: LiveProgress | null = null;
  const stopLive = () => {
    live?.stop();
    live = null;
  };
  let reports: DemoReport[];
  try {
    reports = await runDemo({
      modes: flags.mode ? [flags.mode] : modes,
      heapMiB: flags.heapMb,
      ...given({ compress: flags.compress, deltaCacheBytes: flags.deltaCache }),
      signal: interruption.signal,
      onStep: (text) => {
        stopLive();
        output.say(text);
        output.line({ type: 'step', text });
      },
      onState: ({ mode }, state) => {
        live?.state(state);
        output.line({ type: 'state', mode, state });
      },
      onProgress: ({ mode }, progress) => {
        if (!output.json) {
          live ??= new LiveProgress(mode);
          live.update(progress);
        }
        output.line({ type: 'progress', mode, ...progress });
      },
    });
  } finally {
    stopLive();
  }
  for (const report of reports.slice(0, -1)) output.line({ type: 'report', ...report });
  const last = reports.at(-1) as DemoReport;
  const verified = reports.every((report) => report.verified);
  // One mode: its report. Several: the sum of them, after a line for each.
  if (reports.length > 1) output.line({ type: 'report', ...last });
  output.result(
    demoSummary(reports),
    reports.length === 1
      ? { type: 'report', ...last }
      : { type: 'summary', verified, modes: reports.map(({ mode }) => mode), client: last.client },
  );
  if (!verified)
    throw memferryError('VERIFICATION_FAILED', 'the guest did not arrive as it left; see the report');
}
