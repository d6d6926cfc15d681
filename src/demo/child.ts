/**
 * The demo's processes and how they talk: the driver forks each one and calls it over Node's IPC channel, one
 * answer a call, every call with a deadline. A child never outlives the driver: it ends itself the moment the
 * channel closes, however the driver ended.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { memferryError } from '../errors.js';

interface Call {
  call: number;
  method: string;
  argument: unknown;
}

interface Answer {
  answer: number;
  value?: unknown;
  error?: { code: string; message: string; stack: string };
}

interface Notice {
  notice: string;
  value: unknown;
}

export type Handlers = Record<string, (argument: never) => unknown>;

/** After SIGTERM, before SIGKILL. */
const GRACE_MS = 1000;

/** An error that came over the channel: the code and the text of the one thrown there. */
export class RemoteError extends Error {
  readonly code: string;
  constructor(where: string, error: { code: string; message: string; stack: string }) {
    super(error.message);
    this.name = 'RemoteError';
    this.code = error.code;
    this.stack = `${error.stack}\n    in ${where}`;
  }
}

/** The driver's side of one child. */
export class DemoProcess {
  readonly name: string;
  #child: ChildProcess;
  #calls = new Map<number, { resolve: (value: unknown) => void; reject: (error: Error) => void }>();
  #nextCall = 1;
  #exited: Promise<void>;
  #gone: Error | null = null;
  #onNotice: (notice: string, value: unknown) => void;

  constructor(name: string, module: URL, onNotice: (notice: string, value: unknown) => void = () => {}) {
    this.name = name;
    this.#onNotice = onNotice;
    // Standard output is the driver's alone, where it may be JSON.
    this.#child = fork(module, { stdio: ['ignore', 2, 2, 'ipc'], serialization: 'advanced', execArgv: [] });
    this.#exited = new Promise((resolve) => {
      this.#child.once('exit', (code, signal) => {
        this.#over(`${name} ended unexpectedly (${signal ?? `exit code ${code}`})`);
        resolve();
      });
      this.#child.once('error', (error) => {
        this.#over(`${name} did not start: ${error.message}`);
        if (this.#child.pid === undefined) resolve();
      });
    });
    this.#child.on('message', (message: Answer | Notice) => this.#receive(message));
  }

  get pid(): number | undefined {
    return this.#child.pid;
  }

  /** By force and without waiting, for the driver's own last moment. */
  kill(): void {
    this.#child.kill('SIGKILL');
  }

  /** Rejects with a RemoteError, when the child ends, or after the deadline. */
  call<T>(method: string, argument: unknown, deadlineMs: number): Promise<T> {
    if (this.#gone) return Promise.reject(this.#gone);
    const call = this.#nextCall++;
    return new Promise<T>((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#calls.delete(call);
        reject(memferryError('PEER_LOST', `${this.name} did not answer '${method}' within ${deadlineMs} ms`));
      }, deadlineMs);
      this.#calls.set(call, {
        resolve: (value) => {
          clearTimeout(timer);
          resolve(value as T);
        },
        reject: (error) => {
          clearTimeout(timer);
          reject(error);
        },
      });
      this.#child.send({ call, method, argument } satisfies Call, (error) => {
        if (error) this.#over(`${this.name} cannot be reached: ${error.message}`);
      });
    });
  }

  /** Ends the child, by force if it must be; resolves when it is gone. */
  async end(): Promise<void> {
    this.#gone ??= new Error(`${this.name} was ended`);
    if (this.#child.exitCode !== null || this.#child.signalCode !== null) return;
    this.#child.kill('SIGTERM');
    const force = setTimeout(() => this.#child.kill('SIGKILL'), GRACE_MS);
    await this.#exited;
    clearTimeout(force);
  }

  #receive(message: Answer | Notice): void {
    if ('notice' in message) {
      this.#onNotice(message.notice, message.value);
      return;
    }
    const waiting = this.#calls.get(message.answer);
    this.#calls.delete(message.answer);
    if (message.error) waiting?.reject(new RemoteError(this.name, message.error));
    else waiting?.resolve(message.value);
  }

  #over(why: string): void {
    this.#gone ??= memferryError('PEER_LOST', why);
    for (const waiting of this.#calls.values()) waiting.reject(this.#gone);
    this.#calls.clear();
  }
}

/** The child's side: serves calls until the driver is gone. */
export function serve(handlers: Handlers): { notify(notice: string, value: unknown): void } {
  if (!process.send)
    throw memferryError('INVALID_ARGUMENT', 'this is a part of the demo, not a program of its own');
  const reply = (message: Answer | Notice) => {
    if (process.connected) process.send?.(message);
  };
  process.on('message', async ({ call, method, argument }: Call) => {
    try {
      const handler = handlers[method];
      if (!handler) throw memferryError('INVALID_ARGUMENT', `no method '${method}'`);
      reply({ answer: call, value: await handler(argument as never) });
    } catch (thrown) {
      const error = thrown instanceof Error ? thrown : new Error(String(thrown));
      const code = (error as { code?: unknown }).code;
      reply({
        answer: call,
        error: {
          code: typeof code === 'string' ? code : 'ERROR',
          message: error.message,
          stack: error.stack ?? error.message,
        },
      });
    }
  });
  // Nothing here is worth an orderly end, and an orderly one could wait for a thread.
  process.on('disconnect', () => process.kill(process.pid, 'SIGKILL'));
  process.on('SIGTERM', () => process.kill(process.pid, 'SIGKILL'));
  // Ctrl-C goes to the whole group of processes: the driver is the one that answers it.
  process.on('SIGINT', () => {});
  return { notify: (notice, value) => reply({ notice, value }) };
}
