/**
 * QMP, QEMU's control protocol (a JSON object a line over a unix socket): commands with ids, events, and bounds on
 * everything. What comes from QEMU is not trusted: it may be another program that listens there, or a QEMU that hangs.
 * JavaScript thread.
 */
import { EventEmitter } from 'node:events';
import { createConnection, type Socket } from 'node:net';
import { z } from 'zod';
import { loadAddon } from '../addon.js';
import { MemferryError, memferryError } from '../errors.js';
import { abortError } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';

/** The longest answer that is asked for here has some ten KiB. */
const maxLineBytes = 1 << 20;
const maxPending = 64;
const defaultTimeoutMs = 5_000;
const busyPauseMs = 20;

const greetingSchema = z.object({
  QMP: z.object({
    version: z.object({
      qemu: z.object({ major: z.number().int(), minor: z.number().int(), micro: z.number().int() }),
      package: z.string().optional(),
    }),
  }),
});
const eventSchema = z.object({
  event: z.string().max(128),
  data: z.record(z.string(), z.unknown()).optional(),
});
const answerSchema = z.object({
  id: z.number().int(),
  return: z.unknown().optional(),
  error: z.object({ class: z.string(), desc: z.string() }).optional(),
});

export interface QmpEvent {
  name: string;
  data: Record<string, unknown>;
}

export interface QmpOptions {
  signal?: AbortSignal | undefined;
  timeoutMs?: number | undefined;
}

/** Emits `event` (QmpEvent). */
export class Qmp extends EventEmitter implements AsyncDisposable {
  /** As `7.2.22`. */
  version = '';
  readonly #socket: Socket;
  readonly #pending = new Map<number, { answer: Deferred<unknown>; command: string }>();
  readonly #greeting = deferred<string>();
  readonly #closed = deferred<MemferryError>();
  #nextId = 1;
  /** What has come of a line. */
  #pieces: Buffer[] = [];
  #held = 0;

  private constructor(
    readonly path: string,
    socket: Socket,
  ) {
    super();
    // Many may wait for an event at once.
    this.setMaxListeners(maxPending);
    this.#socket = socket;
    socket.on('data', (piece) => this.#onData(piece));
    socket.once('error', (cause) =>
      this.#end(memferryError('PEER_LOST', `QEMU at ${path}: ${cause.message}`, { cause })),
    );
    socket.once('close', () =>
      this.#end(memferryError('PEER_LOST', `QEMU at ${path} has closed its QMP socket`)),
    );
  }

  /**
   * Connects and leaves the mode in which nothing but the greeting is said.
   * @throws CONNECT_FAILED when nobody listens there or answers (QEMU speaks to one client at a time), PROTOCOL_ERROR
   */
  static async connect(path: string, options: QmpOptions = {}): Promise<Qmp> {
    const { signal, timeoutMs = defaultTimeoutMs } = options;
    const deadline = performance.now() + timeoutMs;
    for (;;) {
      if (signal?.aborted) throw abortError(signal);
      try {
        return await Qmp.#connect(path, { signal, timeoutMs: Math.max(1, deadline - performance.now()) });
      } catch (error) {
        // QEMU's queue has room for one, and somebody who has just let go may still be in it.
        const { cause } = error as { cause?: { code?: unknown } };
        if (cause?.code !== 'EAGAIN' || performance.now() >= deadline) throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, busyPauseMs));
    }
  }

