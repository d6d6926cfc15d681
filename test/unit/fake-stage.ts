/** A VMD server without its native part: what holds pages is counted, nothing is moved. */
import { randomBytes } from 'node:crypto';
import { createServer, type Socket } from 'node:net';
import type { NativeHeldState, NativeImageStats, NativeStage, NativeStageStats } from '../../src/native.js';
import type { StageOptions } from '../../src/options.js';
import type { StageRuntime } from '../../src/staging/server.js';
import { type Staging, stageOn } from '../../src/staging/server.js';
import type { ImageSetConnection } from '../../src/staging/image-member.js';
import { StageClient } from '../../src/staging/client.js';
import { createImage, type NewImage } from '../../src/staging/image-opening.js';
import type { ImageSet } from '../../src/staging/image-set.js';
import { readPreface } from './control-pair.js';

interface FakeImage {
  regionPages: number[];
  ordinal: number;
  domainKey: Uint8Array | null;
  sessions: Map<number, { roles: number; tokens: Uint8Array }>;
  chains: Map<number, { host: string; port: number; tokens: Uint8Array }>;
  state: FakeState | null;
  sealed: boolean;
  whole: boolean;
}

interface FakeMember {
  domainKey: Uint8Array;
  guest: Uint8Array | null;
  roles: number;
  tokens: Uint8Array;
}

const indexBytesPerPage = 16;

interface FakeState {
  bytes: Uint8Array;
  owners: number;
}

function keep(states: Set<FakeState>, state: FakeState): void {
  state.owners++;
  states.add(state);
}

function letGo(states: Set<FakeState>, state: FakeState): void {
  if (--state.owners === 0) states.delete(state);
}

class FakeHeldState implements NativeHeldState {
  constructor(
    private readonly states: Set<FakeState>,
    public state: FakeState | null,
  ) {
    if (state) keep(states, state);
  }

  size(): number {
    return this.state?.bytes.length ?? 0;
  }

  write(at: number, bytes: Uint8Array): void {
    this.state?.bytes.set(bytes, at);
  }

  read(at: number, length: number): Uint8Array {
    if (!this.state) throw new RangeError('a state that was released');
    return this.state.bytes.slice(at, at + length);
  }

  release(): void {
    if (this.state) letGo(this.states, this.state);
    this.state = null;
  }
}

export class FakeStage implements NativeStage {
  readonly images = new Map<string, FakeImage>();
  readonly dropped: string[] = [];
  closed = false;

  constructor(readonly memoryBytes: number) {}

  async preallocate(): Promise<void> {}

  limitFresh(): void {}

  readonly #identity = randomBytes(8).toString('hex');

  identity(): string {
    return this.#identity;
  }

  createImage(
    image: Uint8Array,
    regionPages: number[],
    ordinal: number,
    domainKey: Uint8Array | null,
  ): boolean {
    const id = hexOf(image);
    if (this.images.has(id)) throw new RangeError('the id is taken');
    const index = regionPages.reduce((sum, pages) => sum + pages, 0) * indexBytesPerPage;
    if (index > this.stats().freeBytes) return false;
    this.images.set(id, {
      regionPages,
      ordinal,
      domainKey,
      sessions: new Map(),
      chains: new Map(),
      state: null,
      sealed: false,
      whole: false,
    });
    return true;
  }

  readonly members = new Map<string, FakeMember>();

  join(member: Uint8Array, domainKey: Uint8Array, guest: Uint8Array | null): boolean {
    const id = hexOf(member);
    if (this.images.has(id) || this.members.has(id)) throw new RangeError('the id is taken');
    this.members.set(id, { domainKey, guest, roles: 0, tokens: new Uint8Array() });
    return true;
  }

  addSession(image: Uint8Array, session: number, roles: number, tokens: Uint8Array): boolean {
    const member = this.members.get(hexOf(image));
    if (member) return Object.assign(member, { roles, tokens }) !== undefined;
    return this.images.get(hexOf(image))?.sessions.set(session, { roles, tokens }) !== undefined;
  }

  removeSession(image: Uint8Array, session: number): boolean {
    return this.images.get(hexOf(image))?.sessions.delete(session) ?? false;
  }

  setChain(image: Uint8Array, ordinal: number, host: string, port: number, tokens: Uint8Array): boolean {
    return this.images.get(hexOf(image))?.chains.set(ordinal, { host, port, tokens }) !== undefined;
  }

  /** States that an image or a handle has. */
  readonly states = new Set<FakeState>();

  makeState(bytes: number): NativeHeldState | null {
    if (bytes > this.stats().freeBytes) return null;
    return new FakeHeldState(this.states, { bytes: new Uint8Array(bytes), owners: 0 });
  }

  putState(image: Uint8Array, { state }: FakeHeldState): boolean {
    const entry = this.images.get(hexOf(image));
    if (!entry || !state) return false;
    keep(this.states, state);
    if (entry.state) letGo(this.states, entry.state);
    entry.state = state;
    return true;
  }

  state(image: Uint8Array): NativeHeldState | null {
    const state = this.images.get(hexOf(image))?.state;
    return state ? new FakeHeldState(this.states, state) : null;
  }

  seal(image: Uint8Array): boolean {
    const entry = this.images.get(hexOf(image));
    if (entry) entry.sealed = true;
    return entry !== undefined;
  }

  /** Until then the memory of what is dropped is not given back. */
  dropping: Promise<void> = Promise.resolve();

  drop(image: Uint8Array): Promise<void> | null {
    if (this.closed) throw new Error('the stage is closed');
    this.dropped.push(hexOf(image));
    const state = this.images.get(hexOf(image))?.state;
    if (state) letGo(this.states, state);
    const there = this.images.delete(hexOf(image)) || this.members.delete(hexOf(image));
    return there ? this.dropping : null;
  }

