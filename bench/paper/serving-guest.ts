/**
 * A guest that answers queries over TCP from a table in its region. A worker of its own serves, one request after
 * the other as Redis does, so that a missing page holds up the service and nothing else. Both sides of it: the
 * worker's body, and its control. What it is asked while it does not serve waits.
 */
import { createServer, type Socket } from 'node:net';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { Region } from 'memferry';
import { answerHeaderBytes, operations, requestBytes, slotBytes, writeSlot } from './key-value.js';

interface ServerData {
  regionId: string;
  host: string;
  port: number;
}

type Order = 'serve' | 'stop' | 'leave';
type Word = { kind: 'listening' | 'failed'; text: string } | { kind: 'stopped'; atNs: bigint };

export class ServingGuest {
  readonly #worker: Worker;
  readonly #waiting = new Map<Word['kind'], (word: Word) => void>();

  private constructor(worker: Worker) {
    this.#worker = worker;
    worker.on('message', (word: Word) => {
      this.#waiting.get(word.kind)?.(word);
      this.#waiting.delete(word.kind);
    });
    worker.once('error', (error) => {
      throw error;
    });
  }

  /** Listens, and serves nobody yet. */
  static async start(region: Region, host: string, port: number): Promise<ServingGuest> {
    const data: ServerData = { regionId: region.id, host, port };
    const guest = new ServingGuest(new Worker(new URL(import.meta.url), { workerData: data }));
    await new Promise<void>((resolve, reject) => {
      guest.#waiting.set('listening', () => resolve());
      guest.#waiting.set('failed', (word) => reject(new Error('text' in word ? word.text : word.kind)));
    });
    return guest;
  }

  serve(): void {
    this.#tell('serve');
  }

  async stop(): Promise<bigint> {
    const stopped = new Promise<Word>((resolve) => this.#waiting.set('stopped', resolve));
    this.#tell('stop');
    const word = await stopped;
    return word.kind === 'stopped' ? word.atNs : 0n;
  }

  /** Hangs up: clients find the guest elsewhere. */
  leave(): void {
    this.#tell('leave');
  }

  #tell(order: Order): void {
    this.#worker.postMessage(order);
  }
}

function work({ regionId, host, port }: ServerData): void {
  const tell = (word: Word): void => parentPort?.postMessage(word);
  const region = Region.open(regionId);
  const { views } = region;
  const view = views[0];
  if (view === undefined || views.length !== 1) throw new Error('a table of one view');
  const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
  const slots = view.length / slotBytes;
  const sockets = new Map<Socket, Buffer>();
  let serving = false;

  const answer = (socket: Socket): void => {
    const asked = sockets.get(socket);
    if (!serving || asked === undefined) return;
    const answers: Buffer[] = [];
    let at = 0;
    for (; at + requestBytes <= asked.length; at += requestBytes) {
      const operation = asked.readUInt32LE(at + 4);
      const key = asked.readUInt32LE(at + 8) % slots;
      const header = Buffer.allocUnsafe(answerHeaderBytes);
      header.writeUInt32LE(asked.readUInt32LE(at), 0);
      header.writeUInt32LE(key, 4);
      answers.push(header);
      if (operation === operations.get) {
        answers.push(Buffer.from(view.subarray(key * slotBytes, (key + 1) * slotBytes)));
      } else {
        writeSlot(words, (key * slotBytes) / 4, key, asked.readUInt32LE(at + 12));
      }
    }
    sockets.set(socket, asked.subarray(at));
    if (answers.length > 0) socket.write(Buffer.concat(answers));
  };

  const server = createServer((socket) => {
    socket.setNoDelay(true);
    sockets.set(socket, Buffer.alloc(0));
    socket.on('data', (bytes) => {
      sockets.set(socket, Buffer.concat([sockets.get(socket) ?? Buffer.alloc(0), bytes]));
      answer(socket);
    });
    socket.on('error', () => {});
    socket.on('close', () => sockets.delete(socket));
  });
  server.once('error', (error) => tell({ kind: 'failed', text: String(error) }));
  server.listen(port, host, () => tell({ kind: 'listening', text: '' }));

  parentPort?.on('message', (order: Order) => {
    if (order === 'serve') {
      serving = true;
      for (const socket of sockets.keys()) answer(socket);
    } else if (order === 'stop') {
      serving = false;
      tell({ kind: 'stopped', atNs: process.hrtime.bigint() });
    } else {
      server.close();
      for (const socket of sockets.keys()) socket.destroy();
    }
  });
}

if (!isMainThread) work(workerData as ServerData);