  static async #connect(
    path: string,
    { signal, timeoutMs }: { signal: AbortSignal | undefined; timeoutMs: number },
  ): Promise<Qmp> {
    const qmp = new Qmp(path, createConnection({ path }));
    try {
      qmp.version = await qmp.#bounded(
        qmp.#greeting.promise,
        { signal, timeoutMs },
        () =>
          new MemferryError(
            'CONNECT_FAILED',
            `${path} does not greet as QMP does within ${Math.round(timeoutMs)} ms: another client may hold it, or it is none`,
          ),
      );
      await qmp.execute('qmp_capabilities', {}, { signal, timeoutMs });
      return qmp;
    } catch (error) {
      await qmp.close();
      if (error instanceof MemferryError && error.code === 'PEER_LOST') {
        throw memferryError('CONNECT_FAILED', error.message, { cause: error.cause ?? error });
      }
      throw error;
    }
  }

  /** Whose socket it is, as the kernel says; 0 where that is not visible. */
  get peerPid(): number {
    const fd = (this.#socket as unknown as { _handle?: { fd?: number } | null })._handle?.fd;
    if (fd === undefined || fd < 0) return 0;
    try {
      return loadAddon().peerPid(fd);
    } catch {
      return 0;
    }
  }

  get isClosed(): boolean {
    return this.#closed.settled;
  }

  /** Resolves with the reason when the connection has ended. */
  get closed(): Promise<MemferryError> {
    return this.#closed.promise;
  }

  /**
   * Gives what the command returns.
   * @throws QEMU_REFUSED with QEMU's own words, PEER_LOST, CANCELLED; LIMIT_EXCEEDED
   */
  async execute(command: string, args: object = {}, options: QmpOptions = {}): Promise<unknown> {
    if (this.#closed.settled) throw await this.#closed.promise;
    if (this.#pending.size >= maxPending) {
      throw memferryError('LIMIT_EXCEEDED', `${maxPending} QMP commands wait for their answers already`);
    }
    const { signal, timeoutMs = defaultTimeoutMs } = options;
    if (signal?.aborted) throw abortError(signal);
    const id = this.#nextId++;
    const answer = deferred<unknown>();
    this.#pending.set(id, { answer, command });
    this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\r\n`);
    // An answer that comes late is nobody's any more; its place stays taken until it comes.
    return await this.#bounded(
      answer.promise,
      { signal, timeoutMs },
      () =>
        new MemferryError(
          'PEER_LOST',
          `QEMU at ${this.path} does not answer ${command} within ${timeoutMs} ms`,
          {
            facts: { command, timeoutMs },
          },
        ),
    );
  }

  /**
   * Resolves with the first event that `wanted` accepts. Ask before the command that brings it about.
   * @throws PEER_LOST when it does not come in time or QEMU ends, CANCELLED
   */
  async event(
    wanted: (event: QmpEvent) => boolean,
    what: string,
    { signal, timeoutMs = defaultTimeoutMs }: QmpOptions = {},
  ): Promise<QmpEvent> {
    const found = deferred<QmpEvent>();
    const listener = (event: QmpEvent) => {
      if (wanted(event)) found.resolve(event);
    };
    this.on('event', listener);
    try {
      const ended = this.#closed.promise.then((reason) => Promise.reject(reason));
      ended.catch(() => {});
      return await this.#bounded(
        Promise.race([found.promise, ended]),
        { signal, timeoutMs },
        () =>
          new MemferryError('PEER_LOST', `QEMU at ${this.path}: ${what} did not come within ${timeoutMs} ms`),
      );
    } finally {
      this.off('event', listener);
    }
  }

  async close(): Promise<void> {
    this.#end(memferryError('CANCELLED', 'the QMP connection was closed'));
    await this.#closed.promise;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  async #bounded<T>(
    promise: Promise<T>,
    { signal, timeoutMs }: { signal: AbortSignal | undefined; timeoutMs: number },
    late: () => MemferryError,
  ): Promise<T> {
    promise.catch(() => {});
    let timer: NodeJS.Timeout | undefined;
    let stop = () => {};
    try {
      return await new Promise<T>((resolve, reject) => {
        timer = setTimeout(() => reject(late()), timeoutMs);
        stop = () => reject(abortError(signal as AbortSignal));
        signal?.addEventListener('abort', stop, { once: true });
        promise.then(resolve, reject);
      });
    } finally {
      clearTimeout(timer);
      signal?.removeEventListener('abort', stop);
    }
  }

  #onData(piece: Buffer): void {
    let rest = piece;
    for (;;) {
      const end = rest.indexOf(10);
      const taken = end < 0 ? rest : rest.subarray(0, end);
      if (this.#held + taken.length > maxLineBytes) {
        this.#end(
          memferryError('PROTOCOL_ERROR', `${this.path} sends a line of more than ${maxLineBytes} bytes`),
        );
        return;
      }
      this.#pieces.push(taken);
      this.#held += taken.length;
      if (end < 0) return;
      const line = Buffer.concat(this.#pieces).toString('utf8');
      this.#pieces = [];
      this.#held = 0;
      if (line.trim() !== '') this.#onLine(line);
      if (this.#closed.settled) return;
      rest = rest.subarray(end + 1);
    }
  }

  #onLine(line: string): void {
    let value: unknown;
    try {
      value = JSON.parse(line);
    } catch (cause) {
      this.#end(
        memferryError('PROTOCOL_ERROR', `${this.path} does not speak QMP: a line is not JSON`, { cause }),
      );
      return;
    }
    if (!this.#greeting.settled) {
      const greeting = greetingSchema.safeParse(value);
      if (!greeting.success) {
        this.#end(
          memferryError(
            'PROTOCOL_ERROR',
            `${this.path} does not speak QMP: it does not begin with a greeting`,
          ),
        );
        return;
      }
      const { major, minor, micro } = greeting.data.QMP.version.qemu;
      this.#greeting.resolve(`${major}.${minor}.${micro}`);
      return;
    }
    const event = eventSchema.safeParse(value);
    if (event.success) {
      this.emit('event', { name: event.data.event, data: event.data.data ?? {} } satisfies QmpEvent);
      return;
    }
    const answer = answerSchema.safeParse(value);
    const pending = answer.success ? this.#pending.get(answer.data.id) : undefined;
    if (!answer.success || !pending) {
      this.#end(memferryError('PROTOCOL_ERROR', `${this.path}: an answer that nobody has asked for`));
      return;
    }
    this.#pending.delete(answer.data.id);
    const { error } = answer.data;
    if (error) {
      const { command } = pending;
      pending.answer.reject(
        memferryError('QEMU_REFUSED', `QEMU refuses ${command}: ${error.desc}`, {
          facts: { command, class: error.class },
        }),
      );
    } else {
      pending.answer.resolve(answer.data.return);
    }
  }

  #end(reason: MemferryError): void {
    if (this.#closed.settled) return;
    this.#closed.resolve(reason);
    this.#socket.destroy();
    this.#pieces = [];
    this.#greeting.reject(reason);
    for (const { answer } of this.#pending.values()) answer.reject(reason);
    this.#pending.clear();
  }
}
