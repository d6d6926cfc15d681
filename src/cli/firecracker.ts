/**
 * `memferry firecracker`: the page-fault handler that Firecracker restores a snapshot by; from the snapshot's file, from
 * a parked guest in the VMD, or from a running migration. `memferry firecracker-park` puts a snapshot into the VMD.
 */
import { rm, writeFile } from 'node:fs/promises';
import type { Command } from 'commander';
import { Option } from 'commander';
import { figure, mebibytes } from '../demo/table.js';
import { listen } from '../destination/listen.js';
import { unpark } from '../destination/unpark.js';
import { type MemferryError, memferryError } from '../errors.js';
import { FirecrackerApi } from '../firecracker/api.js';
import { type FirecrackerHost, microVmArrivals } from '../firecracker/arriving.js';
import { snapshotGuest } from '../firecracker/leaving.js';
import type { MicroVm, PrePaging } from '../firecracker/micro-vm.js';
import { serveSnapshot } from '../firecracker/serve.js';
import { parseAddress } from '../options.js';
import type { ArrivalReport } from '../report.js';
import { park } from '../source/park.js';
import { reportOrRest } from './await-rest.js';
import { addConnectionFlags, addPeerFlags, type PeerFlags, peerOptions } from './connection-flags.js';
import { tellParkInDoubt } from './in-doubt.js';
import { addServerFlags, type GuestFlags, given, type ServerFlags, serverOptions } from './leaving-guest.js';
import { complain, makeOutput, type Output } from './output.js';
import { byteCount, byteRate, octal, wholeNumber } from './parse-values.js';
import { interrupted, onInterrupt } from './signals.js';
import {
  addClaimFlags,
  type ClaimFlags,
  claimOptions,
  newTicketFile,
  ticketFrom,
  writeTicket,
} from './ticket.js';

interface FirecrackerFlags extends PeerFlags, ClaimFlags {
  socket: string;
  snapshot?: string;
  fromVmd?: string;
  listen?: string;
  state?: string;
  apiSocket?: string;
  prePaging: PrePaging;
  mode?: number;
  mostMicroVms?: number;
  gatherLimit?: number;
  maxBytes?: number;
  once?: boolean;
  json?: boolean;
}

export function addFirecracker(program: Command): void {
  const command = program
    .command('firecracker')
    .description('serve the memory of microVMs that Firecracker restores with "backend_type": "Uffd"')
    .requiredOption('--socket <path>', 'where Firecracker connects: its "backend_path"')
    .addOption(new Option('--snapshot <file>', "a snapshot's memory file").conflicts(['fromVmd', 'listen']))
    .addOption(
      new Option('--from-vmd <ticket>', 'a parked microVM, by what `firecracker-park` wrote').conflicts([
        'listen',
      ]),
    )
    .option('--listen <host:port>', 'a microVM that migrates to here')
    .option('--state <file>', "where a guest's execution state is written, for Firecracker's snapshot_path")
    .option('--api-socket <path>', "Firecracker's own socket: it is told to load, and to resume when it may")
    .addOption(
      new Option('--pre-paging <what>', 'of a file: what is brought before anyone waits for it')
        .choices(['none', 'sequential', 'all'])
        .default('sequential'),
    )
    .option('--mode <octal>', 'permissions of the socket (default 600)', octal)
    .option(
      '--max-bytes <bytes>',
      'with --listen: memory that all microVMs together may take (default 64Gi)',
      byteCount,
    )
    .option('--gather-limit <bytes/s>', 'of the VMD: fetched ahead of the guest at most', byteRate)
    .option('--most-micro-vms <count>', 'of a file: served at once (default 256)', wholeNumber(1, 1024))
    .option('--once', 'end with the first microVM')
    .option('--json', 'one JSON object a line');
  addClaimFlags(addPeerFlags(command)).action(serve);
}

