/**
 * One of the demo's two hosts, a process of its own: it answers clients over TCP for as long as the guest is
 * here, takes the guest in when it arrives, and sends it away when the driver says so. Nothing is polled: the
 * first request after `resume` is answered as soon as the worker has done it.
 */
import { createServer, type Server, type Socket } from 'node:net';
import { type Listening, listen } from '../destination/listen.js';
import { memferryError } from '../errors.js';
import type { CompressChoice, Mode } from '../options.js';
import type { MigrationReport } from '../report.js';
import { migrate } from '../source/migrate.js';
import { WorkerGuest, workerGuests } from '../worker/index.js';
import { serve } from './child.js';
import {
  ACCOUNTS,
  type Bulk,
  countOfFiller,
  createLedger,
  itemsOf,
  read,
  singleValue,
  write,
} from './ledger.js';
import { type LineReply, type LineRequest, receiveLines, sendLine } from './lines.js';

const GUEST_NAME = 'ledger';
const MODULE = new URL('./sqlite-guest.js', import.meta.url);
const REHEARSED_ITEMS = 1000;
const REHEARSED_TURNS = 500;

export interface HostPorts {
  clientPort: number;
  migrationPort: number;
}

export interface BegunGuest {
  heapBytes: number;
  bulk: Bulk;
}

export interface OpenCommand {
  secret: string;
  /** That of the process whose place this one takes; 0 for any. */
  clientPort: number;
}

export interface MigrateCommand {
  toPort: number;
  mode: Mode;
  /** Bytes a second that this side sends; 0 for no limit. */
  bandwidth: number;
  compress: CompressChoice;
  deltaCacheBytes: number;
  /** VMD servers, for the scatter modes. */
  via: string[];
}

/** How fast this host takes a guest in, in bytes a second; 0 for no limit. */
export interface IntakeCommand {
  bytesPerSecond: number;
}

/** The guest while it is here, else null. */
let guest: WorkerGuest | null = null;
/** Keeps the module's compiled code in this process, see warmUp(). */
let rehearsal: WorkerGuest | null = null;
let secret = '';
let listening: Listening | null = null;
let clients: Server | null = null;
const { notify } = serve({ open, begin, intake, migrate: sendAway, close });

async function open(argument: OpenCommand): Promise<HostPorts> {
  secret = argument.secret;
  clients = createServer({ noDelay: true }, serveClient).listen(argument.clientPort, '127.0.0.1');
  await new Promise<void>((resolve, reject) => {
    clients?.once('listening', resolve).once('error', reject);
  });
  const accept = workerGuests({
    modules: { [GUEST_NAME]: MODULE },
    // Within `resume` itself: requests that come from now on go to the guest.
    onGuest: (arrived) => {
      guest = arrived;
    },
  });
  listening = await listen({ host: '127.0.0.1', port: 0, secret, accept });
  void takeIn(listening);
  rehearsal = await warmUp();
  return { clientPort: portOf(clients), migrationPort: listening.port };
}

/**
 * V8 compiles WebAssembly function by function as they are called and optimises the hot ones later, and shares the
 * code among all workers of a process. A guest that arrives finds it there when a worker of the same module has
 * been at work; otherwise its first clients wait for the compiler.
 */
async function warmUp(): Promise<WorkerGuest> {
  const started = await WorkerGuest.start({ module: { name: GUEST_NAME, url: MODULE } });
  for (const request of createLedger(REHEARSED_ITEMS)) await started.request(request);
  await started.request({ op: 'fill', databaseBytes: 2 ** 20 });
  for (let turn = 0; turn < REHEARSED_TURNS; turn++) {
    await started.request(write(`rehearsal-${turn}`, turn % ACCOUNTS, turn % REHEARSED_ITEMS));
    await started.request(read(turn % ACCOUNTS, 1, 1 + turn));
  }
  return started;
}

function portOf(server: Server): number {
  const address = server.address();
  if (address === null || typeof address === 'string') {
    throw memferryError('SYSTEM', 'the server for clients has no port');
  }
  return address.port;
}

async function begin({ heapMiB }: { heapMiB: number }): Promise<BegunGuest> {
  const started = await WorkerGuest.start({ module: { name: GUEST_NAME, url: MODULE } });
  const databaseBytes = heapMiB * 2 ** 20;
  const items = itemsOf(databaseBytes);
  for (const request of createLedger(items)) await started.request(request);
  await started.request({ op: 'fill', databaseBytes });
  const fillerRows = singleValue(await started.request(countOfFiller));
  guest = started;
  return { heapBytes: bytesOf(started), bulk: { items, fillerRows } };
}

function bytesOf(of: WorkerGuest): number {
  return of.regions.reduce((sum, { region }) => sum + region.refresh(), 0);
}

function intake({ bytesPerSecond }: IntakeCommand): void {
  listening?.limit({ bandwidth: bytesPerSecond, gatherLimit: bytesPerSecond });
}

async function sendAway(command: MigrateCommand): Promise<MigrationReport> {
  const { toPort, ...options } = command;
  const leaving = guest;
  if (!leaving) throw memferryError('INVALID_ARGUMENT', 'the guest is not here');
  const to = { host: '127.0.0.1', port: toPort };
  const migration = migrate(leaving, { to, secret, verify: true, ...options });
  migration.on('state', (state) => notify('state', state));
  const watching = (async () => {
    for await (const sample of migration.progress) notify('progress', sample);
  })();
  // From the moment it has departed its requests are refused by the guest itself; ours to forget it here.
  void migration.evicted.then(
    (report) => {
      if (guest === leaving) guest = null;
      notify('evicted', report);
    },
    () => {},
  );
  try {
    const report = await migration.done;
    if (guest === leaving) guest = null;
    return report;
  } finally {
    await watching.catch(() => {});
  }
}

async function takeIn(from: Listening): Promise<void> {
  for await (const arrival of from) {
    arrival.complete.then(
      (report) => notify('complete', report),
      (error: Error) => notify('failed', error.message),
    );
  }
}

function serveClient(socket: Socket): void {
  socket.on('error', () => {});
  receiveLines(socket, (message) => {
    const { number, request } = message as LineRequest;
    const here = guest;
    if (!here) {
      sendLine(socket, { number, elsewhere: true });
      return;
    }
    here.request(request).then(
      (value) => sendLine(socket, { number, value }),
      (error) => sendLine(socket, refusal(number, error)),
    );
  });
}

function refusal(number: number, error: unknown): LineReply {
  const { code, message } = error as { code?: string; message?: string };
  if (code === 'GUEST_MOVED') return { number, elsewhere: true };
  return { number, error: { code: code ?? 'ERROR', message: message ?? String(error) } };
}

async function close(): Promise<void> {
  clients?.close();
  await listening?.close();
  await Promise.all([guest?.terminate(), rehearsal?.terminate()]);
}
