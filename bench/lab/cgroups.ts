/**
 * Control groups for the lab's hosts: a bound on memory and on CPU time, in version 1 or 2, whichever this system
 * has mounted. Needs root. Directories carry this process's id; they are removed by close(), at the process's end
 * however it comes about, and, after a SIGKILL, by the next process that makes one.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

const mount = '/sys/fs/cgroup';
const prefix = 'mfbench';
/**
 * A quota's period is as short as may be, so that a socket's buffer bridges the time when its reader may not run: then
 * the reader is slowed, not the link. The kernel takes no quota below 1 ms.
 */
const leastQuotaUs = 1500;
const leastPeriodUs = 5000;
const longestPeriodUs = 100_000;
/**
 * Against what else runs here: to the scheduler a group is one task, however many it has, and what is to limit a
 * receiver is its quota, not who else is busy.
 */
const weight = { v1: ['cpu.shares', '16384'], v2: ['cpu.weight', '1600'] } as const;

interface Hierarchy {
  /** The directories that one group consists of; the same one twice in version 2. */
  memory: string;
  cpu: string;
  version: 1 | 2;
}

function hierarchy(): Hierarchy | string {
  if (existsSync(join(mount, 'cgroup.controllers'))) {
    const controllers = readFileSync(join(mount, 'cgroup.controllers'), 'utf8').trim().split(' ');
    const missing = ['memory', 'cpu'].filter((name) => !controllers.includes(name));
    if (missing.length > 0) return `cgroup v2 without the ${missing.join(' and ')} controller`;
    return { memory: mount, cpu: mount, version: 2 };
  }
  const memory = join(mount, 'memory');
  const cpu = [join(mount, 'cpu'), join(mount, 'cpu,cpuacct')].find((path) =>
    existsSync(join(path, 'cpu.cfs_quota_us')),
  );
  if (!existsSync(join(memory, 'memory.limit_in_bytes'))) return 'no memory cgroups are mounted';
  if (cpu === undefined) return 'no cpu cgroups with quotas are mounted';
  return { memory, cpu, version: 1 };
}

/** Why there can be no groups here, or null. */
export function cgroupObstacle(): string | null {
  if (process.getuid?.() !== 0) return 'control groups need root';
  const found = hierarchy();
  return typeof found === 'string' ? found : null;
}

/** Ends what runs in a group and removes it; a group with members cannot be removed. */
function removeGroup(directory: string): void {
  for (let attempt = 0; attempt < 200 && existsSync(directory); attempt++) {
    try {
      for (const pid of members(directory)) process.kill(pid, 'SIGKILL');
    } catch {
      // Ended by itself.
    }
    try {
      rmdirSync(directory);
      return;
    } catch {
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10);
    }
  }
}

function members(directory: string): number[] {
  const text = readFileSync(join(directory, 'cgroup.procs'), 'utf8');
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map(Number);
}

/** What processes left that were killed before they could take it down. */
export function removeAbandonedCgroups(): void {
  const found = hierarchy();
  if (typeof found === 'string') return;
  const { memory, cpu } = found;
  for (const parent of new Set([memory, cpu])) {
    for (const name of readdirSync(parent)) {
      const match = new RegExp(`^${prefix}(\\d+)-`).exec(name);
      if (match === null || existsSync(`/proc/${match[1]}`)) continue;
      for (const part of readdirSync(join(parent, name), { withFileTypes: true })) {
        if (part.isDirectory()) removeGroup(join(parent, name, part.name));
      }
      removeGroup(join(parent, name));
    }
  }
}

/**
 * A group whose members share one bound on memory, and are in parts, each with a quota of CPU time of its own. (Members
 * are in the parts alone: version 2 wants it so.)
 */
export class Cgroup implements Disposable {
  readonly #hierarchy: Hierarchy;
  readonly #memory: string;
  readonly #cpu: string;
  readonly #parts: readonly string[];
  readonly #atExit = (): void => this.close();
  #closed = false;

  private constructor(found: Hierarchy, name: string, parts: readonly string[]) {
    this.#hierarchy = found;
    this.#parts = parts;
    this.#memory = join(found.memory, `${prefix}${process.pid}-${name}`);
    this.#cpu = join(found.cpu, `${prefix}${process.pid}-${name}`);
    process.once('exit', this.#atExit);
  }

  static open(name: string, parts: readonly string[]): Cgroup {
    const found = hierarchy();
    if (typeof found === 'string') throw new Error(found);
    removeAbandonedCgroups();
    const group = new Cgroup(found, name, parts);
    try {
      // Version 2: what the root lends to its children, and they to theirs.
      const lend = (directory: string): void => {
        if (found.version === 2) writeFileSync(join(directory, 'cgroup.subtree_control'), '+memory +cpu');
      };
      lend(mount);
      for (const directory of new Set([group.#memory, group.#cpu])) {
        mkdirSync(directory);
        lend(directory);
        for (const part of parts) mkdirSync(join(directory, part));
      }
      const [file, value] = found.version === 2 ? weight.v2 : weight.v1;
      writeFileSync(join(group.#cpu, file), value);
      return group;
    } catch (error) {
      group.close();
      throw error;
    }
  }

  /** What a process writes its id to in order to join a part. */
  procsFiles(part: string): string[] {
    return [...new Set([this.#memory, this.#cpu])].map((directory) => join(directory, part, 'cgroup.procs'));
  }

  /** Of all members together; null: no limit. Fails where more is in use that cannot be swapped out. */
  limitMemory(bytes: number | null): void {
    const { version } = this.#hierarchy;
    const file = version === 2 ? 'memory.max' : 'memory.limit_in_bytes';
    const none = version === 2 ? 'max' : '-1';
    writeFileSync(join(this.#memory, file), bytes === null ? none : String(Math.round(bytes)));
  }

  /** CPU time a second of time, for all members of a part: 0.5 is half of one CPU; null: no limit. */
  limitCpu(part: string, share: number | null): void {
    const directory = join(this.#cpu, part);
    const period = Math.round(
      Math.min(longestPeriodUs, Math.max(leastPeriodUs, leastQuotaUs / (share ?? 1))),
    );
    const quota = share === null ? null : Math.max(1000, Math.round(share * period));
    if (this.#hierarchy.version === 2) {
      writeFileSync(join(directory, 'cpu.max'), `${quota ?? 'max'} ${period}`);
      return;
    }
    writeFileSync(join(directory, 'cpu.cfs_quota_us'), '-1');
    writeFileSync(join(directory, 'cpu.cfs_period_us'), String(period));
    if (quota !== null) writeFileSync(join(directory, 'cpu.cfs_quota_us'), String(quota));
  }

  /** Ends its members. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    process.off('exit', this.#atExit);
    for (const directory of new Set([this.#cpu, this.#memory])) {
      for (const part of this.#parts) removeGroup(join(directory, part));
      removeGroup(directory);
    }
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
