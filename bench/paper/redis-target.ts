/** The Redis protocol, as much of it as two commands need: SET and GET of values of one length, pipelined. */
import { createConnection, type Socket } from 'node:net';
import type { Send } from './open-loop.js';

export interface RedisParameters {
  host: string;
  port: number;
  connections: number;
  keys: number;
  valueBytes: number;
  /** Of the requests, how many write. */
  writes: number;
}

/** One connection; answers come in the order of the requests. */
class RedisConnection {
  readonly #socket: Socket;
  readonly #waiting: ((length: number) => void)[] = [];
  #line = '';
  /** Of the bulk under way, its end of line included; 0 outside of one. */
  #bulkLeft = 0;
  #bulkLength = 0;

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.setNoDelay(true);
    socket.on('data', (bytes: Buffer) => this.#read(bytes));
    socket.on('error', (error) => {
      throw error;
    });
  }

  static open(host: string, port: number): Promise<RedisConnection> {
    return new Promise((resolve, reject) => {
      const socket = createConnection({ host, port });
      socket.once('error', reject);
      socket.once('connect', () => {
        socket.off('error', reject);
        resolve(new RedisConnection(socket));
      });
    });
  }

  /** `done` is told the length of the value, -1 where there was none. */
  send(command: Buffer, done: (length: number) => void): void {
    this.#waiting.push(done);
    this.#socket.write(command);
  }

  #read(bytes: Buffer): void {
    let at = 0;
    while (at < bytes.length) {
      if (this.#bulkLeft > 0) {
        const taken = Math.min(this.#bulkLeft, bytes.length - at);
        this.#bulkLeft -= taken;
        at += taken;
        if (this.#bulkLeft === 0) this.#answered(this.#bulkLength);
        continue;
      }
      const end = bytes.indexOf(10, at);
      this.#line += bytes.toString('latin1', at, end < 0 ? bytes.length : end);
      if (end < 0) return;
      at = end + 1;
      const line = this.#line.trimEnd();
      this.#line = '';
      if (line.startsWith('-')) throw new Error(`redis: ${line}`);
      const length = line.startsWith('$') ? Number(line.slice(1)) : -1;
      if (length < 0) this.#answered(-1);
      else {
        this.#bulkLength = length;
        this.#bulkLeft = length + 2;
      }
    }
  }

  #answered(length: number): void {
    this.#waiting.shift()?.(length);
  }
}

function command(...parts: (string | Buffer)[]): Buffer {
  const pieces: Buffer[] = [Buffer.from(`*${parts.length}\r\n`)];
  for (const part of parts) {
    const bytes = Buffer.from(part as string);
    pieces.push(Buffer.from(`$${bytes.length}\r\n`), bytes, Buffer.from('\r\n'));
  }
  return Buffer.concat(pieces);
}

/** Connects, and writes every key once. */
export async function redisTarget(parameters: RedisParameters): Promise<Send> {
  const { host, port, connections, keys, valueBytes, writes } = parameters;
  const opened = await Promise.all(
    Array.from({ length: connections }, () => RedisConnection.open(host, port)),
  );
  const value = Buffer.alloc(valueBytes, 'memferry');
  const connection = (request: number): RedisConnection => opened[request % connections] as RedisConnection;
  const inFlight = 64;
  for (let key = 0; key < keys; key += inFlight) {
    const some = Array.from({ length: Math.min(inFlight, keys - key) }, (_, i) => key + i);
    await Promise.all(
      some.map(
        (one) =>
          new Promise<void>((resolve) =>
            connection(one).send(command('SET', `key:${one}`, value), () => resolve()),
          ),
      ),
    );
  }
  let state = 0x2545f491;
  const random = (): number => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
  let request = 0;
  return (done) => {
    const key = `key:${Math.floor(random() * keys)}`;
    const writing = random() < writes;
    const bytes = writing ? command('SET', key, value) : command('GET', key);
    connection(request++).send(bytes, (length) => {
      if (!writing && length !== valueBytes) throw new Error(`redis: ${key} has ${length} bytes`);
      done();
    });
  };
}
