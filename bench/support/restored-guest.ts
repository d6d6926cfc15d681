/** A guest of `restore`: the program that plays Firecracker's part, and a handler that it is restored by. */
import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { floorsDirectory, repositoryRoot } from './paths.js';
import { runCommand } from './processes.js';

const running = new Set<ChildProcess>();
process.on('exit', () => {
  for (const child of running) child.kill('SIGKILL');
});

const program = join(floorsDirectory, 'micro_vm');

/** A process that speaks in lines of JSON. */
class Speaker {
  readonly child: ChildProcess;
  readonly #lines: AsyncIterator<string>;

  constructor(command: string, args: string[]) {
    this.child = spawn(command, args, { stdio: ['pipe', 'pipe', 'inherit'] });
    running.add(this.child);
    this.child.once('exit', () => running.delete(this.child));
    const output = this.child.stdout as NonNullable<ChildProcess['stdout']>;
    this.#lines = createInterface({ input: output })[Symbol.asyncIterator]();
  }

  async next(): Promise<Record<string, number | boolean | string>> {
    const { value, done } = await this.#lines.next();
    if (done) throw new Error(`${this.child.spawnfile} ended before it answered`);
    return JSON.parse(value);
  }

  async until(type: string): Promise<Record<string, number | boolean | string>> {
    for (;;) {
      const line = await this.next();
      if (line['type'] === type) return line;
    }
  }

  ask(line: string): Promise<Record<string, number | boolean | string>> {
    this.child.stdin?.write(`${line}\n`);
    return this.next();
  }

  async end(): Promise<void> {
    if (this.child.exitCode !== null || this.child.signalCode !== null) return;
    const ended = new Promise((resolve) => this.child.once('exit', resolve));
    this.child.kill('SIGKILL');
    await ended;
  }
}

export async function makeSnapshot(path: string, bytes: number): Promise<void> {
  await runCommand(program, ['--make-snapshot', path, '--bytes', String(bytes)]);
}

export function startFloor(socket: string, snapshot: string, remote: boolean): Speaker {
  const flags = ['--socket', socket, '--snapshot', snapshot, ...(remote ? ['--remote'] : [])];
  return new Speaker(join(floorsDirectory, 'restore_floor'), flags);
}

export function startHandler(socket: string, flags: string[]): Speaker {
  const main = join(repositoryRoot, 'lib', 'cli', 'main.js');
  return new Speaker(process.execPath, [
    main,
    'firecracker',
    '--socket',
    socket,
    '--once',
    '--json',
    ...flags,
  ]);
}

export async function startGuest(socket: string, bytes: number): Promise<Speaker> {
  const guest = new Speaker(program, ['--socket', socket, '--bytes', String(bytes)]);
  if ((await guest.next())['loaded'] !== true) throw new Error('the guest read what is not in the snapshot');
  return guest;
}

/** What the guest sees: the medians of its first touches, or the rate of one pass over all of it. */
export async function randomTouches(guest: Speaker, count: number, seed: number): Promise<number> {
  const { wrong, p50Us } = await guest.ask(`random ${count} ${seed}`);
  if (wrong !== 0) throw new Error(`${wrong} pages were wrong`);
  return p50Us as number;
}

export async function sequentialRate(guest: Speaker): Promise<number> {
  const { seconds, bytes } = await guest.ask('sequential');
  const { wrong } = await guest.ask('verify');
  if (wrong !== 0) throw new Error(`${wrong} pages were wrong`);
  return (bytes as number) / 1e9 / (seconds as number);
}
