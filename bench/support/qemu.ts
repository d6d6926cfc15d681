/** QEMUs for benchmarks: those of the tests' rig, asked over QMP, and QEMU's own migration timed by its own account. */
import { createServer } from 'node:net';
import { join } from 'node:path';
import { repositoryRoot } from './paths.js';

export interface Qemu {
  readonly qmp: string;
  readonly shim: string;
  readonly pid: number;
  readonly serial: string;
  readonly ended: Promise<unknown>;
  ticks(more?: number, timeoutMs?: number): Promise<void>;
  stop(): Promise<void>;
}

interface QemuRig {
  Qemu: {
    start(options: {
      args: string[];
      incoming?: boolean;
      prefix?: string[];
      preload?: string;
    }): Promise<Qemu>;
  };
  guestArguments(options: {
    memoryMb?: number;
    fillMb?: number;
    dirtyPages?: number;
    tickMs?: number;
    backend?: string | null;
  }): string[];
  problemOf(serials: string[]): string | null;
  qemuObstacle(): string | null;
}

export interface Qmp {
  execute(command: string, args?: object, options?: { timeoutMs?: number }): Promise<unknown>;
  event(
    wanted: (event: { name: string; data: Record<string, unknown> }) => boolean,
    what: string,
    options?: { timeoutMs?: number },
  ): Promise<unknown>;
  close(): Promise<void>;
}

/** Both are no part of what the benchmarks are compiled from. */
export const qemuRig = (await import(join(repositoryRoot, 'test/support/qemu/rig.mjs'))) as QemuRig;
const { Qmp: QmpClient } = (await import(join(repositoryRoot, 'lib/qemu/qmp.js'))) as {
  Qmp: { connect(path: string): Promise<Qmp> };
};

export type QemuMode = 'pre-copy' | 'multifd' | 'post-copy';

export interface OwnMigration {
  mode: QemuMode;
  /** Where the destination listens. */
  host: string;
  port: number;
  timeoutMs: number;
  /** It is to go on there; else it was never running. */
  running: boolean;
}

export interface OwnOutcome {
  /** From the command until the destination has all of it, by this process's clock. */
  totalMs: number;
  /** By QEMU's own account. */
  downtimeMs: number;
  bytes: number;
}

/** A port that was free a moment ago. */
export async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as { port: number };
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** QEMU's own migration, with as many channels as memferry has, and no limit of its own. */
export async function migrateByItself(
  source: Qemu,
  destination: Qemu,
  { mode, host, port, timeoutMs, running }: OwnMigration,
): Promise<OwnOutcome> {
  const [here, there] = await Promise.all([
    QmpClient.connect(source.qmp),
    QmpClient.connect(destination.qmp),
  ]);
  try {
    const wanted = [
      'events',
      ...{ 'pre-copy': [], multifd: ['multifd'], 'post-copy': ['postcopy-ram'] }[mode],
    ];
    const capabilities = wanted.map((capability) => ({ capability, state: true }));
    for (const qmp of [here, there]) {
      await qmp.execute('migrate-set-capabilities', { capabilities });
      await qmp.execute('migrate-set-parameters', { 'max-bandwidth': 2 ** 40, 'multifd-channels': 2 });
    }
    const uri = `tcp:${host}:${port}`;
    await there.execute('migrate-incoming', { uri });
    const over = (qmp: Qmp) =>
      qmp.event(
        ({ name, data }) => name === 'MIGRATION' && ['completed', 'failed'].includes(String(data['status'])),
        "the end of QEMU's migration",
        { timeoutMs },
      );
    const active = here.event(({ data }) => data['status'] === 'active', 'its beginning', { timeoutMs });
    const ends = [over(here), over(there)];
    const began = performance.now();
    await here.execute('migrate', { uri });
    if (mode === 'post-copy') {
      await active;
      await here.execute('migrate-start-postcopy');
    }
    await Promise.all([active, ...ends]);
    const totalMs = performance.now() - began;
    if (running) await there.execute('cont', {}, { timeoutMs: 60_000 });
    const account = (await here.execute('query-migrate')) as {
      status: string;
      downtime?: number;
      'error-desc'?: string;
      ram: { transferred: number };
    };
    if (account.status !== 'completed') {
      throw new Error(`QEMU's ${mode} ${account.status}: ${account['error-desc'] ?? ''}`);
    }
    return { totalMs, downtimeMs: account.downtime ?? Number.NaN, bytes: account.ram.transferred };
  } finally {
    await Promise.all([here.close(), there.close()]);
  }
}
