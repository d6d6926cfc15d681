/**
 * QEMU's own migration stream, out of it and into it, over a unix socket in a directory that only this user enters.
 * With `x-ignore-shared` it holds the state of CPUs and devices and the little RAM that is in no backend (firmware,
 * ACPI tables, video memory), and no more than `maxBytes` are taken of it.
 */
import { chown, mkdtemp, rm } from 'node:fs/promises';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import { type MemferryError, memferryError } from '../errors.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import { checked } from './inspect.js';
import type { Qmp, QmpEvent } from './qmp.js';

export interface StateBounds {
  timeoutMs: number;
  signal: AbortSignal;
}

export interface OutgoingOptions {
  maxBytes: number;
  /** Under which QEMU runs, so that it may enter the directory. */
  uid: number;
}

export interface OutgoingState {
  /**
   * The state of the guest, which is stopped, in pieces. When it fails QEMU migrates no more. Once.
   * @throws LIMIT_EXCEEDED when there is more of it, QEMU_REFUSED, PAUSE_FAILED with QEMU's reason, CANCELLED
   */
  save(bounds: StateBounds): Promise<Buffer[]>;
  close(): Promise<void>;
}

export interface IncomingState {
  /**
   * It touches RAM: whoever serves its pages must do so by now. Once.
   * @throws PREPARE_FAILED with QEMU's reason, QEMU_REFUSED, CANCELLED
   */
  load(state: Uint8Array, bounds: StateBounds): Promise<void>;
  close(): Promise<void>;
}

const over = ['completed', 'failed', 'cancelled'];
const capabilitiesSchema = z.array(z.object({ capability: z.string(), state: z.boolean() }));
const parametersSchema = z.object({ 'max-bandwidth': z.number().nonnegative() });
const migrationSchema = z.object({ status: z.string().optional(), 'error-desc': z.string().optional() });

/** Those that would make the stream another one. */
const inTheWay = [
  'multifd',
  'postcopy-ram',
  'xbzrle',
  'compress',
  'auto-converge',
  'block',
  'pause-before-switchover',
  'background-snapshot',
  'mapped-ram',
  'return-path',
  'x-colo',
];
const bytesPerSecond = 2 ** 40;

/** What QEMU's migration was set to, to set it back. */
export interface Settings {
  capabilities: { capability: string; state: boolean }[];
  maxBandwidth: number | null;
}

/**
 * Has QEMU's next migration leave the shared RAM out. Gives what to restore.
 * @throws GUEST_UNMOVABLE when this QEMU cannot
 */
export async function ignoreSharedRam(qmp: Qmp, wanted: readonly string[]): Promise<Settings> {
  const [capabilities, values] = await Promise.all([
    qmp.execute('query-migrate-capabilities'),
    qmp.execute('query-migrate-parameters'),
  ]);
  const known = checked('query-migrate-capabilities', capabilitiesSchema, capabilities);
  const parameters = checked('query-migrate-parameters', parametersSchema, values);
  const states = new Map(known.map(({ capability, state }) => [capability, state]));
  const lacking = wanted.filter((capability) => !states.has(capability));
  if (lacking.length > 0) {
    throw memferryError(
      'GUEST_UNMOVABLE',
      `QEMU ${qmp.version} has no migration capability ${lacking.join(', ')}`,
      {
        facts: { names: lacking },
      },
    );
  }
  const changes = [
    ...inTheWay
      .filter((capability) => states.get(capability))
      .map((capability) => ({ capability, state: false })),
    ...wanted
      .filter((capability) => !states.get(capability))
      .map((capability) => ({ capability, state: true })),
  ];
  const before: Settings = {
    capabilities: changes.map(({ capability, state }) => ({ capability, state: !state })),
    maxBandwidth: parameters['max-bandwidth'],
  };
  try {
    if (changes.length > 0) await qmp.execute('migrate-set-capabilities', { capabilities: changes });
    await qmp.execute('migrate-set-parameters', { 'max-bandwidth': bytesPerSecond });
  } catch (error) {
    await restoreSettings(qmp, before).catch(() => {});
    throw error;
  }
  return before;
}

export async function restoreSettings(qmp: Qmp, { capabilities, maxBandwidth }: Settings): Promise<void> {
  if (capabilities.length > 0) await qmp.execute('migrate-set-capabilities', { capabilities });
  if (maxBandwidth !== null) await qmp.execute('migrate-set-parameters', { 'max-bandwidth': maxBandwidth });
}

/**
 * Waits for the state of a guest that is still to be stopped: what takes time is done before that.
 * @throws SYSTEM
 */
export async function expectDeviceState(qmp: Qmp, options: OutgoingOptions): Promise<OutgoingState> {
  const place = await makePlace(options.uid);
  let incoming: Awaited<ReturnType<typeof receiveOne>>;
  try {
    incoming = await receiveOne(place.path, options.maxBytes);
  } catch (error) {
    await place.remove();
    throw error;
  }
  return {
    async save(bounds) {
      const ended = qmp.event(isOver, "the end of QEMU's own migration", bounds);
      ended.catch(() => {});
      try {
        await qmp.execute('migrate', { uri: `unix:${place.path}` }, bounds);
        const state = bounded(incoming.state, bounds);
        state.catch(() => {});
        // What is too much ends it before QEMU does.
        const event = await Promise.race([ended, state.then(() => ended)]);
        if (event.data['status'] !== 'completed') throw await failureOf(qmp, 'PAUSE_FAILED');
        return await state;
      } catch (error) {
        // A QEMU that comes to it only later finds nobody to send to, and its guest untouched.
        incoming.close();
        await stopMigrating(qmp).catch(() => {}); // why it has failed is what matters
        throw error;
      }
    },
    async close() {
      incoming.close();
      await place.remove();
    },
  };
}

