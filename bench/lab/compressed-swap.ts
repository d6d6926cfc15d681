/**
 * Compressed swap in memory (zram, lz4), a device of its own for each process that opens one. Needs root. Taken
 * away by close(), at the process's end however it comes about, and, after a SIGKILL, by the next process that
 * opens one; a file below /run says whose a device is.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const control = '/sys/class/zram-control';
const owners = '/run/memferry-bench';
/** Before whatever swap the machine has. */
const priority = '100';

/** Why there can be no compressed swap here, or null. */
export function swapObstacle(): string | null {
  if (process.getuid?.() !== 0) return 'swap needs root';
  if (!existsSync(control)) {
    try {
      execFileSync('modprobe', ['zram', 'num_devices=0'], { stdio: 'ignore' });
    } catch {
      return 'the kernel has no zram (modprobe zram)';
    }
  }
  try {
    execFileSync('mkswap', ['--version'], { stdio: 'ignore' });
  } catch {
    return 'mkswap (util-linux) is not installed';
  }
  return existsSync(control) ? null : 'the kernel has no zram (modprobe zram)';
}

function quietly(action: () => void): void {
  try {
    action();
  } catch {
    // Already gone.
  }
}

const ownerFile = (pid: number): string => join(owners, `zram-${pid}`);

/** Swapping off brings back what is still swapped out: those whose memory it is have ended by now. */
function removeDevice(id: number, owner: string): void {
  const swapping = readFileSync('/proc/swaps', 'utf8').includes(`/dev/zram${id} `);
  if (swapping) quietly(() => execFileSync('swapoff', [`/dev/zram${id}`], { stdio: 'ignore' }));
  quietly(() => writeFileSync(`/sys/block/zram${id}/reset`, '1'));
  quietly(() => writeFileSync(join(control, 'hot_remove'), String(id)));
  rmSync(owner, { force: true });
}

/** What processes left that were killed before they could take it down. */
export function removeAbandonedSwap(): void {
  for (const name of existsSync(owners) ? readdirSync(owners) : []) {
    const match = /^zram-(\d+)$/.exec(name);
    if (match === null || existsSync(`/proc/${match[1]}`)) continue;
    const id = Number(readFileSync(join(owners, name), 'utf8'));
    if (Number.isInteger(id)) removeDevice(id, join(owners, name));
  }
}

export class CompressedSwap implements Disposable {
  readonly #id: number;
  readonly #atExit = (): void => this.close();
  #closed = false;

  private constructor(id: number) {
    this.#id = id;
    process.once('exit', this.#atExit);
  }

  /** Room for so much, before compression. */
  static open(bytes: number): CompressedSwap {
    const obstacle = swapObstacle();
    if (obstacle !== null) throw new Error(obstacle);
    removeAbandonedSwap();
    const id = Number(readFileSync(join(control, 'hot_add'), 'utf8'));
    const swap = new CompressedSwap(id);
    try {
      mkdirSync(owners, { recursive: true });
      writeFileSync(ownerFile(process.pid), String(id));
      writeFileSync(`/sys/block/zram${id}/comp_algorithm`, 'lz4');
      writeFileSync(`/sys/block/zram${id}/disksize`, String(bytes));
      execFileSync('mkswap', [`/dev/zram${id}`], { stdio: 'ignore' });
      execFileSync('swapon', ['-p', priority, `/dev/zram${id}`], { stdio: ['ignore', 'ignore', 'pipe'] });
      return swap;
    } catch (error) {
      swap.close();
      throw error;
    }
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    process.off('exit', this.#atExit);
    removeDevice(this.#id, ownerFile(process.pid));
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
