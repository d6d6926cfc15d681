/** A control group with a bound on memory, of version 1 or 2, for processes of a test. Needs root. */
import { existsSync, mkdirSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const mount = '/sys/fs/cgroup';

/** Why there can be none here, or null. */
export function memoryGroupObstacle(): string | null {
  if (process.getuid?.() !== 0) return 'control groups need root';
  if (existsSync(join(mount, 'memory/memory.limit_in_bytes'))) return null;
  return existsSync(join(mount, 'cgroup.subtree_control')) ? null : 'no memory control groups are mounted';
}

export class MemoryGroup implements Disposable {
  readonly #directory: string;
  readonly #members: number[] = [];

  /** Throws where the system does not let one be made. */
  constructor(name: string, bytes: number) {
    const unified = existsSync(join(mount, 'cgroup.subtree_control'));
    if (unified) writeFileSync(join(mount, 'cgroup.subtree_control'), '+memory');
    this.#directory = join(mount, unified ? '' : 'memory', `memferry-test-${process.pid}-${name}`);
    mkdirSync(this.#directory);
    const limit = unified ? 'memory.max' : 'memory.limit_in_bytes';
    writeFileSync(join(this.#directory, limit), String(bytes));
  }

  join(pid: number): void {
    this.#members.push(pid);
    writeFileSync(join(this.#directory, 'cgroup.procs'), String(pid));
  }

  /** Ends its members: a group that has any cannot be removed. */
  [Symbol.dispose](): void {
    for (const pid of this.#members) {
      try {
        process.kill(pid, 'SIGKILL');
      } catch {
        // It has ended.
      }
    }
    for (let left = 500; ; left--) {
      try {
        rmdirSync(this.#directory);
        return;
      } catch (error) {
        if (left === 0) throw error;
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10);
      }
    }
  }
}
