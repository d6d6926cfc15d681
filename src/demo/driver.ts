/**
 * Runs the demo: two hosts and a client as processes of their own, the guest between the hosts once by each
 * mode, and at the end what the client acknowledged against what the guest has.
 */
import { randomBytes } from 'node:crypto';
import { memferryError } from '../errors.js';
import type { Mode } from '../options.js';
import type { MigrationReport, MigrationState, Progress, RemoteFaults, RoundReport } from '../report.js';
import { DemoProcess } from './child.js';
import type { ClientFindings } from './client.js';
import type { BegunGuest, HostPorts } from './host.js';
import type { LatencyFigures } from './latency.js';

export interface DemoOptions {
  modes: readonly Mode[];
  heapMiB: number;
  signal: AbortSignal;
  onStep?: (text: string) => void;
  onState?: (leg: Leg, state: MigrationState) => void;
  onProgress?: (leg: Leg, progress: Progress) => void;
}

/** One move of the guest. */
export interface Leg {
  mode: Mode;
  from: 'A' | 'B';
  to: 'A' | 'B';
}

/** One line of the demo's JSON. */
export interface DemoReport {
  mode: Mode;
  from: string;
  to: string;
  heapBytes: number;
  /** Digests equal, the database intact, no acknowledged write lost, applied twice or read stale. */
  verified: boolean;
  digestsEqual: boolean;
  integrity: string;
  pauseWaitMs: number;
  downtimeMs: number;
  downtimeParts: MigrationReport['downtimeParts'];
  evictionMs: number;
  totalMs: number;
  bytesOnWire: number;
  pagesSent: number;
  pagesZero: number;
  pagesResent: number;
  rounds: number;
  roundReports: RoundReport[];
  remoteFaults: RemoteFaults;
  extraMemoryBytes: MigrationReport['extraMemoryBytes'];
  client: {
    /** Writes acknowledged in the whole run, and what became of them. */
    acknowledged: number;
    lost: number;
    duplicated: number;
    staleReads: number;
    /** While the guest moved: the longest time without an answer. */
    longestGapMs: number;
    p50Ms: number;
    p99Ms: number;
    /** The same figures before it moved. */
    before: LatencyFigures;
  };
}

const OPEN_DEADLINE_MS = 20_000;
const FILL_DEADLINE_MS = 300_000;
const MIGRATE_DEADLINE_MS = 300_000;
const VERIFY_DEADLINE_MS = 300_000;
const ANSWERS_DEADLINE_MS = 60_000;
/** How many answers the client must have had before the guest moves, and again after it has moved. */
const ANSWERS_AROUND = 300;

interface Host {
  process: DemoProcess;
  ports: HostPorts;
}

export async function runDemo(options: DemoOptions): Promise<DemoReport[]> {
  const step = options.onStep ?? (() => {});
  options.signal.throwIfAborted();
  const processes: DemoProcess[] = [];
  const end = () => Promise.all(processes.map((child) => child.end())).then(() => {});
  const aborted = new Promise<never>((_, reject) => {
    options.signal.addEventListener('abort', () => reject(abortError(options.signal)), { once: true });
  });
  aborted.catch(() => {});
  // Whatever throws past everything here still takes the children along.
  const killOnExit = () => {
    for (const child of processes) child.kill();
  };
  process.once('exit', killOnExit);
  try {
    return await Promise.race([run(options, step, processes), aborted]);
  } finally {
    await end();
    process.removeListener('exit', killOnExit);
  }
}

async function run(
  options: DemoOptions,
  step: (text: string) => void,
  processes: DemoProcess[],
): Promise<DemoReport[]> {
  const secret = randomBytes(32).toString('hex');
  const watch: Watch = { leg: null, options, arrivals: new Map() };
  step('starting two hosts and a client');
  const hosts = {
    A: await startHost('A', secret, processes, watch),
    B: await startHost('B', secret, processes, watch),
  };
  const client = new DemoProcess('client', new URL('./client.js', import.meta.url));
  processes.push(client);

  step(`filling a database of ${options.heapMiB} MiB at A`);
  const begun = await hosts.A.process.call<BegunGuest>(
    'begin',
    { heapMiB: options.heapMiB },
    FILL_DEADLINE_MS,
  );
  const addresses = [hosts.A, hosts.B].map(({ ports }) => ({ host: '127.0.0.1', port: ports.clientPort }));
  await client.call('start', { hosts: addresses, bulk: begun.bulk }, OPEN_DEADLINE_MS);

  const legs: { leg: Leg; report: MigrationReport; before: LatencyFigures; during: LatencyFigures }[] = [];
  let here: 'A' | 'B' = 'A';
  for (const mode of options.modes) {
    const leg: Leg = { mode, from: here, to: here === 'A' ? 'B' : 'A' };
    await client.call('answers', ANSWERS_AROUND, ANSWERS_DEADLINE_MS);
    const before = await client.call<LatencyFigures>('figures', null, ANSWERS_DEADLINE_MS);
    step(`${mode}: ${leg.from} to ${leg.to}`);
    watch.leg = leg;
    const complete = arrivalAt(watch, leg.to);
    const [report] = await Promise.all([
      hosts[leg.from].process.call<MigrationReport>(
        'migrate',
        { toPort: hosts[leg.to].ports.migrationPort, mode },
        MIGRATE_DEADLINE_MS,
      ),
      complete,
    ]);
    await client.call('answers', ANSWERS_AROUND, ANSWERS_DEADLINE_MS);
    const during = await client.call<LatencyFigures>('figures', null, ANSWERS_DEADLINE_MS);
    legs.push({ leg, report, before, during });
    here = leg.to;
  }

  step('reading every transaction back and checking the database');
  const findings = await client.call<ClientFindings>('finish', null, VERIFY_DEADLINE_MS);
  return legs.map(({ leg, report, before, during }) => lineOf(leg, report, before, during, findings));
}

