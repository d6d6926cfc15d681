/**
 * Queries of a serving guest, before, while and after it moves: one connection to where it is, and what was not
 * answered is asked again where it went. Every answer is checked: its words must be those of one version of its key,
 * not older than the last acknowledged when the question was asked, not newer than the last written.
 */
import { createConnection, type Socket } from 'node:net';
import type { Send } from './open-loop.js';
import { answerHeaderBytes, operations, requestBytes, slotBytes, versionOf } from './key-value.js';

export interface KeyValueParameters {
  /** Where the guest is, in turn. */
  hosts: string[];
  port: number;
  keys: number;
  /** Of the requests, how many write. */
  writes: number;
  /** Which keys are asked for: all alike, or few of them often (Zipf, YCSB's constant of 0.99). */
  keysBy: 'uniform' | 'zipf';
}

interface Request {
  bytes: Buffer;
  writing: boolean;
  key: number;
  /** A put's own, or the last that was acknowledged when a get was first asked. */
  version: number;
  done: () => void;
}

const redialMs = 2;

class KeyValueClient {
  readonly #parameters: KeyValueParameters;
  readonly #asked = new Map<number, Request>();
  readonly #acknowledged = new Map<number, number>();
  readonly #written = new Map<number, number>();
  readonly #nextKey: () => number;
  #random = 0x6d2b79f5;
  #socket: Socket | null = null;
  #input: Buffer = Buffer.alloc(0);
  #host = 0;
  #nextId = 1;

  constructor(parameters: KeyValueParameters) {
    this.#parameters = parameters;
    const { keys } = parameters;
    const zipf = parameters.keysBy === 'zipf' ? zipfian(keys) : null;
    this.#nextKey = () =>
      zipf ? Math.imul(zipf(this.#draw()), 0x9e3779b1) >>> 0 : Math.floor(this.#draw() * keys);
    this.#dial();
  }

  send(done: () => void): void {
    const id = this.#nextId++ >>> 0;
    const key = this.#nextKey() % this.#parameters.keys;
    const writing = this.#draw() < this.#parameters.writes;
    const version = writing ? (this.#written.get(key) ?? 0) + 1 : (this.#acknowledged.get(key) ?? 0);
    if (writing) this.#written.set(key, version);
    const bytes = Buffer.allocUnsafe(requestBytes);
    const words = [id, writing ? operations.put : operations.get, key, version];
    for (const [index, word] of words.entries()) bytes.writeUInt32LE(word, index * 4);
    this.#asked.set(id, { bytes, writing, key, version, done });
    this.#socket?.write(bytes);
  }

  #draw(): number {
    this.#random ^= this.#random << 13;
    this.#random ^= this.#random >>> 17;
    this.#random ^= this.#random << 5;
    return (this.#random >>> 0) / 2 ** 32;
  }

  /** The guest is at one of the hosts; the others refuse or hang up. */
  #dial(): void {
    const { hosts, port } = this.#parameters;
    const socket = createConnection({ host: hosts[this.#host % hosts.length] as string, port });
    socket.setNoDelay(true);
    socket.on('connect', () => {
      this.#socket = socket;
      this.#input = Buffer.alloc(0);
      // In the order in which they were asked first: puts of one key must not overtake each other.
      socket.write(Buffer.concat([...this.#asked.values()].map(({ bytes }) => bytes)));
    });
    socket.on('data', (bytes) => this.#read(bytes));
    socket.on('error', () => {});
    socket.on('close', () => {
      this.#socket = null;
      this.#host++;
      setTimeout(() => this.#dial(), redialMs);
    });
  }

  #read(bytes: Buffer): void {
    this.#input = this.#input.length === 0 ? bytes : Buffer.concat([this.#input, bytes]);
    let at = 0;
    while (this.#input.length - at >= answerHeaderBytes) {
      const id = this.#input.readUInt32LE(at);
      const request = this.#asked.get(id);
      if (request === undefined) throw new Error(`an answer to nothing that was asked (${id})`);
      const length = answerHeaderBytes + (request.writing ? 0 : slotBytes);
      if (this.#input.length - at < length) break;
      this.#check(request, this.#input.subarray(at + answerHeaderBytes, at + length));
      this.#asked.delete(id);
      at += length;
      request.done();
    }
    this.#input = this.#input.subarray(at);
  }

  #check({ writing, key, version }: Request, slot: Buffer): void {
    if (writing) {
      this.#acknowledged.set(key, Math.max(version, this.#acknowledged.get(key) ?? 0));
      return;
    }
    const words = new Uint32Array(new Uint8Array(slot).buffer);
    const found = versionOf(words, key);
    const newest = this.#written.get(key) ?? 0;
    if (found === null || found < version || found > newest) {
      throw new Error(`key ${key}: version ${found ?? 'none'}, between ${version} and ${newest} expected`);
    }
  }
}

/** Ranks from 0, by Gray et al. 1994, "Quickly generating billion-record synthetic databases". */
function zipfian(count: number): (uniform: number) => number {
  const theta = 0.99;
  let zeta = 0;
  for (let i = 1; i <= count; i++) zeta += 1 / i ** theta;
  const zeta2 = 1 + 0.5 ** theta;
  const alpha = 1 / (1 - theta);
  const eta = (1 - (2 / count) ** (1 - theta)) / (1 - zeta2 / zeta);
  return (uniform) => {
    const scaled = uniform * zeta;
    if (scaled < 1) return 0;
    if (scaled < zeta2) return 1;
    return Math.min(count - 1, Math.floor(count * (eta * uniform - eta + 1) ** alpha));
  };
}

export function keyValueTarget(parameters: KeyValueParameters): Send {
  const client = new KeyValueClient(parameters);
  return (done) => client.send(done);
}