async function serve(flags: FirecrackerFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const { signal } = interruption;
  if (flags.snapshot !== undefined) return await fromFile(flags, flags.snapshot, output, signal);
  if (flags.fromVmd === undefined && flags.listen === undefined)
    throw memferryError('INVALID_ARGUMENT', 'say what to serve: --snapshot, --from-vmd or --listen');
  if (flags.state === undefined)
    throw memferryError('INVALID_ARGUMENT', '--state: Firecracker needs the execution state in a file');
  const host = hostOf(flags, flags.state, output);
  if (flags.fromVmd !== undefined) return await fromVmd(flags, flags.fromVmd, host, output, signal);
  return await fromMigration(flags, flags.listen as string, host, output, signal);
}

async function fromFile(
  flags: FirecrackerFlags,
  snapshot: string,
  output: Output,
  signal: AbortSignal,
): Promise<void> {
  const stopped = interrupted(signal);
  stopped.catch(() => {});
  let first = (_: MicroVm) => {};
  const arrived = new Promise<MicroVm>((resolve) => {
    first = resolve;
  });
  await using server = await serveSnapshot({
    socketPath: flags.socket,
    snapshot,
    prePaging: flags.prePaging,
    ...given({ mode: flags.mode, mostMicroVms: flags.mostMicroVms }),
    onMicroVm: (microVm) => {
      output.say(`microVM of pid ${microVm.pid} connected, ${mebibytes(microVm.memory.lengthBytes)} MiB`);
      output.line({ type: 'connected', pid: microVm.pid, heapBytes: microVm.memory.lengthBytes });
      follow(microVm, output);
      first(microVm);
    },
    onRefused,
  });
  output.say(`${snapshot} is served at ${server.socketPath}`);
  output.line({ type: 'listening', socket: server.socketPath });
  if (!flags.once) return await stopped.catch(() => {}); // as every server that is told to end
  const microVm = await Promise.race([arrived, stopped]);
  await Promise.race([microVm.ended, stopped]);
}

function onRefused(error: MemferryError, { pid }: { pid: number }): void {
  complain(`memferry: ${error.code}: a connection of pid ${pid}: ${error.message}`);
}

function follow(microVm: MicroVm, output: Output): void {
  microVm.ended.then(
    (report) => {
      const { stats } = report;
      output.result(
        `microVM of pid ${report.pid}: ${report.end}; ${stats.faults} faults, p50 ${figure(stats.p50Us)} us; ` +
          `${stats.pagesInstalled} of ${stats.pages} pages brought, ${stats.pagesAhead} of them ahead`,
        { type: 'report', ...report },
      );
    },
    (error) => {
      complain(`memferry: ${error.code}: microVM of pid ${microVm.pid}: ${error.message}`);
    },
  );
}

async function fromVmd(
  flags: FirecrackerFlags,
  ticketFile: string,
  host: FirecrackerHost,
  output: Output,
  signal: AbortSignal,
): Promise<void> {
  await using unparked = await unpark(await ticketFrom(ticketFile), {
    ...peerOptions(flags),
    signal,
    ...claimOptions(flags),
    ...given({ gatherLimit: flags.gatherLimit }),
    accept: microVmArrivals(host),
  });
  const stopped = interrupted(signal);
  stopped.catch(() => {});
  // Then the memory is Firecracker's alone.
  requireRunning(reportArrival(await reportOrRest(unparked, output, stopped), output));
}

async function fromMigration(
  flags: FirecrackerFlags,
  address: string,
  host: FirecrackerHost,
  output: Output,
  signal: AbortSignal,
): Promise<void> {
  const microVms = new Set<MicroVm>();
  await using listening = await listen({
    ...parseAddress(address),
    ...peerOptions(flags),
    ...given({ maxBytes: flags.maxBytes, gatherLimit: flags.gatherLimit }),
    signal,
    accept: microVmArrivals({
      ...host,
      onMicroVm: (microVm) => {
        microVms.add(microVm);
        microVm.ended.catch(() => {});
        microVm.closed.then(() => microVms.delete(microVm));
      },
    }),
  });
  output.say(`waiting for a microVM on ${listening.host}:${listening.port}`);
  output.line({ type: 'listening', host: listening.host, port: listening.port });
  const stopped = interrupted(signal);
  stopped.catch(() => {});
  for await (const arrival of listening) {
    if (flags.once) {
      // Of a microVM that has lost pages nobody knows when it has the others: they are served for as long as it lives.
      const over = arrival.restHere.then(() => Promise.all([...microVms].map(({ closed }) => closed)));
      const report = reportArrival(await reportOrRest(arrival, output, stopped, over), output);
      // What has arrived here has still to be brought over.
      await Promise.race([Promise.all([...microVms].map(({ ended }) => ended)), stopped]);
      requireRunning(report);
      return;
    }
    try {
      reportArrival(await arrival.complete, output);
    } catch (error) {
      complain(`memferry: ${(error as { code?: string }).code}: ${(error as Error).message}`);
    }
  }
  if (flags.once) throw memferryError('CANCELLED', 'interrupted');
}

