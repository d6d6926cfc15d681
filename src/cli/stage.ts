/** `memferry stage`: a VMD server, memory that migrations and parked guests use. Runs until it is interrupted. */
import type { Command } from 'commander';
import { mebibytes } from '../demo/table.js';
import { defaultAnnounceGroup, parseAddress } from '../options.js';
import { stage } from '../staging/server.js';
import { addConnectionFlags, type ConnectionFlags, connectionOptions } from './connection-flags.js';
import { makeOutput } from './output.js';
import { byteCount, byteRate, duration, percent } from './parse-values.js';
import { onInterrupt } from './signals.js';

interface StageFlags extends ConnectionFlags {
  listen: string;
  memory: number;
  preallocate?: boolean;
  bandwidth?: number;
  name?: string;
  rack?: string;
  /** `true` without a group of one's own, `false` with --no-announce. */
  announce: string | boolean;
  parkTtl?: number;
  popularShare?: number;
  popularHalfLife?: number;
  json?: boolean;
}

export function addStage(program: Command): void {
  const command = program
    .command('stage')
    .description('hold memory for migrations: a server of the VMD')
    .requiredOption('--listen <host:port>', 'where to wait; port 0 takes any and says which')
    .requiredOption('--memory <bytes>', 'all that may be held here, as 512Mi or 4Gi', byteCount)
    .option('--preallocate', 'take all that memory at the start and keep it')
    .option('--bandwidth <rate>', 'bytes a second in each direction, as 100M (default: no limit)', byteRate)
    .option('--name <name>', 'what it is called in reports (default: its address)')
    .option('--rack <rack>', 'where it stands; migrations prefer the rack of their destination')
    .option('--announce [group:port]', `be found by multicast (default group: ${defaultAnnounceGroup})`, true)
    .option('--no-announce', 'be found by address only')
    .option('--park-ttl <duration>', 'drop parked guests that nobody opened for so long, as 12h', duration)
    .option(
      '--popular-share <percent>',
      'of the memory, for pages that many guests have; images get it when they need it (default 12.5)',
      percent,
    )
    .option(
      '--popular-half-life <duration>',
      'what a guest has not reported for so long fades (default 10m)',
      duration,
    )
    .option('--json', 'one JSON object a line');
  addConnectionFlags(command).action(serve);
}

async function serve(flags: StageFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const group = flags.announce === true ? defaultAnnounceGroup : flags.announce;
  const staging = await stage({
    ...parseAddress(flags.listen),
    ...connectionOptions(flags),
    memoryBytes: flags.memory,
    preallocate: flags.preallocate ?? false,
    ...(flags.bandwidth === undefined ? {} : { bandwidth: flags.bandwidth }),
    ...(flags.name === undefined ? {} : { name: flags.name }),
    ...(flags.rack === undefined ? {} : { rack: flags.rack }),
    announce: group === false ? null : group,
    ...(flags.parkTtl === undefined ? {} : { parkTtlMs: flags.parkTtl }),
    ...(flags.popularShare === undefined ? {} : { popularShare: flags.popularShare / 100 }),
    ...(flags.popularHalfLife === undefined ? {} : { popularHalfLifeMs: flags.popularHalfLife }),
  });
  try {
    const { name, host, port } = staging;
    const { memoryBytes, bandwidth, rack } = staging.status();
    output.say(`${name} holds up to ${mebibytes(memoryBytes)} MiB at ${host}:${port}`);
    output.line({
      type: 'listening',
      name,
      rack,
      host,
      port,
      memoryBytes,
      bandwidth,
      announce: group || null,
    });
    await new Promise<void>((resolve) => {
      if (interruption.signal.aborted) resolve();
      else interruption.signal.addEventListener('abort', () => resolve(), { once: true });
    });
    const { held } = staging.status();
    if (held.length > 0) output.say(`ends with ${held.length} images, which are lost`);
    output.line({ type: 'ended', images: held.map(({ id }) => id) });
  } finally {
    await staging.close();
  }
}
