/**
 * A host process as the tests see it: requests, events that can be waited for, and an end that is never left
 * open. Every wait has a bound, and its failure says what was waited for and what happened instead.
 */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { held, heldAgain, type Inventory, inventory } from './leftovers.js';

const program = fileURLToPath(new URL('host-program.mjs', import.meta.url));
const BOUND_MS = 45_000;

export interface HostEvent {
  event: string;
  atMs: number;
  [fact: string]: unknown;
}

export interface ErrorFacts {
  code: string;
  message: string;
  facts: Record<string, never>;
}

export type Settled<T> = { ok: true; value: T } | { ok: false; error: ErrorFacts };

export interface RegionSpec {
  kind: 'allocate' | 'huge' | 'shared' | 'wasm' | 'wasm-shared';
  pages: number;
  maxPages?: number;
}

export interface Status {
  runs: boolean;
  intervals: [bigint, bigint][];
}

export interface Check {
  wrong: unknown[];
  pages: number;
  written: number;
}

/** In the hands of the test that runs. */
const all = new Set<Host>();
/** Cleaned up, and good for the next test: starting a process takes longer than most tests. */
const idle: Host[] = [];

export class Host {
  readonly events: HostEvent[] = [];
  readonly exited: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  readonly #child: ChildProcess;
  readonly #answers = new Map<number, { resolve(value: never): void; reject(error: Error): void }>();
  readonly #watchers = new Set<() => void>();
  #nextId = 1;
  #end: { code: number | null; signal: NodeJS.Signals | null } | null = null;
  #stderr = '';

  #baseline: Inventory | null = null;

