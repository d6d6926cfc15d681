/** The program that plays Firecracker's part (firecracker/micro-vm.cc), built when it is first needed. */
import { type ChildProcessWithoutNullStreams, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, renameSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { createInterface, type Interface } from 'node:readline';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
const source = join(root, 'test/support/firecracker/micro-vm.cc');
const folder = join(root, 'build-test');
const program = join(folder, 'micro-vm');

export function buildMicroVm(): string {
  if (existsSync(program) && statSync(program).mtimeMs > statSync(source).mtimeMs) return program;
  mkdirSync(folder, { recursive: true });
  const [compiler = 'c++', ...flags] = (process.env['CXX'] ?? 'c++').split(' ');
  // Beside it first: another test may be building it too.
  const fresh = `${program}.${process.pid}`;
  execFileSync(compiler, [...flags, '-std=c++20', '-O2', '-pthread', '-o', fresh, source], {
    stdio: 'inherit',
  });
  renameSync(fresh, program);
  return program;
}

export function makeSnapshot(path: string, bytes: number): void {
  execFileSync(buildMicroVm(), ['--make-snapshot', path, '--bytes', String(bytes)], { stdio: 'inherit' });
}

export interface Answer {
  wrong?: number;
  first?: number;
  loaded?: boolean;
  count?: number;
  p50Us?: number;
  p99Us?: number;
  seconds?: number;
  bytes?: number;
  rounds?: number;
}

/** One process that plays a microVM. */
export class FakeMicroVm {
  readonly child: ChildProcessWithoutNullStreams;
  readonly exit: Promise<{ code: number | null; signal: NodeJS.Signals | null }>;
  readonly #lines: Interface;
  readonly #answers: AsyncIterator<string>;
  errors = '';

  constructor(flags: readonly (string | number)[]) {
    this.child = spawn(buildMicroVm(), flags.map(String));
    this.child.stderr.on('data', (data) => {
      this.errors += String(data);
    });
    this.child.stdin.on('error', () => {});
    this.exit = once(this.child, 'exit').then(([code, signal]) => ({ code, signal }));
    this.#lines = createInterface({ input: this.child.stdout });
    this.#answers = this.#lines[Symbol.asyncIterator]();
  }

  /** The next line that it prints: the first one says that it is loaded. */
  async answer(): Promise<Answer> {
    const { value, done } = await this.#answers.next();
    if (done) throw new Error(`the microVM has ended ${JSON.stringify(await this.exit)} ${this.errors}`);
    return JSON.parse(value);
  }

  async obey(line: string): Promise<Answer> {
    this.child.stdin.write(`${line}\n`);
    return this.answer();
  }

  kill(): void {
    this.child.kill('SIGKILL');
  }
}