/**
 * Where a QEMU that was started with `-incoming defer` will get the state of its guest.
 * @throws SYSTEM
 */
export async function placeForDeviceState(qmp: Qmp, uid: number): Promise<IncomingState> {
  const place = await makePlace(uid);
  return {
    async load(state, loading) {
      const ended = qmp.event(isOver, "the end of QEMU's incoming migration", loading);
      ended.catch(() => {});
      // Not before: a QEMU takes this once, and stays of use to another migration until then.
      await qmp.execute('migrate-incoming', { uri: `unix:${place.path}` }, loading);
      const socket = createConnection({ path: place.path });
      try {
        const broken = deferred<never>();
        socket.once('error', (cause) =>
          broken.reject(
            memferryError('PREPARE_FAILED', `QEMU does not take its state: ${cause.message}`, { cause }),
          ),
        );
        socket.end(state);
        // A QEMU that does not like its state says so by an event, and ends by itself.
        const event = await Promise.race([ended, untilAborted(broken.promise, loading.signal)]).catch(
          async (error) => {
            throw (await Promise.race([qmp.closed, soon()]))
              ? memferryError('PREPARE_FAILED', refusal, { cause: error })
              : error;
          },
        );
        if (event.data['status'] !== 'completed') throw await failureOf(qmp, 'PREPARE_FAILED');
      } finally {
        socket.destroy();
      }
    },
    close: place.remove,
  };
}

const refusal =
  'QEMU has ended while it loaded the state: it was started otherwise than the source, its own messages say how';

/** What QEMU has said of it last, after a failure that came before its reason. */
const soon = () => new Promise<null>((resolve) => setTimeout(resolve, 200, null));

function isOver({ name, data }: QmpEvent): boolean {
  return name === 'MIGRATION' && over.includes(String(data['status']));
}

async function failureOf(qmp: Qmp, code: 'PAUSE_FAILED' | 'PREPARE_FAILED'): Promise<MemferryError> {
  const said = await qmp.execute('query-migrate').then(
    (value) => migrationSchema.safeParse(value).data,
    () => undefined,
  );
  return memferryError(
    code,
    `QEMU's own migration ${said?.status ?? 'failed'}: ${said?.['error-desc'] ?? 'no reason given'}`,
  );
}

/** The guest may go on when this has returned. */
export async function stopMigrating(qmp: Qmp): Promise<void> {
  const read = async () =>
    checked('query-migrate', migrationSchema, await qmp.execute('query-migrate')).status ?? 'none';
  if (['none', ...over].includes(await read())) return;
  await qmp.execute('migrate_cancel');
  // Bounded: QEMU gives up what it sends within some milliseconds, since nobody reads it any more.
  for (let turn = 0; turn < 200; turn++) {
    if (['none', ...over].includes(await read())) return;
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  throw memferryError('PAUSE_FAILED', 'QEMU does not give up its own migration');
}

async function bounded<T>(promise: Promise<T>, { signal, timeoutMs }: StateBounds): Promise<T> {
  return within(
    untilAborted(promise, signal),
    timeoutMs,
    'PAUSE_TIMEOUT',
    "QEMU's state did not come in time",
  );
}

/** One connection, read to its end. */
async function receiveOne(
  path: string,
  maxBytes: number,
): Promise<{ state: Promise<Buffer[]>; close(): void }> {
  const state = deferred<Buffer[]>();
  const sockets = new Set<Socket>();
  const server: Server = createServer((socket) => {
    // Who comes second is not QEMU's migration.
    if (sockets.size > 0) {
      socket.destroy();
      return;
    }
    sockets.add(socket);
    const pieces: Buffer[] = [];
    let held = 0;
    socket.on('data', (piece) => {
      held += piece.length;
      if (held > maxBytes) {
        state.reject(
          memferryError(
            'LIMIT_EXCEEDED',
            `QEMU's state has more than ${maxBytes} bytes: it seems to send RAM that should be in a shared backend`,
            { facts: { maxBytes } },
          ),
        );
        socket.destroy();
        return;
      }
      pieces.push(piece);
    });
    socket.once('end', () => state.resolve(pieces));
    socket.once('error', (cause) => state.reject(memferryError('PAUSE_FAILED', cause.message, { cause })));
  });
  const listening = deferred<void>();
  server.once('error', (cause) => listening.reject(memferryError('SYSTEM', cause.message, { cause })));
  server.listen({ path, writableAll: true }, () => listening.resolve());
  await listening.promise;
  return {
    state: state.promise,
    close: () => {
      server.close();
      for (const socket of sockets) socket.destroy();
    },
  };
}

/** A path for a socket, in a directory of its own (mode 0700, QEMU's user's when that is another). */
async function makePlace(uid: number): Promise<{ path: string; remove(): Promise<void> }> {
  const directory = await mkdtemp(join(tmpdir(), 'memferry-qemu-state-'));
  const remove = () => rm(directory, { recursive: true, force: true });
  try {
    if (uid !== process.getuid?.()) await chown(directory, uid, -1);
  } catch (error) {
    await remove();
    throw error;
  }
  return { path: join(directory, 'state'), remove };
}

/** The same for as long as `use` takes. */
export async function withSocket<T>(uid: number, use: (path: string) => Promise<T>): Promise<T> {
  const place = await makePlace(uid);
  try {
    return await use(place.path);
  } finally {
    await place.remove();
  }
}
