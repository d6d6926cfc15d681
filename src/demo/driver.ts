/**
 * Runs the demo: two hosts, two intermediaries and a client as processes of their own, the guest between the hosts
 * once by each mode, and at the end what the client acknowledged against what the guest has.
 */
import { randomBytes } from 'node:crypto';
import { memferryError } from '../errors.js';
import type { CompressChoice, Mode } from '../options.js';
import { traitsOf } from '../protocol/mode-traits.js';
import type {
  ArrivalReport,
  EncodingReport,
  EvictionReport,
  MigrationReport,
  MigrationState,
  Progress,
  RemoteFaults,
  RoundReport,
} from '../report.js';
import { DemoProcess } from './child.js';
import type { ClientFindings } from './client.js';
import type { BegunGuest, HostPorts, OpenCommand } from './host.js';
import type { LatencyFigures } from './latency.js';

export interface DemoOptions {
  modes: readonly Mode[];
  heapMiB: number;
  /** As `migrate` has them; its defaults where they are not given. */
  compress?: CompressChoice;
  deltaCacheBytes?: number;
  signal: AbortSignal;
  onStep?: (text: string) => void;
  onState?: (leg: Leg, state: MigrationState) => void;
  onProgress?: (leg: Leg, progress: Progress) => void;
}

/** One move of the guest. */
export interface Leg {
  mode: Mode;
  /** The destination takes in a sixth of what the source could send. */
  slow: boolean;
  from: 'A' | 'B';
  to: 'A' | 'B';
}

/** One line of the demo's JSON. */
export interface DemoReport {
  mode: Mode;
  /** The destination took in a sixth of what the source could send. */
  slow: boolean;
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
  /** The guest's first instruction at the destination until its last page was there. */
  gatherMs: number;
  totalMs: number;
  bytesOnWire: number;
  pagesSent: number;
  pagesZero: number;
  pagesResent: number;
  compression: EncodingReport;
  delta: EncodingReport;
  rounds: number;
  roundReports: RoundReport[];
  remoteFaults: RemoteFaults;
  extraMemoryBytes: MigrationReport['extraMemoryBytes'];
  /** Pages that went straight to the destination, and what went through each intermediary. */
  directPages: number;
  intermediaries: { name: string; pages: number; bytes: number }[];
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

/** What the source sends in the moves to a slow destination, and what that one takes, in bytes a second. */
const SOURCE_RATE = 600e6;
const SLOW_RATE = SOURCE_RATE / 6;
const INTERMEDIARIES = 2;

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
  const watch: Watch = { leg: null, options, arrivals: new Map(), evictions: new Map() };
  const legs = legsOf(options.modes);
  step('starting two hosts and a client');
  const hosts = {
    A: await startHost('A', { secret, clientPort: 0 }, processes, watch),
    B: await startHost('B', { secret, clientPort: 0 }, processes, watch),
  };
  const via = legs.some(({ mode }) => traitsOf(mode).scatter)
    ? await startIntermediaries(secret, options.heapMiB, processes)
    : [];
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

  const moves: { leg: Leg; report: MigrationReport; before: LatencyFigures; during: LatencyFigures }[] = [];
  for (const leg of legs) {
    await client.call('answers', ANSWERS_AROUND, ANSWERS_DEADLINE_MS);
    const before = await client.call<LatencyFigures>('figures', null, ANSWERS_DEADLINE_MS);
    step(`${nameOf(leg)}: ${leg.from} to ${leg.to}`);
    watch.leg = leg;
    const intake = leg.slow ? SLOW_RATE : 0;
    await hosts[leg.to].process.call('intake', { bytesPerSecond: intake }, OPEN_DEADLINE_MS);
    const complete = arrivalAt(watch, leg.to);
    const moving = hosts[leg.from].process.call<MigrationReport>(
      'migrate',
      {
        toPort: hosts[leg.to].ports.migrationPort,
        mode: leg.mode,
        bandwidth: leg.slow ? SOURCE_RATE : 0,
        compress: options.compress ?? 'auto',
        deltaCacheBytes: options.deltaCacheBytes ?? 0,
        via: traitsOf(leg.mode).scatter ? via : [],
      },
      MIGRATE_DEADLINE_MS,
    );
    let report: MigrationReport;
    if (traitsOf(leg.mode).scatter) {
      report = await scatterOf(leg, watch, hosts, moving, complete);
      const { clientPort } = hosts[leg.from].ports;
      hosts[leg.from] = await startHost(leg.from, { secret, clientPort }, processes, watch);
    } else {
      [report] = await Promise.all([moving, complete]);
    }
    await client.call('answers', ANSWERS_AROUND, ANSWERS_DEADLINE_MS);
    const during = await client.call<LatencyFigures>('figures', null, ANSWERS_DEADLINE_MS);
    moves.push({ leg, report, before, during });
  }

  step('reading every transaction back and checking the database');
  const findings = await client.call<ClientFindings>('finish', null, VERIFY_DEADLINE_MS);
  return moves.map(({ leg, report, before, during }) => lineOf(leg, report, before, during, findings));
}

