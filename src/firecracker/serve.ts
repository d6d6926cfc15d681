/**
 * A page-fault handler for Firecracker: `serveSnapshot` listens at a unix socket, and serves the memory of each microVM
 * that loads a snapshot with `"mem_backend": {"backend_type": "Uffd", "backend_path": SOCKET}` from a snapshot's memory
 * file. JavaScript thread; pages never come here.
 */
import { statSync } from 'node:fs';
import { z } from 'zod';
import { MemferryError, memferryError } from '../errors.js';
import { type FdConnection, FdListener } from '../fd-channel.js';
import { callback, parse, type Same } from '../options/fields.js';
import { greet } from './greet.js';
import { checkWithin } from './mappings.js';
import { callOut } from '../tell-listeners.js';
import { MicroVm, type PrePaging } from './micro-vm.js';

/** What `serveSnapshot` takes. */
export interface ServeSnapshotOptions {
  /** Where Firecracker connects; the file is made, and removed at the end. */
  socketPath: string;
  /** The snapshot's memory file. It must not change while it is served. */
  snapshot: string;
  /** Default `sequential`. */
  prePaging?: PrePaging;
  /** Permissions of the socket. Default 0o600: whoever may connect is given the snapshot. */
  mode?: number;
  /** MicroVMs served at once; one more is refused, and `onRefused` told. Default 256. */
  mostMicroVms?: number;
  /** How long a connection may take to say what it wants, in ms. Default 10 000. */
  handshakeTimeoutMs?: number;
  /** Told of each microVM when it is served. What it throws is a warning of the process. */
  onMicroVm?: (microVm: MicroVm) => void;
  /**
   * A connection that made no sense, or whose memory cannot be served; the others go on. What it throws is a warning.
   */
  onRefused?: (error: MemferryError, peer: { pid: number; uid: number }) => void;
}

/** Connections that have not said what they want. */
const mostGreeting = 64;

const schema = z.strictObject({
  socketPath: z.string().min(1),
  snapshot: z.string().min(1),
  prePaging: z.enum(['none', 'sequential', 'all']).default('sequential'),
  mode: z.int().min(0).max(0o777).default(0o600),
  mostMicroVms: z.int().min(1).max(1024).default(256),
  handshakeTimeoutMs: z.number().positive().max(3_600_000).default(10_000),
  onMicroVm: callback<[microVm: MicroVm]>().optional(),
  onRefused: callback<[error: MemferryError, peer: { pid: number; uid: number }]>().optional(),
});
true satisfies Same<z.input<typeof schema>, ServeSnapshotOptions>;

/** A page-fault handler that listens. */
export interface SnapshotServer extends AsyncDisposable {
  /** As it was asked for. */
  readonly socketPath: string;
  /** Those that are served now. */
  readonly microVms: ReadonlySet<MicroVm>;
  /** Listens no more, and lets go of every microVM. Twice is fine. */
  close(): Promise<void>;
}

/**
 * Serves the memory of each microVM that loads a snapshot with this socket as its backend (`"backend_type": "Uffd"`), from
 * the snapshot's memory file.
 * @throws INVALID_ARGUMENT, SYSTEM (no such file, or the socket's path is in use)
 */
export async function serveSnapshot(options: ServeSnapshotOptions): Promise<SnapshotServer> {
  const { socketPath, snapshot, prePaging, mode, mostMicroVms, handshakeTimeoutMs, onMicroVm, onRefused } =
    parse(schema, options, 'serveSnapshot');
  snapshotBytes(snapshot);
  const microVms = new Set<MicroVm>();
  const greeting = new Set<FdConnection>();
  let closed = false;

  const code = 'MEMFERRY_FIRECRACKER_THREW';
  const refused = (error: MemferryError, peer: { pid: number; uid: number }) =>
    callOut({ what: 'onRefused', code }, onRefused, error, peer);
  const serve = async (connection: FdConnection) => {
    greeting.add(connection);
    const { pid, uid } = connection.peer;
    try {
      const greeted = await greet(connection, handshakeTimeoutMs);
      if (greeted === null) return;
      if (closed) return greeted.discard();
      const { handshake } = greeted;
      try {
        if (microVms.size >= mostMicroVms)
          throw memferryError('LIMIT_EXCEEDED', `${microVms.size} microVMs are served already`);
        checkWithin(handshake.memory, snapshotBytes(snapshot));
      } catch (error) {
        greeted.discard();
        throw error;
      }
      const microVm = new MicroVm(connection, handshake, { path: snapshot }, { prePaging });
      microVms.add(microVm);
      microVm.closed.then(() => microVms.delete(microVm));
      callOut({ what: 'onMicroVm', code }, onMicroVm, microVm);
    } catch (error) {
      if (!closed) refused(error as MemferryError, { pid, uid });
    } finally {
      greeting.delete(connection);
    }
  };
  const listener = new FdListener(socketPath, {
    mode,
    // More, so that whoever is one too many hears of it.
    mostConnections: mostMicroVms + mostGreeting,
    onConnection: (connection) => void serve(connection),
    onError: (error) => refused(error, { pid: 0, uid: 0 }),
  });
  const close = async () => {
    closed = true;
    listener.close();
    for (const connection of greeting) connection.close();
    for (const microVm of microVms) microVm.close();
  };
  return { socketPath, microVms, close, [Symbol.asyncDispose]: close };
}

function snapshotBytes(path: string): number {
  try {
    const info = statSync(path);
    if (info.isFile() && info.size > 0) return info.size;
  } catch (cause) {
    throw memferryError('SYSTEM', `the snapshot cannot be read: ${(cause as Error).message}`, { cause });
  }
  throw new MemferryError('INVALID_ARGUMENT', `${path} is no file with a snapshot`);
}
