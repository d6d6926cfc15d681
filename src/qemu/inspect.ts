/**
 * What a QEMU is made of, asked over QMP before anything is done to it, and why it cannot be moved: RAM that is not in
 * a shared backend (QEMU's own stream would carry it), or devices that write RAM from another process or by hardware,
 * whose writes no dirty tracking of QEMU's memory can see.
 */
import { z } from 'zod';
import { memferryError } from '../errors.js';
import type { Qmp, QmpOptions } from './qmp.js';

export interface Backend {
  id: string;
  lengthBytes: number;
  memPath: string | null;
}

export interface Machine {
  /** QEMU's version. */
  qemu: string;
  /** As `pc-i440fx-7.2-machine`. */
  type: string;
  cpus: number;
  /** Sorted by id. */
  backends: Backend[];
}

/** Objects and devices by their QOM type, and what is wrong with them. */
const foreignWriters: readonly [RegExp, string][] = [
  [/^vhost-user(-|$)|-vhost-user(-|$)/, 'its backend writes RAM from another process'],
  [/^vhost-vdpa/, 'hardware writes RAM'],
  [/^vfio-|^x-vfio-user/, 'hardware writes RAM'],
  [/^pvrdma$/, 'hardware writes RAM'],
  [/^ivshmem(-|$)/, 'other guests write its memory'],
  [/^x-(pci-proxy-dev|remote-object)$/, 'another process writes RAM'],
];
const foreignNetwork: readonly [RegExp, string][] = [
  [/type=vhost-user\b/, 'its backend writes RAM from another process'],
  [/type=vhost-vdpa\b/, 'hardware writes RAM'],
];

/** An object in `info qom-tree`: two spaces deeper than what it is part of, `/name (type)`. */
const treeLine = /^((?: {2})*)\/(.*) \(([^()\s]+)\)$/;

const statusSchema = z.object({ status: z.string(), running: z.boolean() });
const memdevSchema = z.array(
  z.object({ id: z.string().optional(), size: z.number().int().positive(), share: z.boolean().optional() }),
);
const migrationSchema = z.object({
  status: z.string().optional(),
  'blocked-reasons': z.array(z.string()).optional(),
});

export async function runState(qmp: Qmp, options?: QmpOptions): Promise<z.output<typeof statusSchema>> {
  return checked('query-status', statusSchema, await qmp.execute('query-status', {}, options));
}

/** QEMU's answers are checked too; one that is none is PROTOCOL_ERROR. */
export function checked<Schema extends z.ZodType>(
  command: string,
  schema: Schema,
  value: unknown,
): z.output<Schema> {
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw memferryError('PROTOCOL_ERROR', `QEMU answers ${command} otherwise than QMP says`, {
    cause: parsed.error,
  });
}

/**
 * @throws GUEST_UNMOVABLE, `names` being what is in the way; GUEST_BUSY while QEMU migrates by itself
 */
export async function inspect(qmp: Qmp, options?: QmpOptions): Promise<Machine> {
  const ask = (command: string, args: object = {}) => qmp.execute(command, args, options);
  const text = async (command: string) =>
    checked(command, z.string(), await ask('human-monitor-command', { 'command-line': command }));
  const foreignIn = async (path: string) => foreignObjects(await text(`info qom-tree ${path}`));
  // All of it asked at once: each answer waits for QEMU to come to it, and for this process to be woken.
  const [migration, type, cpus, backends, ofMachine, ofUser, networks] = await Promise.all([
    requireNoMigration(qmp, options),
    ask('qom-get', { path: '/machine', property: 'type' }),
    ask('query-cpus-fast'),
    sharedBackends(ask),
    foreignIn('/machine'),
    foreignIn('/objects'),
    text('info network').then(foreignNetworks),
  ]);
  const foreign = [...(migration['blocked-reasons'] ?? []), ...ofMachine, ...ofUser, ...networks];
  if (foreign.length > 0) {
    throw memferryError('GUEST_UNMOVABLE', `this QEMU cannot be moved: ${foreign.join('; ')}`, {
      facts: { names: foreign },
    });
  }
  return {
    qemu: qmp.version,
    type: checked('qom-get', z.string().max(256), type),
    cpus: checked('query-cpus-fast', z.array(z.unknown()), cpus).length,
    backends,
  };
}

/** @throws GUEST_BUSY */
export async function requireNoMigration(
  qmp: Qmp,
  options?: QmpOptions,
): Promise<z.output<typeof migrationSchema>> {
  const migration = checked(
    'query-migrate',
    migrationSchema,
    await qmp.execute('query-migrate', {}, options),
  );
  const underWay = ['setup', 'active', 'device', 'pre-switchover', 'wait-unplug', 'postcopy-active'];
  if (!underWay.includes(migration.status ?? '')) return migration;
  throw memferryError('GUEST_BUSY', 'QEMU migrates by itself already', { facts: { names: ['migrate'] } });
}