  private constructor(
    public name: string,
    private readonly via: readonly string[],
  ) {
    const node = [process.execPath, '--no-warnings'];
    const [execPath, ...execArgv] = [...via, ...node] as [string, ...string[]];
    this.#child = fork(program, [], {
      serialization: 'advanced',
      execPath,
      execArgv,
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    });
    all.add(this);
    this.#child.stderr?.setEncoding('utf8').on('data', (text) => {
      this.#stderr = (this.#stderr + text).slice(-8192);
    });
    this.#child.on('message', (message) => this.#onMessage(message as Record<string, unknown>));
    this.exited = new Promise((resolve) => {
      this.#child.once('exit', (code, signal) => {
        this.#end = { code, signal };
        all.delete(this);
        if (idle.includes(this)) idle.splice(idle.indexOf(this), 1);
        const error = new Error(`${this.name} ended with ${signal ?? code}: ${this.#stderr}`);
        for (const { reject } of this.#answers.values()) reject(error);
        this.#answers.clear();
        this.#wake();
        resolve(this.#end);
      });
    });
  }

  /** `via`: a command that starts the process in its way (setpriv, ip netns exec) and becomes it. */
  static async start(name: string, via: readonly string[] = []): Promise<Host> {
    const ready = via.length === 0 ? idle.pop() : undefined;
    if (ready) {
      ready.name = name;
      ready.events.length = 0;
      all.add(ready);
      return ready;
    }
    const host = new Host(name, via);
    await host.until('ready', (event) => event.event === 'ready');
    host.#baseline = await inventory(host);
    return host;
  }

  get pid(): number {
    return this.#child.pid as number;
  }

  get alive(): boolean {
    return this.#end === null;
  }

  get stderr(): string {
    return this.#stderr;
  }

  call<T = void>(op: string, args: object = {}, boundMs = BOUND_MS): Promise<T> {
    if (this.#end) return Promise.reject(new Error(`${this.name} has ended: ${this.#stderr}`));
    const id = this.#nextId++;
    const answer = new Promise<T>((resolve, reject) => {
      this.#answers.set(id, { resolve: resolve as (value: never) => void, reject });
      // One that is ending hears nothing any more; its exit is the answer.
      this.#child.send({ id, op, ...args }, () => {});
    });
    return bounded(answer, boundMs, () => `${this.name}: ${op} was not answered; ${this.#story()}`);
  }

  /** The first event, also of those that have been, for which `wanted` holds. */
  until(what: string, wanted: (event: HostEvent) => boolean, boundMs = BOUND_MS): Promise<HostEvent> {
    let watcher: (() => void) | null = null;
    const found = new Promise<HostEvent>((resolve, reject) => {
      watcher = () => {
        const event = this.events.find(wanted);
        if (event) resolve(event);
        else if (this.#end) {
          reject(
            new Error(
              `${this.name} ended (${this.#end.signal ?? this.#end.code}) before: ${what}; ${this.#stderr}`,
            ),
          );
        }
      };
      this.#watchers.add(watcher);
      watcher();
    });
    return bounded(found, boundMs, () => `${this.name}: not seen: ${what}; ${this.#story()}`).finally(() => {
      if (watcher) this.#watchers.delete(watcher);
    });
  }

  untilState(of: 'migration' | 'arrival', key: string, state: string, boundMs?: number): Promise<HostEvent> {
    return this.until(
      `${of} ${key} in ${state}`,
      (event) =>
        event.event === 'state' && event['of'] === of && event['key'] === key && event['state'] === state,
      boundMs,
    );
  }

  untilStep(guest: string, step: string, boundMs?: number): Promise<HostEvent> {
    return this.until(
      `guest ${guest}: ${step}`,
      (event) => event.event === 'guest' && event['guest'] === guest && event['step'] === step,
      boundMs,
    );
  }

  /** What an arrival's promise came to. */
  untilArrival(
    key: string,
    promise: 'executionState' | 'resumed' | 'complete' | 'restHere',
    boundMs?: number,
  ) {
    return this.until(
      `arrival ${key}: ${promise}`,
      (event) => event.event === 'arrival' && event['key'] === key && event['promise'] === promise,
      boundMs,
    ) as Promise<HostEvent & { ok: boolean; error?: ErrorFacts }>;
  }

  /** Steps of a guest so far, in order. */
  steps(guest: string): string[] {
    return this.events
      .filter((event) => event.event === 'guest' && event['guest'] === guest)
      .map((event) => event['step'] as string);
  }

  states(of: 'migration' | 'arrival', key: string): string[] {
    return this.events
      .filter((event) => event.event === 'state' && event['of'] === of && event['key'] === key)
      .map((event) => event['state'] as string);
  }

  /** At once, as the power going off. */
  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.exited;
  }

  /** Closes everything; a host that holds then what it held when it was new can serve the next test. */
  async retire(): Promise<string[]> {
    const complaints = this.events
      .filter(({ event }) => event === 'failure')
      .map(({ message }) => `${this.name}: ${String(message)}`);
    if (this.#end) return complaints;
    if (this.via.length > 0 || !this.#baseline) {
      await this.kill();
      return complaints;
    }
    try {
      await this.call('reset');
      const wanted = JSON.stringify(held(this.#baseline));
      const now = JSON.stringify(await heldAgain(this, this.#baseline, 20_000));
      if (now === wanted) {
        all.delete(this);
        idle.push(this);
        return complaints;
      }
      complaints.push(`${this.name} holds ${now}, and held ${wanted} at first`);
    } catch (error) {
      // Closing may end a process whose writer waits for a page that is lost now; that is as it should be.
      if (this.alive) complaints.push(`${this.name} cannot be closed: ${String(error)}`);
    }
    await this.kill();
    return complaints;
  }

  killNow(): void {
    this.#child.kill('SIGKILL');
  }

  signal(name: NodeJS.Signals): void {
    this.#child.kill(name);
  }

  #onMessage(message: Record<string, unknown>): void {
    if (typeof message['id'] === 'number') {
      const waiter = this.#answers.get(message['id']);
      this.#answers.delete(message['id']);
      if ('error' in message) {
        const { message: text, ...facts } = message['error'] as ErrorFacts;
        waiter?.reject(Object.assign(new Error(text), facts));
      } else waiter?.resolve(message['value'] as never);
      return;
    }
    this.events.push({ ...(message as { event: string }), atMs: performance.now() });
    this.#wake();
  }

  #wake(): void {
    for (const watcher of [...this.#watchers]) watcher();
  }

  #story(): string {
    const last = this.events
      .slice(-12)
      .map(({ atMs, event, ...facts }) => `${Math.round(atMs)} ${event} ${JSON.stringify(facts)}`);
    return `last events:\n${last.join('\n')}\n${this.#stderr}`;
  }
}

/**
 * For afterEach: ends whatever a test left running on its hosts. Throws what is wrong, which no test may pass over:
 * failures that the hosts told of, and what they still hold when everything is closed.
 */
export async function endHosts(): Promise<void> {
  const complaints = (await Promise.all([...all].map((host) => host.retire()))).flat();
  if (complaints.length > 0) throw new Error(complaints.join('\n'));
}

export function bounded<T>(promise: Promise<T>, boundMs: number, what: () => string): Promise<T> {
  let timer: NodeJS.Timeout;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`after ${boundMs} ms: ${what()}`)), boundMs);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
