/** A host of KVM guests (kvm-host.mjs) as the tests see it. Every wait has a bound. */
import { type ChildProcess, fork } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { bounded } from './host.js';

const program = fileURLToPath(new URL('kvm-host.mjs', import.meta.url));
const BOUND_MS = 30_000;
const running = new Set<KvmHost>();

export interface Told {
  event: string;
  ok?: boolean;
  state?: string;
  value?: Record<string, unknown>;
  error?: { code: string; message: string };
}

export class KvmHost {
  readonly told: Told[] = [];
  readonly #child: ChildProcess;
  readonly #answers = new Map<number, (message: { value?: unknown; error?: Error }) => void>();
  #look = () => {};
  #nextId = 1;
  #stderr = '';
  readonly exited: Promise<void>;

  private constructor(readonly name: string) {
    this.#child = fork(program, [], {
      serialization: 'advanced',
      execArgv: ['--no-warnings'],
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    });
    running.add(this);
    this.#child.stderr?.setEncoding('utf8').on('data', (text) => {
      this.#stderr += text;
    });
    this.#child.on('message', (message: { id?: number } & Told) => {
      if (message.id === undefined) this.told.push(message);
      else this.#answers.get(message.id)?.(message as never);
      this.#look();
    });
    this.exited = new Promise((resolve) => {
      this.#child.once('exit', (code, signal) => {
        running.delete(this);
        const error = new Error(`${name} ended with ${signal ?? code}: ${this.#stderr}`);
        for (const answer of this.#answers.values()) answer({ error });
        this.told.push({ event: 'exit' });
        this.#look();
        resolve();
      });
    });
  }

  static async start(name: string, consolePath: string): Promise<KvmHost> {
    const host = new KvmHost(name);
    await host.until('ready');
    await host.call('console', { path: consolePath });
    return host;
  }

  call<T = void>(op: string, args: object = {}): Promise<T> {
    const id = this.#nextId++;
    const answer = new Promise<T>((resolve, reject) => {
      this.#answers.set(id, ({ value, error }) => {
        this.#answers.delete(id);
        if (error) reject(Object.assign(new Error(error.message), error));
        else resolve(value as T);
      });
      // One that is ending hears nothing any more; its exit is the answer.
      this.#child.send({ id, op, ...args }, () => {});
    });
    return bounded(answer, BOUND_MS, () => `${this.name}: ${op} was not answered ${this.#story()}`);
  }

  /** The first of what it tells or has told for which `wanted` holds. */
  until(event: string, wanted: (told: Told) => boolean = () => true): Promise<Told> {
    const found = new Promise<Told>((resolve, reject) => {
      const before = this.#look;
      this.#look = () => {
        before();
        const told = this.told.find((one) => one.event === event && wanted(one));
        if (told) resolve(told);
        else if (this.told.at(-1)?.event === 'exit') reject(new Error(`${this.name} ended: ${this.#stderr}`));
      };
      this.#look();
    });
    return bounded(found, BOUND_MS, () => `${this.name}: not told: ${event} ${this.#story()}`);
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.exited;
  }

  #story(): string {
    return `${JSON.stringify(this.told.slice(-8))} ${this.#stderr}`;
  }
}

/** For afterEach. Throws failures that nobody waited for. */
export async function endKvmHosts(): Promise<void> {
  // What a host is about to tell is heard too. One that dies instead has told nothing more.
  await Promise.all([...running].map((host) => host.call('flush').catch(() => {})));
  const failures = [...running].flatMap(({ name, told }) =>
    told.filter(({ event }) => event === 'failure').map((one) => `${name}: ${JSON.stringify(one)}`),
  );
  await Promise.all([...running].map((host) => host.kill()));
  if (failures.length > 0) throw new Error(failures.join('\n'));
}
