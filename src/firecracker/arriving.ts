/**
 * A microVM as a guest that arrives: `unpark(ticket, { accept: microVmArrivals(host) })` restores its memory lazily from
 * the VMD, `listen({ accept: microVmArrivals(host) })` from a running migration.
 *
 * Firecracker makes its memory when it loads the execution state (its snapshot file), and tells of it by the socket.
 *
 *   parked      the state is there first: Firecracker loads it, its memory becomes a region of ours, pages arrive there
 *   migrating   the memory is on its way long before the state: it arrives in a region here; when the state comes,
 *               Firecracker loads it and is served from that region, which goes when everything has been brought over
 *
 * In both Firecracker loads paused, and runs only after the claim or the GRANT.
 */
import { z } from 'zod';
import { arrivalOver, restHere, stillArriving } from '../arrivals.js';
import { loadAddon } from '../addon.js';
import { type MemferryError, memferryError } from '../errors.js';
import { FdListener } from '../fd-channel.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { AcceptContext } from '../options.js';
import { callback, milliseconds, parse } from '../options/fields.js';
import { abortError, untilAborted } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import { Region } from '../region.js';
import { callOut } from '../tell-listeners.js';
import { Held } from './giving-up.js';
import { type Greeted, greet } from './greet.js';
import { asOneRegion, type GuestMapping } from './mappings.js';
import { attachMemory, MicroVm } from './micro-vm.js';

/** Who runs Firecracker here. */
export interface FirecrackerHost {
  /** Where Firecracker is to connect: `mem_backend.backend_path`. The file is made, and removed when it has. */
  socketPath: string;
  /** Permissions of the socket. Default 0o600. */
  mode?: number;
  /** From `load` until Firecracker has said where its memory is, in ms. Default 10 000. */
  connectTimeoutMs?: number;
  /**
   * Firecracker loads this state (its snapshot file's bytes) with the socket as its memory's backend, and stays paused.
   * The socket is there by then. Resolves when it is loaded; whoever rejects ends the arrival.
   */
  load(state: Uint8Array, context: { socketPath: string; signal: AbortSignal }): Promise<void>;
  /** It runs from here on. What it throws is a warning, and in the report: there is no way back. */
  resume(): Promise<void> | void;
  /**
   * It must never run, though it may have all of the guest: whoever started it ends it. Without this its process is killed,
   * if it has connected.
   */
  abandon?(): Promise<void> | void;
  /** Told once Firecracker is connected. As `onMicroVm` where it throws. */
  onConnected?(pid: number): void;
  /** Told of a connection that made no sense; Firecracker is waited for on. What it throws is a warning of the process. */
  onRefused?(error: MemferryError, peer: { pid: number; uid: number }): void;
  /**
   * Of a migration: its memory comes by way of this process, which may not end before `microVm.ended` has settled, also
   * when the arrival is complete. Throwing ends the arrival, and the guest stays at the source; it is not awaited, and what
   * it rejects with is a warning of the process.
   */
  onMicroVm?(microVm: MicroVm): void;
}

/**
 * Takes microVMs: for `unpark({ accept })`, which restores one lazily from the VMD, and for `listen({ accept })`,
 * which takes a running one. What it gives throws MODULE_REFUSED for a guest that is no microVM.
 * @throws INVALID_ARGUMENT
 */
export function microVmArrivals(
  host: FirecrackerHost,
): (offer: GuestOffer, context: AcceptContext) => Promise<ArrivingGuest> {
  checkHost(host);
  return async (offer, context) => {
    const [memory] = offer.regions;
    if (offer.module || offer.regions.length !== 1 || !memory) {
      throw memferryError(
        'MODULE_REFUSED',
        `guest '${offer.name}' is no microVM: one region of memory, and no module`,
      );
    }
    const { state } = context;
    return state ? attached(host, memory.lengthBytes, state, context) : throughHere(host, memory.lengthBytes);
  };
}

