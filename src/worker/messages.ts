/** What the main thread and a guest's worker say to each other, over a MessagePort of their own. */
import type { MessagePort } from 'node:worker_threads';

/** Words of the shared control block. */
export const Word = {
  /**
   * 0: the guest runs. n > 0: pause attempt n is asked for. -n: the worker stands still in attempt n, which it
   * enters by compare-and-exchange from n, so that a cancelled attempt and a granted one cannot cross.
   */
  pause: 0,
  /** Counts messages to a worker that stands still before its guest has arrived. */
  wake: 1,
  /** 1: its modules are loaded, or could not be. */
  loaded: 2,
  length: 3,
} as const;

/** The pause word of a worker whose guest has not arrived yet. */
export const NOT_ARRIVED = -1;

export interface BootData {
  port: MessagePort;
  control: Int32Array;
  /** Of the guest's module. */
  url: string;
  name: string;
  worker: number;
  workers: number;
  data: unknown;
  sharedHeap: Uint8Array[];
  /** The lengths in bytes to set up for a guest that arrives; null in its first life. */
  plan: { memoryBytes: number[]; heapBytes: number[] } | null;
  /** A shared WebAssembly.Memory that all workers of the guest import, or null. */
  sharedMemory: unknown;
}

/** Structured clone loses an error's class and code; this keeps what the other side needs. */
export interface PlainError {
  name: string;
  code: string | null;
  message: string;
  names: string[];
  stack: string | null;
}

export interface WorkerRegion {
  kind: 'memory' | 'heap';
  /** The memory's or heap's number in its worker. */
  index: number;
  id: string;
  lengthBytes: number;
}

/** What building the guest made that is no memory, and that the other side must have made as well. */
export interface WorkerBuild {
  /** Host functions made into WebAssembly functions. */
  functions: number;
  /** A digest of the host values in tables and globals, 16 hex digits. */
  references: string;
  /** What the guest's `layout` gave. */
  layout: string[];
  /** By number: memories that the program made longer while it was built. */
  grown: number[];
}

/** What the source must know of the worker before a migration. */
export interface WorkerShape {
  regions: WorkerRegion[];
  instances: string[];
  unmovable: string[];
  build: WorkerBuild;
  /** Names of host functions and objects, registered so far. */
  hostFunctions: string[];
}

export interface WorkerStateEnvelope {
  wasm: unknown;
  app: unknown;
}

export type ToWorker =
  | { type: 'request'; id: number; value: unknown }
  | { type: 'pause'; attempt: number }
  | { type: 'check'; id: number }
  | {
      type: 'grow';
      kind: 'memory' | 'heap';
      index: number;
      lengthBytes: number;
    }
  | { type: 'prepare'; state: Uint8Array };

export type FromWorker =
  | { type: 'ready'; shape: WorkerShape }
  | { type: 'shape'; shape: WorkerShape }
  | { type: 'failed'; error: PlainError }
  | { type: 'reply'; id: number; value: unknown }
  | { type: 'threw'; id: number; error: PlainError }
  | { type: 'checked'; id: number; error: PlainError | null }
  | {
      type: 'paused';
      attempt: number;
      /** By the clock of `process.hrtime`: the guest's last instruction. */
      sinceNs: bigint;
      state: Uint8Array;
      returned: number[];
      lengths: number[];
    }
  | { type: 'refused'; attempt: number; error: PlainError }
  | { type: 'grown'; lengthBytes: number }
  | { type: 'prepared' }
  | { type: 'message'; value: unknown };

export function plainError(error: unknown): PlainError {
  const { name, code, message, names, stack } = Object(error) as Record<string, unknown>;
  const facts = Object(Object(error).facts) as Record<string, unknown>;
  const list = Array.isArray(names) ? names : facts.names;
  return {
    name: typeof name === 'string' ? name : 'Error',
    code: typeof code === 'string' ? code : null,
    message: typeof message === 'string' ? message : String(error),
    names: Array.isArray(list) ? list.map(String) : [],
    stack: typeof stack === 'string' ? stack : null,
  };
}