const nodesSchema = z.array(
  z.object({
    'node-name': z.string().optional(),
    file: z.string().optional(),
    cache: z.object({ direct: z.boolean() }).optional(),
  }),
);

/**
 * Disks past the page cache (`cache=none`) are read into pinned pages of RAM: write protection is lifted when a read
 * begins, a round may protect the page again and send it, and what the disk then writes is seen by nobody.
 * @throws GUEST_UNMOVABLE with the disks' names
 */
export async function requireTrackableDisks(qmp: Qmp, options?: QmpOptions): Promise<void> {
  const nodes = checked(
    'query-named-block-nodes',
    nodesSchema,
    await qmp.execute('query-named-block-nodes', { flat: true }, options),
  );
  const names = nodes
    .filter(({ cache }) => cache?.direct)
    .map((node) => node['node-name'] ?? node.file ?? 'a disk');
  if (names.length === 0) return;
  throw memferryError(
    'GUEST_UNMOVABLE',
    `what these disks write into RAM (cache.direct, as with cache=none) is seen by no dirty tracker: ${names.join(', ')}; ` +
      'move this guest in a mode without rounds (post-copy, scatter), or with another cache',
    { facts: { names } },
  );
}

type Ask = (command: string, args?: object) => Promise<unknown>;

async function sharedBackends(ask: Ask): Promise<Backend[]> {
  const [listed, main] = await Promise.all([
    ask('query-memdev'),
    ask('qom-get', { path: '/machine', property: 'memory-backend' }).catch(() => ''),
  ]);
  const memdevs = checked('query-memdev', memdevSchema, listed);
  const apart = memdevs.filter(({ share, id }) => share !== true || id === undefined);
  const remedy =
    '-object memory-backend-file,id=ram0,size=SIZE,share=on,mem-path=/dev/shm -machine ...,memory-backend=ram0';
  if (memdevs.length === 0 || apart.length > 0) {
    const names = apart.map(({ id, size }) => id ?? `a backend of ${size} bytes`);
    throw memferryError(
      'GUEST_UNMOVABLE',
      `RAM that QEMU shares with nobody cannot be moved (${names.join(', ') || 'no memory backend at all'}): start ` +
        `QEMU with ${remedy}`,
      { facts: { names } },
    );
  }
  const nodes = memdevs.length > 1;
  // Without it the RAM is QEMU's own and the backends are something else (a NUMA node's are the RAM together).
  if (!nodes && !memdevs.some(({ id }) => main === `/objects/${id}` || main === id)) {
    throw memferryError(
      'GUEST_UNMOVABLE',
      `the machine's RAM is in no memory backend: start QEMU with ${remedy}`,
      {
        facts: { names: ['RAM'] },
      },
    );
  }
  const backends: Backend[] = [];
  for (const { id, size } of memdevs) {
    const path = await ask('qom-get', { path: `/objects/${id}`, property: 'mem-path' }).catch(() => null);
    backends.push({ id: id as string, lengthBytes: size, memPath: typeof path === 'string' ? path : null });
  }
  return backends.sort((a, b) => (a.id < b.id ? -1 : 1));
}

/**
 * Pure: of `info qom-tree`. QMP tells the same by a question for each object, of which a machine has hundreds.
 * @throws PROTOCOL_ERROR where it is no tree
 */
export function foreignObjects(tree: string): string[] {
  const found: string[] = [];
  const path: string[] = [];
  for (const line of tree.split(/\r?\n/)) {
    if (line === '' && path.length > 0) continue;
    const [, indent, name, type] = treeLine.exec(line) ?? [];
    const depth = (indent?.length ?? 0) / 2;
    if (name === undefined || type === undefined || depth > path.length || (depth === 0 && path.length > 0)) {
      throw memferryError(
        'PROTOCOL_ERROR',
        `QEMU's tree of objects is not understood at '${line.slice(0, 80)}'`,
      );
    }
    path.splice(depth, path.length, name);
    for (const [pattern, why] of foreignWriters) {
      if (pattern.test(type)) found.push(`/${path.join('/')} (${type}: ${why})`);
    }
  }
  return found;
}

/** Pure: of `info network`, in which QMP says nothing. */
export function foreignNetworks(text: string): string[] {
  return text
    .split(/\r?\n/)
    .flatMap((line) =>
      foreignNetwork
        .filter(([pattern]) => pattern.test(line))
        .map(([, why]) => `network ${line.trim().replace(/^\\ /, '').split(':')[0]} (${why})`),
    );
}
