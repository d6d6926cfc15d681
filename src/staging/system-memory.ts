/**
 * How much memory this process can have: what the machine has left, and the limits of the control groups above it. An
 * answer is an estimate that is old at once; it is for refusing what would end in the kernel's out-of-memory killer.
 */
import { readFileSync } from 'node:fs';
import { posix } from 'node:path';

export interface SystemMemory {
  /** RAM and swap: what the machine could ever hold. Infinity where the system does not say. */
  mostBytes: number;
  /** Without swapping. */
  availableBytes: number;
  /** Whose limit `availableBytes` is: the directory of a control group, or null for the machine. */
  group: string | null;
  /** How much that one has in all, without swap. */
  limitBytes: number;
}

const mostReserveBytes = 256 * 2 ** 20;
const reservePart = 1 / 16;

/** What may be taken without bringing the kernel to kill somebody: not the last of it. */
export function spareBytes({ availableBytes, limitBytes }: SystemMemory): number {
  return Math.max(0, availableBytes - Math.min(mostReserveBytes, limitBytes * reservePart));
}

/** Throws where there is no such file. */
type Read = (path: string) => string;

interface Hierarchy {
  limit: string;
  used: string;
  /** Of `memory.stat`: file pages, which the kernel gives up before it kills. */
  reclaimable: readonly string[];
}
const unified: Hierarchy = {
  limit: 'memory.max',
  used: 'memory.current',
  reclaimable: ['active_file', 'inactive_file'],
};
const legacy: Hierarchy = {
  limit: 'memory.limit_in_bytes',
  used: 'memory.usage_in_bytes',
  reclaimable: ['total_active_file', 'total_inactive_file'],
};

/** Throws where this process can open nothing more. */
export function systemMemory(read: Read = (path) => readFileSync(path, 'utf8')): SystemMemory {
  const info = fields(attempt(read, '/proc/meminfo') ?? '');
  const kibibytes = (name: string) => 1024 * (info.get(`${name}:`) ?? Number.POSITIVE_INFINITY);
  let availableBytes = kibibytes('MemAvailable');
  let group: string | null = null;
  let limitBytes = kibibytes('MemTotal');
  const mostBytes = limitBytes + 1024 * (info.get('SwapTotal:') ?? 0);
  for (const { directory, hierarchy } of memoryGroups(read)) {
    const { most, left } = leftIn(read, directory, hierarchy);
    if (left >= availableBytes) continue;
    availableBytes = left;
    limitBytes = most;
    group = directory;
  }
  return { mostBytes, availableBytes, group, limitBytes };
}

/** Infinity for a group without a limit. */
function leftIn(
  read: Read,
  directory: string,
  { limit, used, reclaimable }: Hierarchy,
): { most: number; left: number } {
  const figure = (name: string) => Number.parseInt(attempt(read, posix.join(directory, name)) ?? '', 10);
  const most = figure(limit);
  const taken = figure(used);
  if (Number.isNaN(most) || Number.isNaN(taken)) {
    return { most: Number.POSITIVE_INFINITY, left: Number.POSITIVE_INFINITY };
  }
  const stat = fields(attempt(read, posix.join(directory, 'memory.stat')) ?? '');
  const files = reclaimable.reduce((sum, name) => sum + (stat.get(name) ?? 0), 0);
  return { most, left: Math.max(0, most - taken + Math.min(files, taken)) };
}

/** The group of this process and those above it, as far as they can be seen from here. */
function memoryGroups(read: Read): { directory: string; hierarchy: Hierarchy }[] {
  const mounts = (attempt(read, '/proc/self/mountinfo') ?? '').split('\n').map(parseMount);
  const groups: { directory: string; hierarchy: Hierarchy }[] = [];
  for (const line of (attempt(read, '/proc/self/cgroup') ?? '').split('\n')) {
    const [, controllers, path] = /^\d+:([^:]*):(\/.*)$/.exec(line) ?? [];
    if (controllers === undefined || path === undefined) continue;
    const hierarchy = controllers === '' ? unified : legacy;
    if (hierarchy === legacy && !controllers.split(',').includes('memory')) continue;
    const mount = mounts.find((each) =>
      hierarchy === unified
        ? each?.type === 'cgroup2'
        : each?.type === 'cgroup' && each.options.includes('memory'),
    );
    if (!mount) continue;
    // In a container the mount's root is often the container's own group.
    const below = posix.relative(mount.root, path);
    let directory = below.startsWith('..') ? mount.point : posix.join(mount.point, below);
    for (; ; directory = posix.dirname(directory)) {
      groups.push({ directory, hierarchy });
      if (directory === mount.point || directory === '/') break;
    }
  }
  return groups;
}

/** Of /proc/self/mountinfo, see proc_pid_mountinfo(5). */
function parseMount(line: string): { root: string; point: string; type: string; options: string[] } | null {
  const [before = '', after = ''] = line.split(' - ');
  const [, , , root, point] = before.split(' ');
  const [type, , options] = after.split(' ');
  return root && point && type ? { root, point, type, options: options?.split(',') ?? [] } : null;
}

/** `name value` a line. */
function fields(text: string): Map<string, number> {
  const found = new Map<string, number>();
  for (const line of text.split('\n')) {
    const [name = '', value = ''] = line.split(/\s+/);
    const number = Number.parseInt(value, 10);
    if (!Number.isNaN(number)) found.set(name, number);
  }
  return found;
}

function attempt(read: Read, path: string): string | null {
  try {
    return read(path);
  } catch (error) {
    // Such a file there is: without it there would seem to be no limit.
    if (['EMFILE', 'ENFILE', 'ENOMEM'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
    return null;
  }
}