  image(image: Uint8Array): NativeImageStats | null {
    const entry = this.images.get(hexOf(image));
    if (!entry) return null;
    const bytes = indexBytesOf(entry) + (entry.state?.bytes.length ?? 0);
    return { ...nothing, bytes, sealed: entry.sealed };
  }

  whole(image: Uint8Array): boolean | null {
    return this.images.get(hexOf(image))?.whole ?? null;
  }

  stats(): NativeStageStats {
    const indices = [...this.images.values()].reduce((sum, entry) => sum + indexBytesOf(entry), 0);
    const used = [...this.states].reduce((sum, { bytes }) => sum + bytes.length, indices);
    const { memoryBytes } = this;
    const { bytesIn, bytesOut } = nothing;
    return {
      memoryBytes,
      slabBytes: memoryBytes,
      freeBytes: memoryBytes - used,
      images: this.images.size,
      connections: 0,
      bytesIn,
      bytesOut,
      sharedPages: 0,
      hintBytes: 0,
      members: this.members.size,
      popularNames: 0,
      popularPages: 0,
    };
  }

  close(): void {
    this.closed = true;
  }
}

const nothing: NativeImageStats = {
  pagesHeld: 0,
  pagesShared: 0,
  pagesZero: 0,
  pagesKnown: 0,
  bytes: 0,
  bytesIn: 0,
  bytesOut: 0,
  sealed: false,
};

function indexBytesOf({ regionPages }: FakeImage): number {
  return regionPages.reduce((sum, pages) => sum + pages, 0) * indexBytesPerPage;
}

function hexOf(image: Uint8Array): string {
  return Buffer.from(image).toString('hex');
}

export const secret = 'the secret of a whole VMD';

/** One server over loopback. `cut` breaks its connections. */
export class FakeServer {
  native!: FakeStage;
  staging!: Staging;
  readonly #sockets = new Set<Socket>();
  /** Connections in all. */
  accepted = 0;

  private constructor(private readonly options: Partial<StageOptions>) {}

  static async start(options: Partial<StageOptions> = {}): Promise<FakeServer> {
    const server = new FakeServer(options);
    await server.#start(options.port ?? 0);
    return server;
  }

  get address(): { host: string; port: number } {
    return { host: '127.0.0.1', port: this.staging.port };
  }

  /** Breaks every connection; resolves when the server has noticed. */
  async cut(): Promise<void> {
    const closed = [...this.#sockets].map((socket) => {
      socket.destroy();
      return new Promise((resolve) => socket.once('close', resolve));
    });
    await Promise.all(closed);
  }

  /** As after a crash: the same address, and nothing of what was there. */
  async restart(): Promise<void> {
    const { port } = this.staging;
    await this.cut();
    await this.staging.close();
    await this.#start(port);
  }

  async close(): Promise<void> {
    await this.staging.close();
  }

  async #start(port: number): Promise<void> {
    // A real port is known only when it listens, and `listen` of a runtime answers at once.
    const server = createServer();
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve));
    const bound = (server.address() as { port: number }).port;
    const runtime: StageRuntime = {
      pageSize: 4096,
      createStage: ({ memoryBytes }) => {
        this.native = new FakeStage(memoryBytes);
        return this.native;
      },
      listen: (_address, _stage, onControl) => {
        server.on('connection', (socket) => {
          this.accepted++;
          socket.setNoDelay(true);
          this.#sockets.add(socket);
          socket.on('error', () => {});
          socket.on('close', () => this.#sockets.delete(socket));
          readPreface(socket).then(
            () => onControl(socket),
            () => socket.destroy(),
          );
        });
        return { port: bound, close: () => server.close() };
      },
    };
    this.staging = await stageOn(runtime, { memoryBytes: 64 * 2 ** 20, secret, ...this.options });
  }
}

export function connection(more: Partial<ImageSetConnection> = {}): ImageSetConnection {
  return { secret: Buffer.from(secret), requestTimeoutMs: 15_000, recoverTimeoutMs: 15_000, ...more };
}

/** An image at these servers, or the first one's refusal. */
export async function makeImage(
  servers: readonly { host: string; port: number }[],
  link: ImageSetConnection,
  made: NewImage,
): Promise<ImageSet> {
  const clients = await Promise.all(servers.map((address) => StageClient.dial({ ...link, ...address })));
  await Promise.all(clients.map((client) => client.firstAnnouncement()));
  const images = await createImage(clients, [], link, made);
  if (!Array.isArray(images)) return images;
  await Promise.all(clients.map((client) => client.close()));
  throw images[0]?.error;
}

export const imageId = '00112233445566778899aabbccddeeff';
export const imageSecret = Uint8Array.from({ length: 32 }, (_, at) => at);

export function newImage(more: Partial<NewImage> = {}): NewImage {
  return {
    image: imageId,
    secret: imageSecret,
    domainKey: null,
    name: 'guest',
    kind: 'migration',
    regions: [{ name: 'heap', pages: 64, capacityPages: 128 }],
    pageSize: 4096,
    replicas: 1,
    leaseMs: 200,
    ...more,
  };
}

export const parkedGuest = {
  name: 'guest',
  module: null,
  description: { anything: [1, 2] },
  regions: [{ name: 'heap', lengthBytes: 64 * 4096, capacityBytes: 128 * 4096, pageSize: 4096 }],
};

/** Until it holds; the test's own timeout is the bound. */
export async function until(holds: () => boolean): Promise<void> {
  while (!holds()) await new Promise((resolve) => setTimeout(resolve, 5));
}
