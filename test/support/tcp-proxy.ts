/**
 * The network between two hosts, on loopback: forwards memferry's connections piece by piece, and at a named
 * piece does what networks and hosts do on bad days. A source dials everything at one host and port, so a proxy
 * in front of a listener sees the control connection and all data connections.
 *
 *   const proxy = await TcpProxy.start(port);
 *   const point = proxy.at({ on: 'control', direction: 'up', name: 'grant' }, 'hold');
 *   await point.reached;   // both hosts stand exactly there
 *   proxy.cut();
 */
import { createServer, connect as dial, type Server, type Socket } from 'node:net';
import { bounded } from './host.js';
import { type ConnectionKind, type Direction, type Piece, PieceReader } from './wire-parser.js';

export interface Point {
  on: ConnectionKind['role'];
  direction: Direction;
  /** A piece's name (wire-parser.ts). */
  name: string;
  /** The n-th such piece over all connections of the role, from 1. */
  nth?: number;
  /** Only data or stage connections of this channel. */
  channel?: number;
  /** Only connections of this epoch or a later one. */
  fromEpoch?: number;
  /** Whether the piece itself still gets through. Default: it does not. */
  after?: boolean;
}

/**
 * `hold`: that connection stands there until `release`. `cut`: every connection is destroyed, and new ones are
 * until `heal`. `stall`: nothing is forwarded any more and nothing ends, as when a cable is pulled.
 * `corrupt`: one bit of it is flipped, and it goes on. `repeat`: it goes twice. Or what the test does itself,
 * after which the connection stands.
 */
export type Deed = 'hold' | 'cut' | 'stall' | 'corrupt' | 'repeat' | (() => void);

export interface Reached {
  /** Rejects when it is not reached within the bound. */
  readonly reached: Promise<void>;
  /** Lets what was held go on. */
  release(): void;
}

interface Link {
  kind: ConnectionKind | null;
  client: Socket;
  server: Socket;
  /** What the client sent, when that is recorded. */
  sent: Buffer[] | null;
}

export interface Recording {
  role: ConnectionKind['role'];
  bytes: Buffer;
}

interface Watch {
  point: Point;
  deed: Deed;
  seen: number;
  hit: boolean;
  reach(): void;
  released: Promise<void>;
}

type Weather = 'fair' | 'cut' | 'stalled';

export class TcpProxy {
  /** Names of all pieces forwarded, `role direction name`, with how often. */
  readonly counts = new Map<string, number>();
  readonly #links = new Set<Link>();
  readonly #watches: Watch[] = [];
  #weather: Weather = 'fair';
  #thaw: (() => void)[] = [];
  #dialled: (() => void)[] = [];
  #recordings: Link[] | null = null;

  private constructor(
    private readonly server: Server,
    readonly port: number,
    private readonly target: () => number,
  ) {}

