/** `memferry unpark`: claims a parked guest, resumes it here, and lets one talk to it. */
import type { Command } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { unpark } from '../destination/unpark.js';
import { deferred } from '../protocol/deferred.js';
import { memferryError } from '../errors.js';
import type { UnparkOptions } from '../options.js';
import { type WorkerGuest, workerGuests } from '../worker/index.js';
import { reportOrRest } from './await-rest.js';
import { addPeerFlags, type PeerFlags, peerOptions } from './connection-flags.js';
import { GuestConsole } from './guest-console.js';
import { makeOutput } from './output.js';
import { byteRate, type NamedModule, namedModules, readableModules, regionImages } from './parse-values.js';
import { follow } from './receive.js';
import { interrupted, onInterrupt } from './signals.js';
import { addClaimFlags, type ClaimFlags, claimOptions, ticketFrom } from './ticket.js';

interface UnparkFlags extends PeerFlags, ClaimFlags {
  ticket: string;
  module: NamedModule[];
  gatherLimit?: number;
  base?: string;
  baseForAny?: boolean;
  baseImage?: NamedModule[];
  once?: boolean;
  json?: boolean;
}

export function addUnpark(program: Command): void {
  const command = program
    .command('unpark')
    .description('claim a parked guest and run it here')
    .requiredOption('--ticket <file>', 'what `memferry park` wrote')
    .requiredOption(
      '--module <name=path>',
      'a module that may be run here, by its name (repeatable)',
      namedModules,
    )
    .option('--gather-limit <bytes/s>', 'fetched ahead of the guest at most', byteRate)
    .option(
      '--base <directory>',
      'what was kept there of the guest when it left this host: what is the same is not fetched',
    )
    .option('--base-for-any', 'also what was kept of another guest of that name and module')
    .option(
      '--base-image <region=file>',
      'a raw image that is like that region of the guest (repeatable); instead of --base',
      regionImages,
    )
    .option('--once', 'end when every page is here, and the guest with it')
    .option('--json', 'one JSON object a line');
  addClaimFlags(addPeerFlags(command)).action(unparkGuest);
}

/** @throws INVALID_ARGUMENT */
export function baseOption(flags: UnparkFlags): Pick<UnparkOptions, 'base'> {
  const { base, baseForAny, baseImage } = flags;
  const wrong = (why: string) => memferryError('INVALID_ARGUMENT', why);
  if (base !== undefined && baseImage) throw wrong('--base-image: instead of --base, not with it');
  if (baseForAny && base === undefined) throw wrong('--base-for-any: of what --base names');
  if (base?.startsWith('vmd:'))
    throw wrong('--base: a directory; what is in the VMD is no nearer than the guest');
  if (base !== undefined) return { base: { directory: base, anySource: baseForAny === true } };
  if (!baseImage) return {};
  return { base: { images: Object.fromEntries(baseImage.map(({ name, path }) => [name, path])) } };
}

async function unparkGuest(flags: UnparkFlags): Promise<void> {
  const base = baseOption(flags);
  const modules = await readableModules(flags.module);
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  let here: WorkerGuest | null = null;
  const ended = deferred<'ended'>();
  const ticket = await ticketFrom(flags.ticket);
  await using unparked = await unpark(ticket, {
    ...peerOptions(flags),
    signal: interruption.signal,
    ...base,
    ...claimOptions(flags),
    ...(flags.gatherLimit === undefined ? {} : { gatherLimit: flags.gatherLimit }),
    accept: workerGuests({
      modules,
      onGuest: (guest) => {
        here = guest;
        guest.once('ended', () => ended.resolve('ended'));
        follow(guest, output);
      },
    }),
  });
  const { name } = unparked.offer;
  output.say(`guest ${name} runs here; a line asks it`);
  output.line({ type: 'resumed', guest: name });
  const typed = new GuestConsole({ input: process.stdin, output, guest: () => here });
  const stopped = interrupted(interruption.signal);
  try {
    // Without --once the guest lives on with what is left of its pages.
    const rest = flags.once ? Promise.race([unparked.restHere, ended.promise]) : ended.promise;
    const report = await reportOrRest(unparked, output, stopped, rest);
    output.result(
      `guest ${name} is complete: gathered in ${figure(report.gatherMs)} ms, ` +
        `${mebibytes(report.heapBytes)} MiB, ${report.remoteFaults.count} remote faults` +
        (report.pagesFromBase > 0 ? `, ${report.pagesFromBase} pages were here already` : ''),
      { type: 'report', ...report },
    );
    // With all of it here the command is its guest's: it ends with it, or when it is told to.
    if (!flags.once && (await Promise.race([stopped.catch(() => null), ended.promise])) === 'ended') {
      throw memferryError('GUEST_LOST', `guest ${name} ended`);
    }
  } finally {
    typed.close();
    process.stdin.destroy();
    // First, so that what is missing is poisoned: a guest that waits for a page cannot be ended.
    await unparked[Symbol.asyncDispose]();
    await (here as WorkerGuest | null)?.terminate();
  }
}