function reportArrival(report: ArrivalReport, output: Output): ArrivalReport {
  output.result(
    `microVM ${report.guest} is complete: gathered in ${figure(report.gatherMs)} ms, ` +
      `${mebibytes(report.heapBytes)} MiB, ${report.remoteFaults.count} remote faults`,
    { type: 'report', ...report },
  );
  return report;
}

/** Complete, and ours: whether it runs too is what the exit code says. */
function requireRunning({ notRunning }: ArrivalReport): void {
  if (notRunning !== null) throw memferryError('RESUME_FAILED', notRunning);
}

/** Without Firecracker's socket its operator does what it would be told to. */
function hostOf(flags: FirecrackerFlags, stateFile: string, output: Output): FirecrackerHost {
  const api = flags.apiSocket === undefined ? null : new FirecrackerApi(flags.apiSocket);
  return {
    socketPath: flags.socket,
    ...(flags.mode === undefined ? {} : { mode: flags.mode }),
    connectTimeoutMs: api ? 10_000 : 600_000,
    async load(state, { signal }) {
      await writeFile(stateFile, state, { mode: 0o600 });
      output.say(`load ${stateFile} with ${flags.socket}, paused`);
      output.line({ type: 'load', state: stateFile, socket: flags.socket });
      await api?.loadSnapshot(stateFile, flags.socket, { signal });
    },
    async resume() {
      output.say('the microVM may run: it is ours');
      output.line({ type: 'granted' });
      await api?.resume();
    },
    onConnected(pid) {
      output.line({ type: 'connected', pid });
    },
    onRefused,
  };
}

interface ParkFlags extends GuestFlags, ServerFlags {
  snapshot: string;
  state: string;
  name: string;
  ticket: string;
}

export function addFirecrackerPark(program: Command): void {
  const command = program
    .command('firecracker-park')
    .description("put a microVM's snapshot into the VMD")
    .requiredOption('--snapshot <file>', "the snapshot's memory file")
    .requiredOption('--state <file>', 'the snapshot file itself: the execution state')
    .requiredOption(
      '--ticket <file>',
      'where to write what claims it again; made with mode 0600, never overwritten',
    )
    .option('--name <name>', 'what it is called', 'microvm')
    .option('--json', 'one JSON object a line, the last one the report');
  addServerFlags(addConnectionFlags(command)).action(parkSnapshot);
}

async function parkSnapshot(flags: ParkFlags): Promise<void> {
  const output = makeOutput(flags.json);
  using interruption = onInterrupt();
  const file = await newTicketFile(flags.ticket);
  try {
    using guest = await snapshotGuest(flags.name, { memory: flags.snapshot, state: flags.state });
    const { ticket, ...report } = await park(guest, {
      signal: interruption.signal,
      ...serverOptions(flags),
      onTicket: (made) => writeTicket(file, flags.ticket, made),
      onInDoubt: () => tellParkInDoubt(flags.ticket, output),
    });
    output.result(
      `${report.guest} is parked; ${flags.ticket} claims it again, by \`memferry firecracker --from-vmd\`\n` +
        `  in ${figure(report.evictionMs)} ms, ${mebibytes(report.bytesOnWire)} MiB on the wire`,
      { type: 'report', image: ticket.image, home: ticket.home, ticket: flags.ticket, ...report },
    );
  } catch (error) {
    if ((error as { code?: string }).code !== 'MIGRATION_IN_DOUBT') await rm(flags.ticket, { force: true });
    throw error;
  } finally {
    await file.close();
  }
}
