/** Processes that own memory: built once a test file, driven by lines. */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { closeSync, ftruncateSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { type AttachOptions, openPidfd, Region, takeDescriptor } from '../../lib/index.js';

const source = fileURLToPath(new URL('./memory-owner.c', import.meta.url));
const folder = mkdtempSync(join(tmpdir(), 'memferry-owner-'));
const program = join(folder, 'memory-owner');
const owners = new Set<MemoryOwner>();

export function buildOwner(): void {
  execFileSync('gcc', ['-O2', '-pthread', '-o', program, source], { stdio: 'inherit' });
}

export function endOwners(): void {
  for (const owner of owners) owner.free();
  owners.clear();
}

export function removeOwner(): void {
  rmSync(folder, { recursive: true, force: true });
}

export interface OwnerKind {
  pages: number;
  shared: boolean;
  /** Shared, of reserved huge pages of 2 MiB. */
  huge?: boolean;
  /** Of its userfaultfd; null: it leaves UFFDIO_API to whoever gets it. */
  features?: number | null;
}

export const features = {
  missingShmem: 1 << 5,
  eventRemove: 1 << 3,
  wpShmem: 1 << 12,
  wpUnpopulated: 1 << 13,
  wpAsync: 1 << 15,
};

export class MemoryOwner {
  readonly child: ChildProcess;
  readonly #answers: string[] = [];
  readonly #waiting: ((line: string | null) => void)[] = [];
  #ended = false;
  address = 0n;
  pidfd = -1;
  uffd = -1;
  memory: number | null = null;
  readonly pages: number;
  readonly #huge: boolean;

  private constructor(kind: OwnerKind) {
    this.pages = kind.pages;
    this.#huge = kind.huge ?? false;
    const asked = kind.features === null ? '-' : (kind.features ?? 0).toString(16);
    const memory = kind.huge ? 'huge' : kind.shared ? 'shared' : 'private';
    this.child = spawn(program, [String(kind.pages), memory, asked], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    owners.add(this);
    this.child.stdin?.on('error', () => {}); // it has ended
    if (!this.child.stdout) throw new Error('no pipe');
    createInterface({ input: this.child.stdout })
      .on('line', (line) => {
        const next = this.#waiting.shift();
        if (next) next(line);
        else this.#answers.push(line);
      })
      .on('close', () => {
        this.#ended = true;
        for (const next of this.#waiting.splice(0)) next(null);
      });
  }

  static async start(kind: OwnerKind): Promise<MemoryOwner> {
    const owner = new MemoryOwner(kind);
    const hello = await owner.#answer();
    if (hello === null) throw new Error('the owner did not start');
    const [pid, address, uffd, memfd] = hello.split(' ');
    owner.address = BigInt(address as string);
    owner.pidfd = openPidfd(Number(pid));
    owner.uffd = takeDescriptor(owner.pidfd, Number(uffd));
    if (kind.shared) owner.memory = takeDescriptor(owner.pidfd, Number(memfd));
    return owner;
  }

  attachment(): AttachOptions {
    return {
      pidfd: this.pidfd,
      uffd: this.uffd,
      mappings: [{ address: this.address, lengthBytes: this.pages * 4096 }],
      ...(this.memory === null ? {} : { memory: this.memory }),
    };
  }

  attach(): Region {
    return Region.attach(this.attachment());
  }

  #answer(): Promise<string | null> {
    const here = this.#answers.shift();
    if (here !== undefined) return Promise.resolve(here);
    if (this.#ended) return Promise.resolve(null);
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  /** Null: it has ended. */
  ask(line: string): Promise<string | null> {
    this.child.stdin?.write(`${line}\n`);
    return this.#answer();
  }

  /** What it reads in its memory, every byte. */
  async content(): Promise<Buffer> {
    const path = join(folder, `dump-${this.child.pid}`);
    const bytes = await this.ask(`dump ${path}`);
    if (Number(bytes) !== this.pages * 4096)
      throw new Error(`the owner could read ${bytes} bytes of its memory`);
    const content = readFileSync(path);
    rmSync(path);
    return content;
  }

  get exitSignal(): NodeJS.Signals | null {
    return this.child.signalCode;
  }

  /** Huge pages go with it: views would keep them until they are collected. Nobody uses them any more. */
  free(): void {
    this.child.kill('SIGKILL');
    if (this.#huge && this.memory !== null) ftruncateSync(this.memory, 0);
    this.kill();
  }

  kill(): void {
    this.child.kill('SIGKILL');
    for (const fd of [this.pidfd, this.uffd, this.memory ?? -1]) if (fd >= 0) closeSync(fd);
    this.pidfd = this.uffd = -1;
    this.memory = null;
    owners.delete(this);
  }
}