  /** `target`: the listener's port, or a function of it when the listener may be another one later. */
  static async start(target: number | (() => number)): Promise<TcpProxy> {
    const server = createServer();
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      server.listen(0, '127.0.0.1', resolve);
    });
    const { port } = server.address() as { port: number };
    const proxy = new TcpProxy(server, port, typeof target === 'number' ? () => target : target);
    server.on('connection', (socket) => proxy.#accept(socket));
    started.add(proxy);
    return proxy;
  }

  at(point: Point, deed: Deed, boundMs = 45_000): Reached {
    let reach = () => {};
    let release = () => {};
    const reached = new Promise<void>((resolve) => {
      reach = resolve;
    });
    const released = new Promise<void>((resolve) => {
      release = resolve;
    });
    this.#watches.push({ point, deed, seen: 0, hit: false, reach, released });
    const withBound = bounded(
      reached,
      boundMs,
      () => `not reached: ${JSON.stringify(point)}; seen: ${JSON.stringify([...this.counts])}`,
    );
    withBound.catch(() => {}); // a test that fails before it waits reports its own failure
    return { reached: withBound, release };
  }

  /** Every connection ends at once, and so does every new one, until `heal`. */
  cut(): void {
    this.#weather = 'cut';
    for (const link of [...this.#links]) {
      link.client.resetAndDestroy();
      link.server.resetAndDestroy();
    }
  }

  /** Nothing is forwarded any more; nothing ends. */
  stall(): void {
    this.#weather = 'stalled';
  }

  /** New connections get through. Those that stood end, as they would when their peers gave up on them. */
  heal(): void {
    const stood = [...this.#links];
    const was = this.#weather;
    this.#weather = 'fair';
    for (const thaw of this.#thaw.splice(0)) thaw();
    if (was === 'stalled') {
      for (const link of stood) {
        link.client.resetAndDestroy();
        link.server.resetAndDestroy();
      }
    }
  }

  /** The next attempt to connect, in any weather: a source that has noticed that nothing is heard any more. */
  nextDial(boundMs = 45_000): Promise<void> {
    const dialled = new Promise<void>((resolve) => this.#dialled.push(resolve));
    return bounded(dialled, boundMs, () => 'nobody dialled');
  }

  /** From now on: what clients send on new connections. */
  record(): void {
    this.#recordings = [];
  }

  recorded(): Recording[] {
    return (this.#recordings ?? []).flatMap(({ kind, sent }) =>
      kind && sent ? [{ role: kind.role, bytes: Buffer.concat(sent) }] : [],
    );
  }

  connections(role?: ConnectionKind['role']): number {
    return [...this.#links].filter(({ kind }) => !role || kind?.role === role).length;
  }

  async close(): Promise<void> {
    this.cut();
    this.heal();
    started.delete(this);
    await new Promise<void>((resolve) => this.server.close(() => resolve()));
  }

  #accept(client: Socket): void {
    for (const dialled of this.#dialled.splice(0)) dialled();
    if (this.#weather === 'cut') {
      client.on('error', () => {});
      client.resetAndDestroy();
      return;
    }
    const server = dial({ host: '127.0.0.1', port: this.target() });
    client.setNoDelay(true);
    server.setNoDelay(true);
    const link: Link = { kind: null, client, server, sent: this.#recordings ? [] : null };
    this.#recordings?.push(link);
    this.#links.add(link);
    const end = () => {
      this.#links.delete(link);
      client.destroy();
      server.destroy();
    };
    for (const socket of [client, server]) {
      socket.on('error', end);
      socket.on('close', end);
    }
    void this.#carry(link, 'up', client, server).catch(end);
    void this.#carry(link, 'down', server, client).catch(end);
  }

  async #carry(link: Link, direction: Direction, from: Socket, to: Socket): Promise<void> {
    const reader = new PieceReader(
      direction,
      () => link.kind,
      (kind) => {
        link.kind = kind;
      },
    );
    for await (const bytes of from) {
      if (direction === 'up') link.sent?.push(Buffer.from(bytes as Buffer));
      for (const piece of reader.push(bytes as Buffer)) {
        await this.#fair();
        if (!(await this.#pass(link, direction, piece, to))) return;
      }
    }
    await this.#fair();
    to.end();
  }

  /** False when the connection is over. */
  async #pass(link: Link, direction: Direction, piece: Piece, to: Socket): Promise<boolean> {
    const kind = link.kind as ConnectionKind;
    const watch = this.#watchFor(kind, direction, piece);
    if (watch && !watch.point.after) await this.#act(watch);
    if (to.destroyed) return false;
    if (watch?.deed === 'corrupt') corrupt(piece);
    if (watch?.deed === 'repeat') to.write(Buffer.from(piece.bytes));
    const what = `${kind.role} ${direction} ${piece.name}`;
    this.counts.set(what, (this.counts.get(what) ?? 0) + 1);
    if (!to.write(piece.bytes)) {
      await new Promise<void>((resolve) => {
        to.once('drain', resolve);
        to.once('close', resolve);
      });
    }
    if (watch?.point.after) await this.#act(watch);
    return !to.destroyed;
  }

  #watchFor(kind: ConnectionKind, direction: Direction, piece: Piece): Watch | null {
    let found: Watch | null = null;
    for (const watch of this.#watches) {
      const { on, direction: wanted, name, nth = 1, channel, fromEpoch = 0 } = watch.point;
      if (watch.hit || on !== kind.role || wanted !== direction || name !== piece.name) continue;
      if ((channel !== undefined && channel !== kind.channel) || kind.epoch < fromEpoch) continue;
      watch.seen++;
      if (watch.seen >= nth && !found) {
        watch.hit = true;
        found = watch;
      }
    }
    return found;
  }

  async #act(watch: Watch): Promise<void> {
    const { deed } = watch;
    if (deed === 'cut') this.cut();
    else if (deed === 'stall') this.stall();
    else if (typeof deed === 'function') deed();
    watch.reach();
    if (deed === 'hold' || typeof deed === 'function') await watch.released;
    await this.#fair();
  }

  /** While stalled: until the weather is fair. */
  async #fair(): Promise<void> {
    while (this.#weather === 'stalled') await new Promise<void>((resolve) => this.#thaw.push(resolve));
  }
}

/** In the middle: a page's content, a control message's text; where there is none, the header's last byte. */
function corrupt({ bytes }: Piece): void {
  const at = bytes.length > 80 ? Math.floor(bytes.length / 2) : Math.min(30, bytes.length - 1);
  bytes[at] = (bytes[at] as number) ^ 0x10;
}

const started = new Set<TcpProxy>();

/** For afterEach. */
export async function closeProxies(): Promise<void> {
  await Promise.all([...started].map((proxy) => proxy.close()));
}
