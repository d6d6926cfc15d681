/** A guest that a C program parks (parker.cc), as tests see it: what it says, what it is told, its end. */
import { type ChildProcess, spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { ParkTicket } from '../../src/index.js';
import { bounded } from '../support/host.js';
import { SECRET } from '../support/scenario.js';

const PAGE = 4096;

export interface Said {
  event: string;
  code?: string;
  text?: string;
  [fact: string]: unknown;
}

const all = new Set<CParker>();

/** No two pages alike; every eighth, and a stretch in the middle, is zeros. */
export function contentOf(pages: number, seed = 1): Buffer {
  const words = new Uint32Array((pages * PAGE) / 4);
  for (let word = 0; word < words.length; word++) words[word] = Math.imul(word + seed, 2654435761) ^ seed;
  const content = Buffer.from(words.buffer);
  for (let page = 0; page < pages; page++) {
    if (page % 8 === 7 || (page >= pages / 2 && page < pages / 2 + 20))
      content.fill(0, page * PAGE, (page + 1) * PAGE);
  }
  return content;
}

export class CParker {
  readonly said: Said[] = [];
  readonly #child: ChildProcess;
  readonly #directory = mkdtempSync(join(tmpdir(), 'memferry-parker-'));
  readonly #exited: Promise<void>;
  readonly #watchers = new Set<() => void>();
  #alive = true;
  #stderr = '';
  #ticket: ParkTicket | null = null;

  private constructor(
    servers: readonly { port: number }[],
    readonly contents: readonly Buffer[],
    options: Record<string, string | number>,
    secret: string,
  ) {
    const program = process.env['MEMFERRY_PARKER'];
    if (!program) throw new Error('MEMFERRY_PARKER: run by `npm test -- embed`');
    const memory = contents.flatMap((content, index) => {
      const path = join(this.#directory, String(index));
      writeFileSync(path, content);
      return ['--memory', path];
    });
    const flags = Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]);
    const addresses = servers.map(({ port }) => `127.0.0.1:${port}`);
    this.#child = spawn(program, [...flags, ...memory, ...addresses], {
      env: { ...process.env, MEMFERRY_SECRET: secret },
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    all.add(this);
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr += text;
    });
    this.#child.stdin?.on('error', () => {});
    createInterface({ input: this.#child.stdout as NodeJS.ReadableStream }).on('line', (line) => {
      this.said.push(JSON.parse(line) as Said);
      this.#wake();
    });
    this.#exited = new Promise((resolve) => {
      this.#child.once('close', () => {
        this.#alive = false;
        this.#wake();
        resolve();
      });
    });
  }

  /** Its image is made, at the servers that answer. */
  static async start(
    servers: readonly { port: number }[],
    options: Record<string, string | number> = {},
    contents: readonly Buffer[] = [contentOf(1024)],
  ): Promise<CParker> {
    const parker = new CParker(servers, contents, options, SECRET);
    const created = await parker.next('created');
    parker.#ticket = created['ticket'] as ParkTicket;
    return parker;
  }

  /** No image is made, and why. */
  static async refused(
    servers: readonly { port: number }[],
    options: Record<string, string | number> = {},
    { pages = 1024, secret = SECRET }: { pages?: number; secret?: string } = {},
  ): Promise<Said> {
    const parker = new CParker(servers, [contentOf(pages)], options, secret);
    return parker.next('refused');
  }

  get ticket(): ParkTicket {
    if (!this.#ticket) throw new Error('there is no image');
    return this.#ticket;
  }

  /** Of what it says from now on, or has said since it was asked last. */
  async next(event: string, boundMs = 30_000): Promise<Said> {
    let watcher = () => {};
    const found = new Promise<Said>((resolve, reject) => {
      watcher = () => {
        const at = this.said.findIndex((entry) => entry.event === event);
        if (at >= 0) resolve(this.said.splice(at, 1)[0] as Said);
        else if (!this.#alive) reject(new Error(`it ended before '${event}': ${this.#stderr}`));
      };
      this.#watchers.add(watcher);
      watcher();
    });
    return bounded(found, boundMs, () => `not said: ${event}; ${JSON.stringify(this.said)}`).finally(() =>
      this.#watchers.delete(watcher),
    );
  }

  say(line: string): void {
    this.#child.stdin?.write(`${line}\n`);
  }

  /** What evict() comes to, when it has. */
  evict(): Promise<Said> {
    this.say('evict');
    return this.next('evicted');
  }

  async stats(): Promise<Record<string, number>> {
    this.say('stats');
    return (await this.next('stats')) as unknown as Record<string, number>;
  }

  /** Its memory is what it was. */
  async same(): Promise<boolean> {
    this.say('same');
    return (await this.next('same'))['same'] === true;
  }

  async close(): Promise<Said> {
    this.say('close');
    return this.next('closed');
  }

  async sent(pages: number, boundMs = 15_000): Promise<void> {
    for (const end = performance.now() + boundMs; ; ) {
      const { pagesSent } = await this.stats();
      if ((pagesSent as number) >= pages) return;
      if (performance.now() > end) throw new Error(`only ${pagesSent} pages of ${pages} were sent`);
    }
  }

  kill(): void {
    this.#child.kill('SIGKILL');
  }

  async end(): Promise<void> {
    this.kill();
    await this.#exited;
    rmSync(this.#directory, { recursive: true, force: true });
    all.delete(this);
  }

  #wake(): void {
    for (const watcher of [...this.#watchers]) watcher();
  }
}

/** For afterEach. */
export async function endParkers(): Promise<void> {
  await Promise.all([...all].map((parker) => parker.end()));
}
