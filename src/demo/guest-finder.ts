/**
 * The client's way to the guest: one connection to every host, kept open; each request goes to where the guest
 * was last, and to the next host as soon as one says that it is elsewhere. A request is sent again, as it is,
 * until somebody has answered it: its id makes that harmless.
 */
import { connect, type Socket } from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { memferryError } from '../errors.js';
import { type LineReply, receiveLines, sendLine } from './lines.js';

export interface HostAddress {
  host: string;
  port: number;
}

const REQUEST_DEADLINE_MS = 30_000;
/** When every host has said that the guest is elsewhere: it is on its way. */
const SEARCH_PAUSE_MS = 1;
const RECONNECT_PAUSE_MS = 20;

type Outcome = { value: unknown } | 'elsewhere' | 'cut' | { error: { code: string; message: string } };

class HostConnection {
  #address: HostAddress;
  #socket: Socket | null = null;
  #waiting = new Map<number, (outcome: Outcome) => void>();
  #next = 1;
  #connecting: Promise<void> | null = null;
  #closed = false;

  constructor(address: HostAddress) {
    this.#address = address;
  }

  /** Resolves when connected, or when the attempt failed: the request that follows will say. */
  connect(): Promise<void> {
    if (this.#socket || this.#closed) return Promise.resolve();
    this.#connecting ??= new Promise<void>((resolve) => {
      const socket = connect({ ...this.#address, noDelay: true });
      socket.once('connect', () => {
        this.#socket = socket;
        receiveLines(socket, (message) => this.#receive(message as LineReply));
      });
      socket.once('close', () => this.#cut());
      socket.on('error', () => {});
      socket.once('connect', resolve).once('close', resolve);
    }).finally(() => {
      this.#connecting = null;
    });
    return this.#connecting;
  }

  async request(request: unknown, deadlineMs: number): Promise<Outcome> {
    await this.connect();
    const socket = this.#socket;
    if (!socket) {
      await delay(RECONNECT_PAUSE_MS);
      return 'cut';
    }
    const number = this.#next++;
    return new Promise((resolve) => {
      const timer = setTimeout(() => settle('cut'), deadlineMs);
      const settle = (outcome: Outcome) => {
        clearTimeout(timer);
        this.#waiting.delete(number);
        resolve(outcome);
      };
      this.#waiting.set(number, settle);
      sendLine(socket, { number, request });
    });
  }

  close(): void {
    this.#closed = true;
    this.#socket?.destroy();
  }

  #receive(reply: LineReply): void {
    const settle = this.#waiting.get(reply.number);
    if ('elsewhere' in reply) settle?.('elsewhere');
    else if ('error' in reply) settle?.({ error: reply.error });
    else settle?.({ value: reply.value });
  }

  #cut(): void {
    this.#socket = null;
    for (const settle of [...this.#waiting.values()]) settle('cut');
  }
}

export class GuestFinder {
  #hosts: HostConnection[];
  /** Where the guest answered last. */
  #here = 0;
  /** Requests that had to be sent more than once. */
  resent = 0;

  constructor(addresses: HostAddress[]) {
    this.#hosts = addresses.map((address) => new HostConnection(address));
  }

  async connect(): Promise<void> {
    await Promise.all(this.#hosts.map((host) => host.connect()));
  }

  /** The guest's answer, from wherever it is. Rejects with the guest's error, or past the deadline. */
  async request(request: unknown, deadlineMs = REQUEST_DEADLINE_MS): Promise<unknown> {
    const deadline = performance.now() + deadlineMs;
    for (let refusals = 0; ; ) {
      const remaining = deadline - performance.now();
      if (remaining <= 0) break;
      const asked = this.#here;
      const outcome = await (this.#hosts[asked] as HostConnection).request(request, remaining);
      if (typeof outcome === 'object') {
        this.#here = asked;
        if ('value' in outcome) return outcome.value;
        throw Object.assign(new Error(outcome.error.message), { code: outcome.error.code });
      }
      this.resent++;
      // Another request may have found the guest in the meantime.
      if (this.#here === asked) this.#here = (asked + 1) % this.#hosts.length;
      if (++refusals % this.#hosts.length === 0) await delay(SEARCH_PAUSE_MS);
    }
    throw memferryError('PEER_LOST', `no host had the guest for ${deadlineMs} ms`);
  }

  close(): void {
    for (const host of this.#hosts) host.close();
  }
}
