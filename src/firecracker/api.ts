/**
 * Firecracker's API, as far as moving a microVM needs it: HTTP over its unix socket.
 */
import { request } from 'node:http';
import { z } from 'zod';
import { memferryError } from '../errors.js';
import { milliseconds, parse } from '../options/fields.js';

const mostAnswerBytes = 2 ** 16;

/** Without a path it would be a connection to port 80. */
const apiSchema = z.strictObject({
  socketPath: z.string('expected the path of a socket').min(1, 'expected the path of a socket'),
  timeoutMs: milliseconds,
});

/**
 * Firecracker's API over its socket. Every call rejects with SYSTEM when Firecracker refuses, with its words, and when
 * it does not answer in time.
 */
export class FirecrackerApi {
  /** Connects with each call. @throws INVALID_ARGUMENT */
  constructor(
    /** Firecracker's `--api-sock`. */
    readonly socketPath: string,
    /** For each answer, in ms. Loading touches guest memory, which may have to come from afar. */
    private readonly timeoutMs = 60_000,
  ) {
    parse(apiSchema, { socketPath, timeoutMs }, 'FirecrackerApi');
  }

  /** The microVM stays paused. `memfd`: a fork's, which backs the memory with a file then. */
  async loadSnapshot(
    snapshotPath: string,
    handlerSocket: string,
    options: { signal?: AbortSignal; memfd?: boolean } = {},
  ): Promise<void> {
    const memory = {
      backend_type: 'Uffd',
      backend_path: handlerSocket,
      ...(options.memfd ? { use_memfd: true } : {}),
    };
    const body = { snapshot_path: snapshotPath, mem_backend: memory, resume_vm: false };
    await this.#call('PUT', '/snapshot/load', body, options.signal);
  }

  /** No virtual CPU runs from here on. */
  pause(signal?: AbortSignal): Promise<void> {
    return this.#call('PATCH', '/vm', { state: 'Paused' }, signal);
  }

  /** It runs from here on. */
  resume(signal?: AbortSignal): Promise<void> {
    return this.#call('PATCH', '/vm', { state: 'Resumed' }, signal);
  }

  /** Of a paused microVM. Without `memoryPath` the state alone, which only forks can. */
  createSnapshot(snapshotPath: string, memoryPath: string | null, signal?: AbortSignal): Promise<void> {
    const memory = memoryPath === null ? {} : { mem_file_path: memoryPath };
    const body = { snapshot_type: 'Full', snapshot_path: snapshotPath, ...memory };
    return this.#call('PUT', '/snapshot/create', body, signal);
  }

  #call(method: string, path: string, body: object, signal: AbortSignal | undefined): Promise<void> {
    const text = JSON.stringify(body);
    return new Promise((resolve, reject) => {
      const fail = (why: string, cause?: unknown) =>
        reject(memferryError('SYSTEM', `Firecracker: ${method} ${path}: ${why}`, { cause }));
      const call = request(
        {
          socketPath: this.socketPath,
          method,
          path,
          headers: { 'content-type': 'application/json', 'content-length': Buffer.byteLength(text) },
          timeout: this.timeoutMs,
          ...(signal ? { signal } : {}),
        },
        (answer) => {
          let said = '';
          answer.setEncoding('utf8').on('data', (part: string) => {
            said += part;
            if (said.length > mostAnswerBytes) answer.destroy(new Error('an answer without end'));
          });
          answer.once('error', (error) => fail(error.message, error));
          answer.once('end', () => {
            const status = answer.statusCode ?? 0;
            if (status >= 200 && status < 300) resolve();
            else fail(`${status}: ${faultOf(said)}`);
          });
        },
      );
      call.once('timeout', () => call.destroy(new Error(`no answer within ${this.timeoutMs} ms`)));
      call.once('error', (error) => fail(error.message, error));
      call.end(text);
    });
  }
}

function faultOf(text: string): string {
  try {
    const { fault_message: fault } = JSON.parse(text) as { fault_message?: unknown };
    if (typeof fault === 'string') return fault.slice(0, 1000);
  } catch {
    // Not JSON: as it is.
  }
  return text.slice(0, 1000).replace(/\s+/g, ' ');
}
