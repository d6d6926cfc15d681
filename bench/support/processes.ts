/**
 * Child processes of a trial: floors that print one JSON object, servers that print their port first, and
 * peers, Node processes that answer calls. Whatever happens they end with the trial.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { compiledDirectory, floorsDirectory } from './paths.js';

const children = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL');
});

function track(child: ChildProcess): ChildProcess {
  children.add(child);
  child.once('exit', () => children.delete(child));
  child.once('error', () => children.delete(child));
  return child;
}

/** The command as it is, or inside a network namespace. */
function inside(namespace: string | null, command: string, args: string[]): [string, string[]] {
  return namespace === null ? [command, args] : ['ip', ['netns', 'exec', namespace, command, ...args]];
}

export interface CommandOptions {
  namespace?: string | null;
  timeoutMs?: number;
}

/** Runs a program to its end; its standard output. Rejects on another exit status than 0. */
export function runCommand(command: string, args: string[], options: CommandOptions = {}): Promise<string> {
  const [program, all] = inside(options.namespace ?? null, command, args);
  return new Promise((resolve, reject) => {
    const child = track(spawn(program, all, { stdio: ['ignore', 'pipe', 'pipe'] }));
    const timeoutMs = options.timeoutMs ?? 120_000;
    const timer = setTimeout(() => child.kill('SIGKILL'), timeoutMs);
    let output = '';
    let complaint = '';
    child.stdout?.setEncoding('utf8').on('data', (text: string) => {
      output += text;
    });
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      complaint += text;
    });
    child.once('error', (error) => {
      clearTimeout(timer);
      reject(error);
    });
    child.once('close', (status, signal) => {
      clearTimeout(timer);
      if (status === 0) resolve(output);
      else reject(new Error(`${command} ${args.join(' ')}: ${signal ?? status}: ${complaint.trim()}`));
    });
  });
}

/** Runs a floor; the object that it prints. */
export async function runFloor<T>(
  name: string,
  args: (string | number)[],
  options?: CommandOptions,
): Promise<T> {
  return JSON.parse(await runCommand(join(floorsDirectory, name), args.map(String), options)) as T;
}

export interface FloorServer {
  port: number;
  /** Resolves when the server has ended by itself; kills it after a bound. */
  ended(): Promise<void>;
}

/** Starts a floor's server side, which prints {"port":N} and serves one client. */
export async function startFloorServer(
  name: string,
  args: (string | number)[],
  namespace: string | null,
): Promise<FloorServer> {
  const [program, all] = inside(namespace, join(floorsDirectory, name), args.map(String));
  const child = track(spawn(program, all, { stdio: ['ignore', 'pipe', 'inherit'] }));
  const exited = new Promise<void>((resolve) => child.once('close', () => resolve()));
  const lines = createInterface({ input: child.stdout as NodeJS.ReadableStream });
  const first = await new Promise<string>((resolve, reject) => {
    lines.once('line', resolve);
    child.once('error', reject);
    child.once('exit', (status) => reject(new Error(`${name} ended with ${status} before it listened`)));
  });
  return {
    port: (JSON.parse(first) as { port: number }).port,
    ended: async () => {
      const timer = setTimeout(() => child.kill('SIGKILL'), 5000);
      await exited;
      clearTimeout(timer);
    },
  };
}

interface Reply {
  id: number;
  value?: unknown;
  error?: string;
}

/** A Node process that answers calls (see peer.ts for its side). */
export class Peer {
  readonly #child: ChildProcess;
  readonly #waiting = new Map<number, { resolve: (value: never) => void; reject: (error: Error) => void }>();
  #nextId = 1;
  readonly #exited: Promise<void>;

  private constructor(child: ChildProcess, script: string) {
    this.#child = child;
    child.on('message', (message: Reply) => {
      const waiter = this.#waiting.get(message.id);
      this.#waiting.delete(message.id);
      if (message.error === undefined) waiter?.resolve(message.value as never);
      else waiter?.reject(new Error(`${script}: ${message.error}`));
    });
    this.#exited = new Promise((resolve) => {
      const over = (why: string): void => {
        for (const waiter of this.#waiting.values()) waiter.reject(new Error(`${script} ended: ${why}`));
        this.#waiting.clear();
        resolve();
      };
      child.once('exit', (status, signal) => over(String(signal ?? status)));
      child.once('error', (error) => over(error.message));
    });
  }

  /** `script` is a path below bench/, without its extension. */
  static start(script: string, options: { namespace?: string | null; args?: string[] } = {}): Peer {
    const file = join(compiledDirectory, `${script}.js`);
    const [program, all] = inside(options.namespace ?? null, process.execPath, [
      file,
      ...(options.args ?? []),
    ]);
    const child = spawn(program, all, {
      stdio: ['ignore', 'inherit', 'inherit', 'ipc'],
      serialization: 'advanced',
    });
    return new Peer(track(child), script);
  }

  get pid(): number {
    return this.#child.pid as number;
  }

  call<T>(method: string, parameters: unknown = null, timeoutMs = 120_000): Promise<T> {
    const id = this.#nextId++;
    return new Promise<T>((resolve, reject) => {
      if (!this.#child.connected) {
        reject(new Error(`the peer has ended before ${method}`));
        return;
      }
      const timer = setTimeout(() => {
        this.#waiting.delete(id);
        reject(new Error(`${method}: no answer within ${timeoutMs} ms`));
      }, timeoutMs);
      const settle =
        <V>(next: (value: V) => void) =>
        (value: V): void => {
          clearTimeout(timer);
          next(value);
        };
      this.#waiting.set(id, { resolve: settle(resolve), reject: settle(reject) });
      this.#child.send({ id, method, parameters });
    });
  }

  /** Lets the process end by itself, and makes it after a bound. */
  async stop(): Promise<void> {
    if (this.#child.connected) this.#child.disconnect();
    const timer = setTimeout(() => this.#child.kill('SIGKILL'), 5000);
    await this.#exited;
    clearTimeout(timer);
  }
}