/** There and back. The scatter modes come with a slow destination, and so does what they are compared with. */
function legsOf(modes: readonly Mode[]): Leg[] {
  const moves: Pick<Leg, 'mode' | 'slow'>[] = [];
  for (const mode of modes) {
    const { scatter } = traitsOf(mode);
    if (mode === 'scatter' && modes.length > 1) moves.push({ mode: 'post-copy', slow: true });
    moves.push({ mode, slow: scatter });
  }
  return moves.map((move, index) => ({
    ...move,
    from: index % 2 === 0 ? 'A' : 'B',
    to: index % 2 === 0 ? 'B' : 'A',
  }));
}

export function nameOf({ mode, slow }: Pick<Leg, 'mode' | 'slow'>): string {
  return slow ? `${mode}, slow destination` : mode;
}

/** The source is ended the moment it is evicted; the guest goes on, and the rest of it is gathered. */
async function scatterOf(
  leg: Leg,
  watch: Watch,
  hosts: Record<'A' | 'B', Host>,
  moving: Promise<MigrationReport>,
  complete: Promise<ArrivalReport>,
): Promise<MigrationReport> {
  const started = performance.now();
  const evicted = new Promise<EvictionReport>((resolve) => watch.evictions.set(leg.from, resolve));
  const eviction = await Promise.race([
    evicted,
    moving.then((report): EvictionReport => report),
    complete.then(() => evicted),
  ]);
  moving.catch(() => {}); // its process is ended now
  await hosts[leg.from].process.end();
  const arrival = await complete;
  return {
    ...eviction,
    state: 'completed',
    verified: arrival.verified,
    totalMs: performance.now() - started,
    gatherMs: arrival.gatherMs,
    remoteFaults: arrival.remoteFaults,
    extraMemoryBytes: { source: 0, destination: arrival.extraMemoryBytes },
  };
}

async function startIntermediaries(
  secret: string,
  heapMiB: number,
  processes: DemoProcess[],
): Promise<string[]> {
  const addresses: string[] = [];
  for (let number = 1; number <= INTERMEDIARIES; number++) {
    const name = `I${number}`;
    const child = new DemoProcess(`intermediary ${name}`, new URL('./intermediary.js', import.meta.url));
    processes.push(child);
    // Room for all of the guest in each: SQLite's heap is somewhat larger than the database.
    const memoryBytes = (2 * heapMiB + 128) * 2 ** 20;
    const { port } = await child.call<{ port: number }>(
      'open',
      { secret, name, memoryBytes },
      OPEN_DEADLINE_MS,
    );
    addresses.push(`127.0.0.1:${port}`);
  }
  return addresses;
}

// ---- hosts

interface Watch {
  leg: Leg | null;
  options: DemoOptions;
  arrivals: Map<string, { resolve: (report: ArrivalReport) => void; reject: (error: Error) => void }>;
  evictions: Map<string, (report: EvictionReport) => void>;
}

async function startHost(
  name: 'A' | 'B',
  how: OpenCommand,
  processes: DemoProcess[],
  watch: Watch,
): Promise<Host> {
  const child = new DemoProcess(`host ${name}`, new URL('./host.js', import.meta.url), (notice, value) => {
    const { leg, options } = watch;
    if (notice === 'complete') watch.arrivals.get(name)?.resolve(value as ArrivalReport);
    else if (notice === 'evicted') watch.evictions.get(name)?.(value as EvictionReport);
    else if (notice === 'failed') {
      watch.arrivals.get(name)?.reject(memferryError('GUEST_LOST', `host ${name}: ${value}`));
    } else if (leg && notice === 'state') options.onState?.(leg, value as MigrationState);
    else if (leg && notice === 'progress') options.onProgress?.(leg, value as Progress);
  });
  processes.push(child);
  return { process: child, ports: await child.call<HostPorts>('open', how, OPEN_DEADLINE_MS) };
}

/** The destination's own word that every page is there; without it a guest could be sent on too early. */
function arrivalAt(watch: Watch, name: string): Promise<ArrivalReport> {
  const arrival = new Promise<ArrivalReport>((resolve, reject) => {
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
    watch.arrivals.set(name, { resolve: settled(resolve), reject: settled(reject) });
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
    slow: leg.slow,
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
    gatherMs: report.gatherMs,
    totalMs: report.totalMs,
    bytesOnWire: report.bytesOnWire,
    pagesSent: report.pagesSent,
    pagesZero: report.pagesZero,
    pagesResent: report.pagesResent,
    compression: report.compression,
    delta: report.delta,
    rounds: report.rounds.length,
    roundReports: report.rounds,
    remoteFaults: report.remoteFaults,
    extraMemoryBytes: report.extraMemoryBytes,
    directPages: report.pagesDirect,
    intermediaries: report.intermediaries.map(({ name, pages, bytes }) => ({ name, pages, bytes })),
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
