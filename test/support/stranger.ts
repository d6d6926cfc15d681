/** A peer that need not keep to anything: bytes in, bytes out, and how the connection ended. */
import { connect, type Socket } from 'node:net';
import { DIALLER_HELLO_BYTES } from '../../lib/control/handshake.js';
import { dial } from '../../lib/control/dial.js';
import { FrameKind, FrameSealer } from '../../lib/control/frame.js';
import { directionKey } from '../../lib/control/handshake.js';
import { bounded } from './host.js';
import { SECRET } from './scenario.js';

const all = new Set<Socket>();

export class Stranger {
  #received = Buffer.alloc(0);
  /** Resolves when the other side has ended the connection. */
  readonly ended: Promise<void>;
  readonly #socket: Socket;
  #watchers: (() => void)[] = [];

  private constructor(socket: Socket) {
    this.#socket = socket;
    all.add(socket);
    socket.on('error', () => {});
    socket.on('data', (bytes) => {
      this.#received = Buffer.concat([this.#received, bytes as Buffer]);
      for (const watcher of this.#watchers) watcher();
    });
    this.ended = new Promise((resolve) => {
      socket.once('end', resolve);
      socket.once('close', () => {
        all.delete(socket);
        resolve();
      });
    });
  }

  static async connect(port: number): Promise<Stranger> {
    const socket = connect({ host: '127.0.0.1', port });
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    return new Stranger(socket);
  }

  get received(): Buffer {
    return this.#received;
  }

  send(...bytes: (string | Uint8Array)[]): this {
    for (const part of bytes)
      this.#socket.write(typeof part === 'string' ? Buffer.from(part, 'latin1') : part);
    return this;
  }

  /** From now on as much as the other side takes, until it ends the connection. */
  flood(): this {
    const piece = Buffer.alloc(2 ** 20, 'more');
    const pour = () => {
      while (!this.#socket.destroyed && this.#socket.write(piece));
    };
    this.#socket.on('drain', pour);
    pour();
    return this;
  }

  /** No more from this side; the other may still answer. */
  finish(): this {
    this.#socket.end();
    return this;
  }

  close(): void {
    this.#socket.destroy();
  }

  async bytes(count: number, boundMs = 20_000): Promise<Buffer> {
    await bounded(
      new Promise<void>((resolve) => {
        const watcher = () => {
          if (this.#received.length >= count) resolve();
        };
        this.#watchers.push(watcher);
        watcher();
      }),
      boundMs,
      () => `${this.#received.length} of ${count} bytes came`,
    );
    return this.#received.subarray(0, count);
  }

  async untilEnded(boundMs: number): Promise<void> {
    await bounded(this.ended, boundMs, () => 'the other side keeps the connection');
  }
}

export function closeStrangers(): void {
  for (const socket of all) socket.destroy();
}

export function controlHello(lowest: number, highest: number): Buffer {
  const hello = Buffer.alloc(DIALLER_HELLO_BYTES, 7);
  hello.writeUInt16LE(lowest, 0);
  hello.writeUInt16LE(highest, 2);
  return hello;
}

/** An authenticated peer that says what the protocol does not allow. */
export class Insider {
  readonly ended: Promise<void>;
  #text = '';
  readonly #watchers: (() => void)[] = [];
  #pings: NodeJS.Timeout | undefined;

  private constructor(
    private readonly session: Awaited<ReturnType<typeof dial>>,
    private readonly sealer: FrameSealer,
  ) {
    const socket = session.duplex as Socket;
    all.add(socket);
    socket.on('error', () => {});
    // Frames, with their JSON in the clear: enough to look for a word.
    socket.on('data', (bytes) => {
      this.#text += (bytes as Buffer).toString('latin1');
      for (const watcher of this.#watchers) watcher();
    });
    this.ended = new Promise((resolve) => {
      socket.once('close', () => {
        this.silence();
        resolve();
      });
    });
  }

  static async connect(port: number): Promise<Insider> {
    const session = await dial({
      host: '127.0.0.1',
      port,
      secret: Buffer.from(SECRET),
      connectTimeoutMs: 15_000,
    });
    return new Insider(session, new FrameSealer(directionKey(session.sessionKey, 'dialler')));
  }

  get sessionKey(): Uint8Array {
    return this.session.sessionKey;
  }

  say(message: unknown): this {
    return this.text(JSON.stringify(message));
  }

  text(text: string): this {
    for (const part of this.sealer.seal(FrameKind.Json, Buffer.from(text))) this.session.duplex.write(part);
    return this;
  }

  /** Is heard of from now on as a real peer is, however long the other side takes for its answers. */
  lives(): this {
    this.#pings = setInterval(() => {
      for (const part of this.sealer.seal(FrameKind.Ping)) this.session.duplex.write(part);
    }, 500);
    return this;
  }

  silence(): void {
    clearInterval(this.#pings);
  }

  /** Past every rule. */
  raw(bytes: Uint8Array): this {
    this.session.duplex.write(bytes);
    return this;
  }

  async hears(word: string, boundMs = 20_000): Promise<void> {
    await bounded(
      new Promise<void>((resolve) => {
        const watcher = () => {
          if (this.#text.includes(word)) resolve();
        };
        this.#watchers.push(watcher);
        watcher();
      }),
      boundMs,
      () => `'${word}' was not said; heard: ${JSON.stringify(this.#text.slice(0, 400))}`,
    );
  }

  async untilEnded(boundMs = 20_000): Promise<void> {
    await bounded(this.ended, boundMs, () => 'the other side keeps the connection');
  }

  close(): void {
    this.session.duplex.destroy();
  }
}

export interface OfferRegion {
  name: string;
  lengthBytes: number;
  capacityBytes: number;
  pageSize: number;
}

export function offer(migrationId: string, region: Partial<OfferRegion> = {}, more: object = {}): object {
  return {
    type: 'offer',
    migrationId,
    mode: 'pre-copy',
    mayPage: false,
    verify: false,
    channels: 1,
    guest: {
      name: 'intruder',
      module: null,
      description: { regions: [{ kind: 'allocate', pages: 16, maxPages: 16 }] },
      regions: [{ name: 'r', lengthBytes: 65536, capacityBytes: 65536, pageSize: 4096, ...region }],
    },
    ...more,
  };
}
