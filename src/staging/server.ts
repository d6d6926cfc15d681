/**
 * `stage`: a VMD server, the memory of guests on their way and of parked ones. One port: control connections are
 * authenticated and answered here, stage connections by the native part. JavaScript thread.
 */
import { randomBytes } from 'node:crypto';
import { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { loadAddon } from '../addon.js';
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { ControlChannel } from '../control/channel.js';
import { HandshakeGate } from '../control/gate.js';
import { numericHost } from '../control/numeric-host.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError, native, nativeAsync } from '../errors.js';
import type { NativeStage, NativeStageConfig } from '../native.js';
import {
  formatAddress,
  parseGroup,
  type ResolvedStageOptions,
  resolveStageOptions,
  type StageOptions,
} from '../options.js';
import { lastingAbort, throwIfCancelled } from '../protocol/bounded.js';
import { type Announcement, stageRequest, type StageStatus } from '../protocol/stage-messages.js';
import { Announcer } from './announce.js';
import { type StageChannel, StageConnection } from './connection.js';
import { StagedImages } from './images.js';
import { StagedMembers } from './members.js';
import { spareBytes, systemMemory } from './system-memory.js';

/** A VMD server that runs in this process. */
export interface Staging extends AsyncDisposable {
  /** How it is called in reports and errors. */
  readonly name: string;
  /** As it was asked for. */
  readonly host: string;
  /** The port that it listens on, also where 0 was asked for. */
  readonly port: number;
  /** What it holds now, as `memferry status` says it. */
  status(): StageStatus;
  /** Lets an image go, whatever its phase; false when it is not here. `image`: 32 hex digits. */
  drop(image: string): boolean;
  /** Everything that it holds is gone; parks that are not committed stay at their sources. */
  close(): Promise<void>;
}

/** What the server stands on; tests have another one. */
export interface StageRuntime {
  readonly pageSize: number;
  createStage(config: NativeStageConfig): NativeStage;
  /** Throws when the port is taken. The preface of what `onControl` gets was read. */
  listen(
    address: { host: string; port: number },
    stage: NativeStage,
    onControl: (connection: Duplex) => void,
  ): { readonly port: number; close(): void };
}

/** Authenticated connections at a time: each costs buffers, and an announcement a second. */
const maxConnections = 1024;
const announceMs = 1000;
/** Of memory that others may take as well: below so much of it, how much there is is looked at so often. */
const littleBytes = 4 * 2 ** 30;
const littleLookMs = 200;

/**
 * Serves memory to migrations.
 * @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED, AUTH_FAILED (secret file), NO_MEMORY (more than the machine has; with
 *   `preallocate`, more than is left of it, or of a control group's limit), SYSTEM (the port is taken)
 */
export async function stage(options: StageOptions): Promise<Staging> {
  return stageOn(await addonRuntime(), options);
}

/** The same over another runtime. */
export async function stageOn(runtime: StageRuntime, options: StageOptions): Promise<Staging> {
  const resolved = resolveStageOptions(options);
  checkAddressPolicy(resolved.host, { plaintext: resolved.plaintext });
  const secret = await loadSecret(resolved, { loopback: isLoopback(resolved.host) });
  throwIfCancelled(resolved.signal);
  const { memoryBytes, bandwidth, popularShare, popularHalfLifeMs } = resolved;
  const numeric = await numericHost(resolved.host, 'stage.host', resolved.signal);
  mustFit(memoryBytes, resolved.preallocate);
  const nativeStage = native(() =>
    runtime.createStage({
      memoryBytes,
      bandwidth,
      popularShare: popularShare === 0 ? 0 : Math.round(1 / popularShare),
      popularPeriodMs: popularHalfLifeMs,
    }),
  );
  try {
    if (resolved.preallocate) await nativeAsync(() => nativeStage.preallocate());
    throwIfCancelled(resolved.signal);
    return new StageServer(runtime, resolved, numeric, secret, nativeStage);
  } catch (error) {
    nativeStage.close();
    throw error;
  }
}

/**
 * The kernel promises any memory, and kills who takes what is not there.
 * @throws NO_MEMORY
 */
function mustFit(memoryBytes: number, preallocate: boolean): void {
  const { mostBytes, availableBytes, group } = systemMemory();
  if (memoryBytes > mostBytes) {
    throw new MemferryError(
      'NO_MEMORY',
      `stage.memoryBytes: ${memoryBytes} bytes; this machine has ${mostBytes}, RAM and swap together`,
      { facts: { bytes: memoryBytes, limit: mostBytes } },
    );
  }
  if (memoryBytes <= availableBytes) return;
  if (!preallocate) {
    process.emitWarning(
      `stage.memoryBytes: ${memoryBytes} bytes; ${availableBytes} are available now, and no more than that is taken`,
      { code: 'MEMFERRY_STAGE_MEMORY' },
    );
    return;
  }
  const where = group === null ? 'are available' : `are left in the control group ${group}`;
  throw new MemferryError(
    'NO_MEMORY',
    `stage.preallocate: ${memoryBytes} bytes cannot be taken now, ${availableBytes} ${where}`,
    { facts: { bytes: memoryBytes, free: availableBytes, group } },
  );
}

class StageServer implements Staging {
  readonly name: string;
  readonly host: string;
  readonly port: number;
  readonly #listener: { readonly port: number; close(): void };
  readonly #images: StagedImages;
  readonly #members: StagedMembers;
  readonly #gate = new HandshakeGate();
  readonly #connections = new Map<StageChannel, StageConnection>();
  readonly #closing = lastingAbort();
  readonly #ticker: NodeJS.Timeout;
  #memoryLook: NodeJS.Timeout | null = null;
  readonly #announcer: Announcer | null;
  readonly #startedMs = performance.now();
  #connectionsEver = 0;
  #closed: Promise<void> | null = null;

  constructor(
    runtime: StageRuntime,
    private readonly options: ResolvedStageOptions,
    private readonly numeric: string,
    private readonly secret: Uint8Array,
    private readonly stage: NativeStage,
  ) {
    this.host = options.host;
    this.#listener = native(() =>
      runtime.listen({ host: numeric, port: options.port }, stage, (connection) => {
        this.#onControl(connection).catch(() => {
          // A stranger, or a peer that broke the rules: it was told, and there is nobody else to tell.
        });
      }),
    );
    this.port = this.#listener.port;
    this.name = options.name ?? formatAddress(options.host, this.port).slice(-64);
    this.#members = new StagedMembers(stage);
    this.#images = new StagedImages({ ...options, stage, pageSize: runtime.pageSize });
    this.#announcer = options.announce === null ? null : this.#makeAnnouncer(options.announce);
    // Not unreferenced: the native listener's thread is none that Node waits for, this timer stands for it.
    this.#ticker = setInterval(() => this.#announce(), announceMs);
    this.#watchMemory();
    this.#announcer?.announce(this.#announcement());
    options.signal?.addEventListener('abort', this.#onAbort, { once: true });
  }

  status(): StageStatus {
    const { connections, bytesIn, bytesOut, sharedPages, hintBytes, members, popularNames, popularPages } =
      this.stage.stats();
    return {
      ...this.#announcement(),
      maxImages: this.options.maxImages,
      connections,
      bytesIn,
      bytesOut,
      sharedPages,
      hintBytes,
      members,
      popularNames,
      popularPages,
      uptimeMs: performance.now() - this.#startedMs,
      held: this.#images.status(),
    };
  }

  drop(image: string): boolean {
    return this.#images.drop(image);
  }

  close(): Promise<void> {
    this.#closed ??= this.#close();
    return this.#closed;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  readonly #onAbort = (): void => void this.close();

  async #close(): Promise<void> {
    this.options.signal?.removeEventListener('abort', this.#onAbort);
    this.#closing.abort(new MemferryError('CANCELLED', 'the VMD server was closed'));
    this.#gate.close();
    clearInterval(this.#ticker);
    if (this.#memoryLook) clearTimeout(this.#memoryLook);
    this.#announcer?.close();
    // Sources of parks are refused while their connections can still carry it.
    this.#images.close();
    await Promise.all([...this.#connections.keys()].map((channel) => channel.close()));
    this.#listener.close();
    await this.#images.givenBack();
    this.stage.close();
  }

  async #onControl(connection: Duplex): Promise<void> {
    if (this.#closing.signal.aborted) {
      connection.destroy();
      return;
    }
    const session = await this.#gate.accept(connection, {
      secret: this.secret,
      signal: this.#closing.signal,
    });
    const channel: StageChannel = new ControlChannel(session, {
      incoming: stageRequest,
      maxBinaryBytes: this.options.maxStateBytes,
      admits: ({ type }) => (type === 'state' ? this.options.maxStateBytes : null),
      sink: (message, bytes) => peer.sink(message, bytes),
      peerTimeoutMs: this.options.peerTimeoutMs,
    });
    const peer = new StageConnection(
      ++this.#connectionsEver,
      channel,
      session.sessionKey,
      this.#images,
      this.#members,
      () => this.status(),
    );
    if (this.#connections.size >= maxConnections || this.#closing.signal.aborted) {
      await channel.close();
      return;
    }
    this.#connections.set(channel, peer);
    peer.announce(this.#announcement());
    try {
      await peer.serve();
      await channel.close();
    } catch (error) {
      channel.destroy(error instanceof MemferryError ? error : null);
    } finally {
      this.#connections.delete(channel);
    }
  }

  /**
   * The kernel kills who takes what is not there, and every page that is held here would be gone. So no more is taken than
   * the system has now, whatever was said at the start; a page for which there is nothing is refused, as by a full server.
   */
  #watchMemory(): void {
    if (this.options.preallocate) return;
    let soon = littleLookMs;
    try {
      const spare = spareBytes(systemMemory());
      this.stage.limitFresh(Math.min(spare, Number.MAX_SAFE_INTEGER));
      if (spare >= littleBytes) soon = announceMs;
    } catch {
      // It has no descriptor for that now. What it had to spare when it looked last still holds.
    }
    this.#memoryLook = setTimeout(() => this.#watchMemory(), soon).unref();
  }

  #announcement(): Announcement {
    const { memoryBytes, freeBytes } = this.stage.stats();
    const { rack, bandwidth } = this.options;
    const { identity, size: images } = this.#images;
    return { name: this.name, identity, rack, memoryBytes, freeBytes, bandwidth, images };
  }

  #announce(): void {
    const announcement = this.#announcement();
    for (const connection of this.#connections.values()) connection.announce(announcement);
    this.#announcer?.announce(announcement);
  }

  #makeAnnouncer(group: string): Announcer {
    return new Announcer({
      group: parseGroup(group),
      secret: this.secret,
      boot: randomBytes(8).toString('hex'),
      // Whoever hears it may not know the name, or another host by it.
      host: this.numeric,
      port: this.port,
    });
  }
}

async function addonRuntime(): Promise<StageRuntime> {
  const addon = loadAddon();
  return {
    pageSize: addon.pageSize,
    createStage: (config) => addon.createStage(config),
    listen({ host, port }, nativeStage, onControl) {
      const listener = addon.createListener(host, port, (fd) => {
        const socket = new Socket({ fd, readable: true, writable: true });
        socket.setNoDelay(true);
        onControl(socket);
      });
      listener.serveStage(nativeStage);
      return listener;
    },
  };
}