const hostShape = {
  socketPath: z.string('expected the path of a socket').min(1, 'expected the path of a socket'),
  mode: z.int().min(0).max(0o777).optional(),
  connectTimeoutMs: milliseconds.optional(),
  load: callback(),
  resume: callback(),
  abandon: callback().optional(),
  onConnected: callback().optional(),
  onMicroVm: callback().optional(),
  onRefused: callback().optional(),
};

/** An object of a class may have more than what is asked of it; in a literal that is a mistake. */
function checkHost(host: FirecrackerHost): void {
  const literal = host && Object.getPrototypeOf(Object(host)) === Object.prototype;
  parse(literal ? z.strictObject(hostShape) : z.looseObject(hostShape), host, 'microVmArrivals');
}

/** It has not thrown; what comes of it later ends nothing. */
function tell(what: string, given: unknown): void {
  callOut({ what, code: 'MEMFERRY_FIRECRACKER_THREW' }, () => given);
}

/** The state is there: the pages go straight into Firecracker's memory. */
async function attached(
  host: FirecrackerHost,
  lengthBytes: number,
  state: Uint8Array,
  { signal }: AcceptContext,
): Promise<ArrivingGuest> {
  const held = new Held();
  let loaded: Loaded;
  try {
    loaded = await loadInto(host, state, signal, held);
  } catch (error) {
    await abandoned(host, held);
    throw error;
  }
  const { greeted, loading } = loaded;
  const { pageSize } = greeted.handshake.memory;
  let region: Region;
  try {
    if (pageSize !== loadAddon().pageSize) {
      throw memferryError(
        'INVALID_ARGUMENT',
        `a parked microVM of pages of ${pageSize} bytes: load it without huge_pages`,
      );
    }
    const { pidfd } = greeted.connection.peer;
    if (pidfd === null) throw memferryError('OWNER_GONE', 'Firecracker has ended');
    region = attachMemory(pidfd, greeted.handshake, lengthBytes);
    // The region has descriptors of its own.
    greeted.discard();
  } catch (error) {
    greeted.discard();
    await abandoned(host, held);
    throw error;
  }
  let running: Promise<void> | undefined;
  return {
    regions: [region],
    // Its device state touches guest memory, which the arrival serves by now.
    prepare: () => loading,
    resume: () => {
      held.release();
      running = resumed(host);
    },
    get running() {
      return running;
    },
    abandon: async () => {
      try {
        region.close();
      } finally {
        await held.giveUp(host);
      }
    },
  };
}

/** The memory is on its way before there is a Firecracker for it. */
function throughHere(host: FirecrackerHost, lengthBytes: number): ArrivingGuest {
  const region = Region.allocate({ lengthBytes });
  const held = new Held();
  let microVm: MicroVm | null = null;
  let running: Promise<void> | undefined;
  const close = () => {
    microVm?.close();
    if (!region.closed) region.close();
  };
  return {
    regions: [region],
    async prepare(state, { signal }) {
      const { greeted, loading } = await loadInto(host, state, signal, held);
      let mappings: GuestMapping[];
      try {
        mappings = asOneRegion(greeted.handshake.memory, lengthBytes);
      } catch (error) {
        greeted.discard();
        throw error;
      }
      // The descriptors are its own from here on, also when it throws; what fails later ends in `abandon`.
      microVm = new MicroVm(
        greeted.connection,
        greeted.handshake,
        { region },
        { prePaging: 'all', mappings },
      );
      tell('onMicroVm', host.onMicroVm?.(microVm));
      await untilAborted(loading, signal);
    },
    resume() {
      held.release();
      const served = microVm as MicroVm;
      // What it was marked with settles when the last page is here, or never will be.
      const arrived = Promise.all(stillArriving([region]));
      // With pages lost too: looking for more of them would go on for as long as it lives, and nobody would tell of those
      // that it does not touch.
      void restHere(region).then(() => served.sourceComplete());
      // With pages lost the others are served from here for as long as it lives.
      Promise.all([arrived, served.ended])
        .catch(() => served.closed)
        // Its pages are still compared with the source's.
        .then(() => arrivalOver(region))
        .then(close)
        .catch((error) => {
          process.emitWarning(`the memory that the microVM was served from is still held: ${String(error)}`, {
            code: 'MEMFERRY_CLOSE_FAILED',
          });
        });
      running = resumed(host);
    },
    get running() {
      return running;
    },
    async abandon() {
      try {
        close();
      } finally {
        await held.giveUp(host);
      }
    },
  };
}

