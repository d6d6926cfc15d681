/** The source process of a trial below the public API: a region of random bytes and a sender. */
import type {
  NativeEvent,
  NativeRegion,
  NativeSender,
  NativeSenderStats,
  NativeStageServer,
  NativeTracker,
} from '../../lib/native.js';
import { loadAddon } from './addon.js';
import { allEncodings, compressions } from './encodings.js';
import { fillFrom, fillRandom, fillShared, shuffledPages } from './memory.js';
import { answerCalls, monotonicMs } from './peer.js';

const addon = loadAddon();
let region: NativeRegion | null = null;
let memory: Uint8Array = new Uint8Array(0);
let sender: NativeSender | null = null;
let pushStartMs = 0;
let rounds = 1;

type Kind = NativeEvent['kind'];
const arrived = new Map<Kind, number>();
const waiting = new Map<Kind, { resolve: (atMs: number) => void; reject: (error: Error) => void }>();
let failure: Error | null = null;

function onEvent(event: NativeEvent): void {
  if (event.kind === 'failed') {
    failure = new Error(`the sender failed: ${event.code} ${event.message}`);
    for (const waiter of waiting.values()) waiter.reject(failure);
    waiting.clear();
    return;
  }
  arrived.set(event.kind, monotonicMs());
  waiting.get(event.kind)?.resolve(monotonicMs());
  waiting.delete(event.kind);
}

/** When the event came; each is waited for once. */
function next(kind: Kind): Promise<number> {
  const atMs = arrived.get(kind);
  arrived.delete(kind);
  if (atMs !== undefined) return Promise.resolve(atMs);
  if (failure !== null) return Promise.reject(failure);
  return new Promise<number>((resolve, reject) => waiting.set(kind, { resolve, reject })).finally(() =>
    arrived.delete(kind),
  );
}

function must<T>(value: T | null): T {
  if (value === null) throw new Error('called too early');
  return value;
}

export interface SendParameters {
  host: string;
  port: number;
  migration: Uint8Array;
  channels: number;
  tokens: Uint8Array;
  /** Of a scatter. */
  servers: NativeStageServer[];
  /** False: there is no destination, everything goes to the servers. */
  direct: boolean;
  compress?: 'auto' | 'lz4' | 'zstd' | 'off';
  deltaCacheBytes?: number;
  /** What is written is sent again by `writeAndCopy`. */
  tracked?: boolean;
  /** Of its deduplication domain; null: every page is sent. */
  dedupKey?: Uint8Array | null;
  /** Bytes a second; 0, or without it: no limit. */
  bandwidth?: number;
}

function trackerOf(of: NativeRegion): NativeTracker {
  const { name } = must(addon.probeTrackers().find(({ available }) => available) ?? null);
  const tracker = addon.makeTracker(name, of, 'anywhere', false);
  tracker.arm();
  return tracker;
}

/** A guest of which some pages are others' too. */
export interface SharedContent {
  lengthBytes: number;
  /** Of the pages that are alike in every guest with this seed. */
  seed: number;
  /** Of its own pages. */
  ownSeed: number;
  /** Pages in a thousand that are alike, the same ones everywhere. */
  alike: number;
}

answerCalls(
  {
    /** With a file its bytes, over and over; else random ones. */
    allocate: ({ lengthBytes, seed, file }: { lengthBytes: number; seed: number; file?: string | null }) => {
      region = addon.allocate(lengthBytes);
      const buffer = region.buffers()[0] as ArrayBuffer;
      memory = new Uint8Array(buffer);
      if (file) fillFrom(memory, file);
      else fillRandom(buffer, seed);
    },
    allocateShared: ({ lengthBytes, seed, ownSeed, alike }: SharedContent) => {
      region = addon.allocate(lengthBytes);
      const buffer = region.buffers()[0] as ArrayBuffer;
      fillShared(buffer, region.pageSize, { seed, ownSeed, alike });
      memory = new Uint8Array(buffer);
    },
    pages: () => must(region).pages(),
    connect: async ({ tracked = false, ...parameters }: SendParameters) => {
      sender = addon.createSender({
        compress: 'off',
        deltaCacheBytes: 0,
        referencesKey: null,
        ...parameters,
        destinationEncodings: allEncodings,
        serverEncodings: compressions,
        regions: [must(region)],
        toldPages: [must(region).pages()],
        trackers: [tracked ? trackerOf(must(region)) : null],
        bandwidth: parameters.bandwidth ?? 0,
        dedupKey: parameters.dedupKey ?? null,
        connectTimeoutMs: 5000,
        recoverTimeoutMs: 2000,
        replicas: 1,
        stallTimeoutMs: 3000,
        releaseAsEvicted: false,
        onEvent,
      });
      sender.connect();
      await next('connected');
    },
    /** One full round, until the last page is acknowledged. */
    copy: async (): Promise<{ startMs: number; endMs: number }> => {
      const startMs = monotonicMs();
      await must(sender).queuePopulated();
      must(sender).startRound(1, false);
      return { startMs, endMs: await next('round-done') };
    },
    /** Some bytes of a share of the pages are written, and exactly those pages sent again. */
    writeAndCopy: async ({ share, bytes, seed }: { share: number; bytes: number; seed: number }) => {
      const { pageSize } = must(region);
      const pages = memory.length / pageSize;
      for (const page of shuffledPages(pages, seed).subarray(0, Math.floor(pages * share))) {
        const at = page * pageSize + ((seed * 640) % (pageSize - bytes));
        for (let i = 0; i < bytes; i++) memory[at + i] = (memory[at + i] as number) + seed + i;
      }
      await must(sender).queueDirty();
      const startMs = monotonicMs();
      must(sender).startRound(++rounds, false);
      return { startMs, endMs: await next('round-done') };
    },
    switchOver: async () => {
      await must(sender).queuePopulated();
      must(sender).switchOver();
      await next('switched');
    },
    startPush: () => {
      pushStartMs = monotonicMs();
      must(sender).startPush();
    },
    /** Milliseconds from the push's start until every page is acknowledged. */
    evicted: async (): Promise<number> => (await next('evicted')) - pushStartMs,
    /** Nobody needs it any more: it says goodbye, as an evicted source does. The memory stays, to be compared. */
    leave: () => must(sender).close(true),
    stats: (): NativeSenderStats => must(sender).stats(),
    hash: () => addon.hash(memory),
  },
  () => {
    sender?.close(true);
    region?.close();
  },
);
