/**
 * Scan and re-arm of 1 GiB of another process's memory, from outside, against the same of one's own memory: one after
 * another in the same run. Before each scan, of either, this thread has waited for the other process: a thread that has
 * just slept finds colder caches.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { loadAddon } from '../support/addon.js';
import { floorsDirectory } from '../support/paths.js';
import { atMostTimesFloor } from '../support/result.js';
import { median } from '../support/statistics.js';
import { interleave, type Trial } from '../support/trial.js';

const lengthBytes = 2 ** 30;
const tracker = 'uffd-wp-async';
/** The median of so many scans is one sample, on both sides. */
const scans = 11;

interface Hello {
  pid: number;
  address: string;
  uffd: number;
}

/** The other process: it writes when it is told to. */
class Owner {
  readonly child: ChildProcess;
  readonly #lines: AsyncIterator<string>;
  constructor() {
    this.child = spawn(join(floorsDirectory, 'memory_owner'), [String(lengthBytes)], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    process.on('exit', () => this.child.kill('SIGKILL'));
    if (!this.child.stdout) throw new Error('no pipe');
    this.#lines = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
  }
  async line(): Promise<string> {
    const next = await this.#lines.next();
    if (next.done) throw new Error('the owner of the memory has ended');
    return next.value;
  }
  async write(count: number, seed: number): Promise<void> {
    this.child.stdin?.write(`${count} ${seed}\n`);
    await this.line();
  }
}

export async function run(trial: Trial): Promise<void> {
  const addon = loadAddon();
  const probe = addon.probeTracker(tracker);
  if (!probe.available) {
    trial.skip(tracker, probe.reason);
    return;
  }
  const own = addon.allocate(lengthBytes);
  const pages = own.pages();
  const words = new Uint32Array(own.buffers()[0] as ArrayBuffer);
  const wordsPerPage = own.pageSize / words.BYTES_PER_ELEMENT;
  const writeOwn = (count: number, seed: number): void => {
    const step = count === pages ? 1 : (Math.imul(seed, 0x9e3779b1) | 1) >>> 0;
    for (let i = 0; i < count; i++) {
      const at = ((seed + i * step) % pages) * wordsPerPage;
      words[at] = (words[at] as number) + 1;
    }
  };
  writeOwn(pages, 0);
  const owner = new Owner();
  const hello = JSON.parse(await owner.line()) as Hello;
  const pidfd = addon.openPidfd(hello.pid);
  const uffd = addon.takeDescriptor(pidfd, hello.uffd);
  const mappings = [{ address: BigInt(hello.address), lengthBytes, offset: 0 }];
  const other = addon.attach(pidfd, uffd, mappings, null, () => {});
  const ofOwn = addon.makeTracker(tracker, own, 'anywhere', false);
  const ofOther = addon.makeTracker(tracker, other, 'anywhere', false);
  ofOwn.arm();
  ofOther.arm();

  let seed = 1;
  const measure = async (
    collect: () => Float64Array,
    write: (count: number, seed: number) => Promise<void>,
    dirty: number,
  ): Promise<number> => {
    const figures: number[] = [];
    collect();
    for (let i = 0; i < scans; i++) {
      await write(dirty, seed++);
      const start = process.hrtime.bigint();
      const runs = collect();
      figures.push(Number(process.hrtime.bigint() - start) / 1e6);
      let found = 0;
      for (let run = 1; run < runs.length; run += 2) found += runs[run] as number;
      if (found !== dirty) throw new Error(`${dirty} pages were written, the tracker found ${found}`);
    }
    return median(figures);
  };
  const cases = [
    { name: 'clean', dirty: 0 },
    { name: 'dirty-1-percent-scattered', dirty: Math.floor(pages / 100) },
    { name: 'all-dirty', dirty: pages },
  ];
  for (const { name, dirty } of cases) {
    trial.report(
      `scan-of-another-process-${name}`,
      'ms',
      await interleave(
        trial.samples(5),
        () =>
          measure(
            () => ofOther.collect(),
            (count, from) => owner.write(count, from),
            dirty,
          ),
        () =>
          measure(
            () => ofOwn.collect(),
            (count, from) => {
              writeOwn(count, from);
              return owner.write(0, from);
            },
            dirty,
          ),
      ),
      atMostTimesFloor(1.3, 'tracking oneself'),
    );
  }
  ofOther.close();
  ofOwn.close();
  other.close();
  own.close();
  closeSync(uffd);
  closeSync(pidfd);
  owner.child.kill('SIGKILL');
}