/** Why the arrival has failed is what matters, not that this fails too. */
async function abandoned(host: FirecrackerHost, held: Held): Promise<void> {
  try {
    await held.giveUp(host);
  } catch (error) {
    process.emitWarning(`the microVM was given up, and could not be ended: ${String(error)}`, {
      code: 'MEMFERRY_ABANDON_THREW',
    });
  }
}

interface Loaded {
  greeted: Greeted;
  loading: Promise<void>;
}

/** Listens, has Firecracker load the state, and waits until it says where its memory is; it is held then. */
async function loadInto(
  host: FirecrackerHost,
  state: Uint8Array,
  signal: AbortSignal,
  held: Held,
): Promise<Loaded> {
  if (signal.aborted) throw abortError(signal);
  const connected = deferred<Greeted>();
  connected.promise.catch(() => {});
  let refusals = 0;
  let lastRefusal: MemferryError | null = null;
  // Anybody may connect who may open the socket: what a stranger says wrong is not Firecracker's doing.
  const refused = (error: MemferryError, peer: { pid: number; uid: number }) => {
    if (connected.settled) return;
    refusals += 1;
    lastRefusal = error;
    callOut({ what: 'onRefused', code: 'MEMFERRY_FIRECRACKER_THREW' }, () => host.onRefused?.(error, peer));
  };
  const listener = new FdListener(host.socketPath, {
    mode: host.mode ?? 0o600,
    mostConnections: 4,
    onConnection: (connection) => {
      greet(connection, host.connectTimeoutMs ?? 10_000).then(
        (greeted) => {
          // Whoever comes second, or when nobody waits any more, has nothing to wait for here.
          if (connected.settled) greeted?.discard();
          else if (greeted) connected.resolve(greeted);
        },
        (error) => refused(error, connection.peer),
      );
    },
    // Nobody is accepted any more.
    onError: (error) => connected.reject(error),
  });
  const late = () => {
    const why = lastRefusal
      ? `; ${refusals} connections made no sense, the last: ${lastRefusal.message}`
      : '';
    const options = lastRefusal ? { cause: lastRefusal } : {};
    connected.reject(
      memferryError('CONNECT_FAILED', `no Firecracker came to ${host.socketPath}${why}`, options),
    );
  };
  const timer = setTimeout(late, host.connectTimeoutMs ?? 10_000);
  const stop = () =>
    connected.reject(memferryError('CANCELLED', 'the arrival was ended', { cause: signal.reason }));
  signal.addEventListener('abort', stop, { once: true });
  const loading = Promise.resolve()
    .then(() => host.load(state, { socketPath: host.socketPath, signal }))
    .catch((cause) => {
      throw memferryError(
        'PREPARE_FAILED',
        `Firecracker did not load the snapshot: ${(cause as Error).message}`,
        {
          cause,
        },
      );
    });
  loading.catch((error: MemferryError) => connected.reject(error));
  try {
    const greeted = await connected.promise;
    try {
      held.take(greeted);
      tell('onConnected', host.onConnected?.(greeted.connection.peer.pid));
    } catch (error) {
      greeted.discard();
      throw error;
    }
    return { greeted, loading };
  } finally {
    clearTimeout(timer);
    signal.removeEventListener('abort', stop);
    listener.close();
  }
}

async function resumed(host: FirecrackerHost): Promise<void> {
  try {
    await host.resume();
  } catch (cause) {
    const error = memferryError(
      'RESUME_FAILED',
      `the microVM was granted, and did not resume: ${(cause as Error).message}. It is here and nowhere else, paused`,
      { cause },
    );
    process.emitWarning(error.message, { code: 'MEMFERRY_RESUME_THREW' });
    throw error;
  }
}
