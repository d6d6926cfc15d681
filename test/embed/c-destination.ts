/** The sample destination (examples/embed/destination.c) as tests see it: its events, its commands, its end. */
import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { expect } from 'vitest';
import { bounded, type Host } from '../support/host.js';
import { SECRET } from '../support/scenario.js';

const programs = process.env['MEMFERRY_EMBED_PROGRAMS'];

export interface CEvent {
  event: string;
  [fact: string]: unknown;
}

const all = new Set<CDestination>();
const directories = new Set<string>();

/** What a guest's regions were at its source. */
interface Saved {
  directory: string;
  paths: string[];
}

/** What `dump` writes for a page that cannot be read. */
const unreadable = Buffer.alloc(4096, '(lost)');

/** How many pages were not readable. */
function comparePages(directory: string, paths: readonly string[], mayLack: boolean): number {
  let lacking = 0;
  for (const [index, path] of paths.entries()) {
    const left = readFileSync(path);
    const arrived = readFileSync(join(directory, String(index)));
    expect(arrived.length).toBe(left.length);
    for (let at = 0; at < left.length; at += 4096) {
      if (left.compare(arrived, at, at + 4096, at, at + 4096) === 0) continue;
      if (!mayLack || unreadable.compare(arrived, at, at + 4096) !== 0)
        throw new Error(`page ${at / 4096} of region ${index} is not what left the source`);
      lacking++;
    }
  }
  return lacking;
}

export class CDestination {
  readonly events: CEvent[] = [];
  readonly exited: Promise<void>;
  port = 0;
  readonly #child: ChildProcess;
  readonly #watchers = new Set<() => void>();
  #alive = true;
  #stderr = '';

  private constructor(options: Record<string, string | number>) {
    if (!programs) throw new Error('MEMFERRY_EMBED_PROGRAMS: run by `npm test -- embed`');
    const args = Object.entries(options).flatMap(([name, value]) => [`--${name}`, String(value)]);
    this.#child = spawn(join(programs, 'destination'), args, {
      env: { ...process.env, MEMFERRY_SECRET: SECRET },
      stdio: ['pipe', 'pipe', 'pipe'],
    });
    all.add(this);
    this.#child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr += text;
    });
    this.#child.stdin?.on('error', () => {});
    createInterface({ input: this.#child.stdout as NodeJS.ReadableStream }).on('line', (line) => {
      this.events.push(JSON.parse(line) as CEvent);
      this.#wake();
    });
    this.exited = new Promise((resolve) => {
      this.#child.once('exit', () => {
        this.#alive = false;
        all.delete(this);
        this.#wake();
        resolve();
      });
    });
  }

  static async start(options: Record<string, string | number> = {}): Promise<CDestination> {
    const destination = new CDestination(options);
    destination.port = (await destination.until('listening'))['port'] as number;
    return destination;
  }

  get names(): string[] {
    return this.events.map(({ event }) => event);
  }

  get pid(): number {
    return this.#child.pid as number;
  }

  until(event: string, boundMs = 20_000): Promise<CEvent> {
    let watcher = () => {};
    const found = new Promise<CEvent>((resolve, reject) => {
      watcher = () => {
        const seen = this.events.find((entry) => entry.event === event);
        if (seen) resolve(seen);
        else if (!this.#alive) reject(new Error(`it ended before '${event}': ${this.#stderr}`));
      };
      this.#watchers.add(watcher);
      watcher();
    });
    return bounded(found, boundMs, () => `not seen: ${event}; ${JSON.stringify(this.events)}`).finally(() =>
      this.#watchers.delete(watcher),
    );
  }

  say(line: string): void {
    this.#child.stdin?.write(`${line}\n`);
  }

  killNow(): void {
    process.kill(this.pid, 'SIGKILL');
  }

  async kill(): Promise<void> {
    this.#child.kill('SIGKILL');
    await this.exited;
  }

  /** Between its first write and its last one. */
  async interval(): Promise<[bigint, bigint]> {
    this.say('stand');
    const { first, last } = await this.until('stands');
    return [BigInt(first as string), BigInt(last as string)];
  }

  /** The regions of a guest that stands at its source, for when the source is gone. */
  async saveOf(source: Host, regions: number, guest = 'g'): Promise<Saved> {
    const directory = await mkdtemp(join(tmpdir(), 'memferry-embed-'));
    directories.add(directory);
    const paths = Array.from({ length: regions }, (_, index) => join(directory, `source-${index}`));
    await source.call('saveRegions', { guest, paths });
    return { directory, paths };
  }

  async expectSaved({ directory, paths }: Saved): Promise<void> {
    this.say(`dump ${directory}`);
    expect(await this.until('dumped')).toMatchObject({ ok: true, unreadable: 0 });
    comparePages(directory, paths, false);
  }

  /** The same of every page that can be read; what was lost, and nothing else, cannot. */
  async expectSavedBut({ directory, paths }: Saved): Promise<void> {
    this.say(`dump ${directory}`);
    const lost = this.events.reduce(
      (sum, { event, pages }) => sum + (event === 'lost' ? Number(pages) : 0),
      0,
    );
    expect(lost).toBeGreaterThan(0);
    expect(await this.until('dumped')).toMatchObject({ ok: true, unreadable: lost });
    expect(comparePages(directory, paths, true)).toBe(lost);
  }

  /** Without what the guest wrote here every byte is what it was when the guest left its source. */
  async expectSameAs(source: Host, regions: number, guest = 'g'): Promise<void> {
    await this.expectSaved(await this.saveOf(source, regions, guest));
  }

  #wake(): void {
    for (const watcher of [...this.#watchers]) watcher();
  }
}

/** For afterEach. */
export async function endDestinations(): Promise<void> {
  await Promise.all([...all].map((destination) => destination.kill()));
  for (const directory of directories) await rm(directory, { recursive: true, force: true });
  directories.clear();
}