// ---- hosts

interface Watch {
  leg: Leg | null;
  options: DemoOptions;
  arrivals: Map<string, { resolve: () => void; reject: (error: Error) => void }>;
}

async function startHost(
  name: 'A' | 'B',
  secret: string,
  processes: DemoProcess[],
  watch: Watch,
): Promise<Host> {
  const child = new DemoProcess(`host ${name}`, new URL('./host.js', import.meta.url), (notice, value) => {
    const { leg, options } = watch;
    if (notice === 'complete') watch.arrivals.get(name)?.resolve();
    else if (notice === 'failed') {
      watch.arrivals.get(name)?.reject(memferryError('GUEST_LOST', `host ${name}: ${value}`));
    } else if (leg && notice === 'state') options.onState?.(leg, value as MigrationState);
    else if (leg && notice === 'progress') options.onProgress?.(leg, value as Progress);
  });
  processes.push(child);
  return { process: child, ports: await child.call<HostPorts>('open', { secret }, OPEN_DEADLINE_MS) };
}

/** The destination's own word that every page is there; without it a guest could be sent on too early. */
function arrivalAt(watch: Watch, name: string): Promise<void> {
  const arrival = new Promise<void>((resolve, reject) => {
    const late = memferryError(
      'PEER_LOST',
      `host ${name} did not get every page in ${MIGRATE_DEADLINE_MS} ms`,
    );
    const timer = setTimeout(() => reject(late), MIGRATE_DEADLINE_MS);
    // Nobody waits for it any more when the source has failed: the processes keep the driver alive, not this.
    timer.unref();
    const settled =
      <T>(settle: (value: T) => void) =>
      (value: T) => {
        clearTimeout(timer);
        settle(value);
      };
    watch.arrivals.set(name, { resolve: () => settled(resolve)(undefined), reject: settled(reject) });
  });
  // When the source fails first, its error is the one to show.
  arrival.catch(() => {});
  return arrival;
}

// ---- the report

function lineOf(
  leg: Leg,
  report: MigrationReport,
  before: LatencyFigures,
  during: LatencyFigures,
  findings: ClientFindings,
): DemoReport {
  const digestsEqual = report.verified === true;
  const { acknowledged, lost, duplicated, staleReads, integrity } = findings;
  return {
    mode: leg.mode,
    from: leg.from,
    to: leg.to,
    heapBytes: report.heapBytes,
    verified: digestsEqual && integrity === 'ok' && lost === 0 && duplicated === 0 && staleReads === 0,
    digestsEqual,
    integrity,
    pauseWaitMs: report.pauseWaitMs,
    downtimeMs: report.downtimeMs,
    downtimeParts: report.downtimeParts,
    evictionMs: report.evictionMs,
    totalMs: report.totalMs,
    bytesOnWire: report.bytesOnWire,
    pagesSent: report.pagesSent,
    pagesZero: report.pagesZero,
    pagesResent: report.pagesResent,
    rounds: report.rounds.length,
    roundReports: report.rounds,
    remoteFaults: report.remoteFaults,
    extraMemoryBytes: report.extraMemoryBytes,
    client: {
      acknowledged,
      lost,
      duplicated,
      staleReads,
      longestGapMs: during.longestGapMs,
      p50Ms: during.p50Ms,
      p99Ms: during.p99Ms,
      before,
    },
  };
}

function abortError(signal: AbortSignal): Error {
  return memferryError('CANCELLED', 'the demo was interrupted', { cause: signal.reason });
}
