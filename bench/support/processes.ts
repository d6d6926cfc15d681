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

/** Where a program runs. */
export interface Place {
  /** A network namespace; without one in the trial's own. */
  namespace?: string | null;
  /** Files that a process writes its id to (cgroup.procs), before the program begins. */
  cgroups?: readonly string[];
}

/** Joins the cgroups named up to `--`, then becomes the command. */
const joining = 'while [ "$1" != -- ]; do echo $$ > "$1" || exit 125; shift; done; shift; exec "$@"';

/** The command as it is, or inside a network namespace and cgroups. */
function inside({ namespace, cgroups }: Place, command: string, args: string[]): [string, string[]] {
  const [program, all] = namespace ? ['ip', ['netns', 'exec', namespace, command, ...args]] : [command, args];
  // First the cgroups: `ip netns exec` mounts a /sys of its own.
  return cgroups?.length ? ['sh', ['-c', joining, 'sh', ...cgroups, '--', program, ...all]] : [program, all];
}

export interface CommandOptions extends Place {
  timeoutMs?: number;
}

/** Runs a program to its end; its standard output. Rejects on another exit status than 0. */
export function runCommand(command: string, args: string[], options: CommandOptions = {}): Promise<string> {
  const [program, all] = inside(options, command, args);
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

export interface Server {
  readonly pid: number;
  /** The first line that it printed. */
  readonly first: string;
  /** Resolves when it has ended by itself; kills it after a bound. */
  ended(): Promise<void>;
  /** SIGTERM, then, after the same bound, SIGKILL. */
  stop(): Promise<void>;
}

const endTimeoutMs = 5000;

/** Starts a program that prints a line when it is ready, and goes on. */
export async function startServer(
  command: string,
  args: string[],
  options: CommandOptions = {},
): Promise<Server> {
  const [program, all] = inside(options, command, args);
  const child = track(spawn(program, all, { stdio: ['ignore', 'pipe', 'inherit'] }));
  const exited = new Promise<void>((resolve) => child.once('close', () => resolve()));
  const lines = createInterface({ input: child.stdout as NodeJS.ReadableStream });
  const timer = setTimeout(() => child.kill('SIGKILL'), options.timeoutMs ?? 60_000);
  const first = await new Promise<string>((resolve, reject) => {
    lines.once('line', resolve);
    child.once('error', reject);
    child.once('exit', (status, signal) =>
      reject(new Error(`${command} ended with ${signal ?? status} before it was ready`)),
    );
  }).finally(() => clearTimeout(timer));
  const ended = async (): Promise<void> => {
    const late = setTimeout(() => child.kill('SIGKILL'), endTimeoutMs);
    await exited;
    clearTimeout(late);
  };
  return {
    pid: child.pid as number,
    first,
    ended,
    stop: () => {
      child.kill('SIGTERM');
      return ended();
    },
  };
}

export interface FloorServer extends Server {
  readonly port: number;
}

/** Starts a floor's server side, which prints {"port":N} and serves one client. */
export async function startFloorServer(
  name: string,
  args: (string | number)[],
  namespace: string | null,
  place: Place = {},
): Promise<FloorServer> {
  const server = await startServer(join(floorsDirectory, name), args.map(String), { ...place, namespace });
  return { ...server, port: (JSON.parse(server.first) as { port: number }).port };
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
  static start(script: string, options: Place & { args?: string[] } = {}): Peer {
    const file = join(compiledDirectory, `${script}.js`);
    const [program, all] = inside(options, process.execPath, [file, ...(options.args ?? [])]);
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
