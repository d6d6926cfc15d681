/**
 * The destination process of a trial below the public API: regions, a listener, a receiver, and a toucher.
 * The toucher runs on the JavaScript thread: the fault path never needs it.
 */
import type {
  NativeListener,
  NativeReceiver,
  NativeReceiverStats,
  NativeRegion,
  NativeStageServer,
} from '../../lib/native.js';
import { loadAddon } from './addon.js';
import { shuffledPages } from './memory.js';
import { answerCalls } from './peer.js';

const addon = loadAddon();
let region: NativeRegion | null = null;
let memory: Uint8Array = new Uint8Array(0);
let listener: NativeListener | null = null;
let receiver: NativeReceiver | null = null;
let failure: string | null = null;
let toldToStop = false;
let onComplete: () => void;
const complete = new Promise<void>((resolve) => {
  onComplete = resolve;
});

function must<T>(value: T | null): T {
  if (value === null) throw new Error('called too early');
  return value;
}

export interface ReceiveParameters {
  migration: Uint8Array;
  channels: number;
  tokens: Uint8Array;
  pagingFromStart: boolean;
  mayPage: boolean;
  /** False keeps what allocate() has touched. */
  discardFirst: boolean;
  /** Of a scatter. */
  servers: NativeStageServer[];
  /** Bytes a second over the data channels, and fetched ahead from the servers; 0 for no limit. */
  bandwidth: number;
  gatherLimit: number;
  /** Flags of what pages may come in; 0 without it. */
  encodings?: number;
}

export interface TouchParameters {
  order: 'random' | 'sequential';
  /** Stops after so many reads, or when every page is there. */
  touches: number;
  seed: number;
  /** Of the order's pages, so many are left out at its start: an earlier call has touched them. */
  skip?: number;
  /** Stops at `stopTouching` as well. */
  untilTold?: boolean;
  /** Pause between two reads; 0: as fast as they go. */
  everyMs: number;
  /** Reads that took less were of pages already present. */
  faultThresholdUs: number;
}

export interface TouchFigures {
  latenciesUs: Float64Array;
  reads: number;
  seconds: number;
}

/** Reads between two turns of the event loop, of a toucher that is to be stopped. */
const listenEvery = 16;
const pause = new Int32Array(new SharedArrayBuffer(4));

/** A turn of the event loop, in which calls are answered. */
const turn = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

async function touch(parameters: TouchParameters): Promise<TouchFigures> {
  const { touches, everyMs, faultThresholdUs, skip = 0, untilTold = false } = parameters;
  const { pageSize } = must(region);
  const engine = must(receiver);
  const pages = memory.length / pageSize;
  const order = shuffledPages(pages, parameters.seed).subarray(skip);
  if (parameters.order === 'sequential') order.sort();
  const latencies = new Float64Array(Math.min(touches, order.length));
  /** Often enough to notice the end, seldom enough not to disturb. */
  const lookEvery = everyMs > 0 ? 1 : 256;
  let faults = 0;
  let reads = 0;
  let sum = 0;
  const begin = performance.now();
  while (reads < latencies.length) {
    const at = (order[reads] as number) * pageSize;
    const start = performance.now();
    sum += memory[at] as number;
    const us = (performance.now() - start) * 1000;
    if (us >= faultThresholdUs) latencies[faults++] = us;
    reads++;
    if (everyMs > 0) Atomics.wait(pause, 0, 0, everyMs);
    if (reads % lookEvery === 0 && engine.stats().pagesMissing === 0) break;
    if (untilTold && reads % listenEvery === 0) {
      await turn();
      if (toldToStop) break;
    }
  }
  const seconds = (performance.now() - begin) / 1000;
  if (sum < 0) throw new Error('unreachable: keeps the reads');
  return { latenciesUs: latencies.slice(0, faults), reads, seconds };
}

answerCalls(
  {
    allocate: ({ lengthBytes, touched }: { lengthBytes: number; touched: boolean }) => {
      region = addon.allocate(lengthBytes);
      memory = new Uint8Array(region.buffers()[0] as ArrayBuffer);
      if (touched) memory.fill(1);
    },
    listen: ({ host }: { host: string }) => {
      listener = addon.createListener(host, 0, () => {});
      return listener.port;
    },
    receive: (parameters: ReceiveParameters) => {
      receiver = addon.createReceiver({
        encodings: 0,
        ...parameters,
        regions: [must(region)],
        sourceless: false,
        keepPageHashes: false,
        recoverTimeoutMs: 2000,
        lossGraceMs: 100,
        onEvent: (event) => {
          if (event.kind === 'failed' || event.kind === 'lost') failure = `${event.code} ${event.message}`;
          if (event.kind === 'complete') onComplete();
        },
      });
      must(listener).add(receiver);
    },
    touch,
    stopTouching: () => {
      toldToStop = true;
    },
    limit: ({ bandwidth, gatherLimit }: Pick<ReceiveParameters, 'bandwidth' | 'gatherLimit'>) =>
      must(receiver).limit(bandwidth, gatherLimit),
    complete: () => complete,
    stats: (): NativeReceiverStats => {
      if (failure !== null) throw new Error(`the receiver failed: ${failure}`);
      return must(receiver).stats();
    },
    hash: () => addon.hash(memory),
  },
  () => {
    receiver?.close();
    listener?.close();
    region?.close();
  },
);
