/** Two ends of a real loopback connection, authenticated or raw, for the control channel's tests. */
import { once } from 'node:events';
import { createServer, type Server, Socket, type AddressInfo } from 'node:net';
import { z } from 'zod';
import { ControlChannel, type ControlChannelOptions } from '../../src/control/channel.js';
import { readExactly } from '../../src/control/exact-read.js';
import {
  type AuthenticatedSession,
  CONTROL_PREFACE,
  handshakeAsAcceptor,
  handshakeAsDialler,
} from '../../src/control/handshake.js';

export const secret = Buffer.from('a secret that both sides were given');
export const never: AbortSignal = new AbortController().signal;

export const anyMessage = z.strictObject({ type: z.string().max(32), value: z.unknown().optional() });
export type AnyMessage = z.infer<typeof anyMessage>;

/** A server on loopback whose accepted sockets are handed out; close() ends everything it made. */
export class Loopback {
  readonly #sockets = new Set<Socket>();
  readonly #accepted: Socket[] = [];
  readonly #waiting: ((socket: Socket) => void)[] = [];

  private constructor(private readonly server: Server) {
    server.on('connection', (socket) => {
      this.#own(socket);
      const waiting = this.#waiting.shift();
      if (waiting) waiting(socket);
      else this.#accepted.push(socket);
    });
  }

  static async open(): Promise<Loopback> {
    const server = createServer();
    const loopback = new Loopback(server);
    server.listen(0, '127.0.0.1');
    await once(server, 'listening');
    return loopback;
  }

  get port(): number {
    return (this.server.address() as AddressInfo).port;
  }

  accepted(): Promise<Socket> {
    const socket = this.#accepted.shift();
    return socket ? Promise.resolve(socket) : new Promise((resolve) => this.#waiting.push(resolve));
  }

  async connect(): Promise<Socket> {
    const socket = new Socket();
    this.#own(socket);
    socket.connect(this.port, '127.0.0.1');
    await once(socket, 'connect');
    return socket;
  }

  /** Dialler's end, acceptor's end. */
  async pair(): Promise<[Socket, Socket]> {
    const accepted = this.accepted();
    return [await this.connect(), await accepted];
  }

  async sessions(): Promise<[AuthenticatedSession, AuthenticatedSession]> {
    const [near, far] = await this.pair();
    return Promise.all([handshakeAsDialler(near, { secret }), handshakeAsAcceptor(far, { secret })]);
  }

  async channels(
    options: Partial<ControlChannelOptions<AnyMessage>> = {},
    farOptions: Partial<ControlChannelOptions<AnyMessage>> = options,
  ): Promise<[ControlChannel<AnyMessage, AnyMessage>, ControlChannel<AnyMessage, AnyMessage>]> {
    const [near, far] = await this.sessions();
    return [
      new ControlChannel(near, { incoming: anyMessage, ...options }),
      new ControlChannel(far, { incoming: anyMessage, ...farOptions }),
    ];
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy();
    this.server.close();
    await once(this.server, 'close');
  }

  #own(socket: Socket): void {
    this.#sockets.add(socket);
    socket.on('error', () => {});
    socket.on('close', () => this.#sockets.delete(socket));
  }
}

/** What a listener does before it hands the connection on. */
export async function readPreface(socket: Socket): Promise<void> {
  const preface = await readExactly(socket, CONTROL_PREFACE.length, never);
  if (!preface.equals(CONTROL_PREFACE)) throw new Error(`preface: ${preface.toString('latin1')}`);
}

/** Repeatable bytes. */
export function randomBytesFrom(seed: number): (length: number) => Buffer {
  let state = seed >>> 0;
  return (length) => {
    const bytes = Buffer.alloc(length);
    for (let at = 0; at < length; at++) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      bytes[at] = state >>> 24;
    }
    return bytes;
  };
}
