/** One whole migration between fresh processes of the rig: a guest, or a gang at once, in one mode. */
import type { MigrationReport } from 'memferry';
import type { PressuredHost } from '../lab/pressured-host.js';
import { Peer } from '../support/processes.js';
import type { ListenParameters } from './guest-destination.js';
import type { StartParameters } from './guest-source.js';
import type { GuestSpec } from './guests.js';
import type { Rig } from './rig.js';

export type PaperMode = 'pre-copy' | 'post-copy' | 'scatter';
/** Those of the paper's figures, and what is measured beside them. */
export type MigrationMode = PaperMode | 'scatter-pre-copy';
export const directModes = ['pre-copy', 'post-copy'] as const;
export const allModes: readonly PaperMode[] = ['pre-copy', 'post-copy', 'scatter'];

export interface MigrationPlan {
  mode: MigrationMode;
  guest: GuestSpec;
  /** Guests that leave at once. */
  count?: number;
  /** Scatter modes: how many intermediaries; 0: none, as post-copy. */
  via?: number;
  /** Of the intermediaries' links; without it they are as fast as every host's. */
  intermediaryMbits?: number;
  /** For migrate() and listen(), beyond what every migration of the rig has. */
  migrate?: Record<string, unknown>;
  listen?: Record<string, unknown>;
  /** The destination under pressure; without it, as it is. */
  pressured?: PressuredHost | null;
  /** Compare digests at the end, which takes the destination as long again under pressure. */
  verify?: boolean;
  /** Awaited before it begins, with the guest running at the source. */
  ready?: () => Promise<void>;
  /** Called when the source is evicted. */
  evicted?: () => void;
  /** Awaited at its end, with the guest running at the destination. */
  over?: () => Promise<void>;
}

export interface Outcome {
  /** Of the last guest, from the start of the first. */
  evictionMs: number;
  totalMs: number;
  /** The longest. */
  downtimeMs: number;
  /** By the monotonic clock. */
  startedAtMs: number;
  remoteFaults: number;
  bytesOnWire: number;
  /** With content, as often as each went. */
  pagesSent: number;
  /** CPU time of hashing for deduplication, in all guests' sources; 0 without. */
  dedupCpuMs: number;
  /** null: the report does not tell. */
  pagesDirect: number | null;
}

/**
 * Pre-copy of a guest that writes faster than the destination takes in has no end; so many rounds show it. (Figure 12
 * has 30.)
 */
export const boundedRounds = { maxRounds: 2 };

/** Slower than anything that is measured; a migration that hangs ends the run. */
const leastBytesPerSecond = 2e6;
/** Hosts under pressure answer late. */
const patience = {
  peerTimeoutMs: 60_000,
  prepareTimeoutMs: 60_000,
};

/** null where the mode is not available; the rig then knows why. */
export async function runMigration(rig: Rig, plan: MigrationPlan): Promise<Outcome | null> {
  return orRepeated(rig, plan.mode, () => run(rig, plan));
}

/** null, and nothing is begun, where the mode is not available. */
async function orRepeated<T>(rig: Rig, mode: MigrationMode, migration: () => Promise<T>): Promise<T | null> {
  if (mode === 'scatter' && rig.scatterObstacle !== null) return null;
  try {
    return await repeatedOnce(rig, `a migration in mode ${mode}`, migration, (error) => {
      // A version that knows the mode's name and refuses it all the same.
      return mode === 'scatter' && /INVALID_ARGUMENT|NOT_SUPPORTED|UNSUPPORTED/.test(String(error));
    });
  } catch (error) {
    if (!(error instanceof Unavailable)) throw error;
    rig.scatterObstacle = `mode scatter was refused: ${error.message}`;
    rig.tell(rig.scatterObstacle);
    return null;
  }
}

class Unavailable extends Error {}

/**
 * One that fails is told, noted in the figure, and done once more: an evaluation of an hour must not end with it. The
 * second failure ends the figure.
 * @throws what the second has failed with; Unavailable when the first has failed in vain
 */
export async function repeatedOnce<T>(
  rig: Rig,
  what: string,
  migration: () => Promise<T>,
  inVain: (error: unknown) => boolean = () => false,
): Promise<T> {
  try {
    return await migration();
  } catch (error) {
    const [reason] = String(error).split('\n');
    if (inVain(error)) throw new Unavailable(reason);
    rig.failures.push(`${what} failed and was repeated: ${reason}`);
    rig.tell(`${rig.failures.at(-1)}`);
    return await migration();
  }
}

async function run(rig: Rig, plan: MigrationPlan): Promise<Outcome> {
  const { mode, guest, count = 1, pressured, verify = true } = plan;
  const bytes = guest.lengthBytes * count;
  const timeoutMs = 120_000 + (bytes / leastBytesPerSecond) * 1000;
  const scatters = mode === 'scatter' || mode === 'scatter-pre-copy';
  const via = scatters ? (plan.via ?? 1) : 0;
  const stage = await rig.stage(via, 2 * bytes + 2 ** 26, plan.intermediaryMbits);
  const source = Peer.start('paper/guest-source', { namespace: rig.source.namespace });
  const destination = Peer.start(
    'paper/guest-destination',
    pressured?.place ?? { namespace: rig.destination.namespace },
  );
  try {
    const common = { secretFile: rig.secretFile, plaintext: true, ...patience };
    const listening: ListenParameters = {
      host: rig.destination.address,
      spec: guest,
      options: { ...common, ...plan.listen },
    };
    const [port] = await Promise.all([
      destination.call<number>('listen', listening, timeoutMs),
      source.call('make', { spec: guest, count, host: rig.source.address }, timeoutMs),
    ]);
    const start: StartParameters = {
      to: { host: rig.destination.address, port },
      options: {
        ...common,
        mode,
        verify,
        connectTimeoutMs: 30_000,
        pauseTimeoutMs: 30_000,
        ...(scatters ? { via: stage.via, onCapacity: 'direct' as const } : {}),
        ...plan.migrate,
      },
    };
    await plan.ready?.();
    const startedAtMs = await source.call<number>('start', start, timeoutMs);
    const [reports] = await Promise.all([
      source.call<MigrationReport[]>('done', null, timeoutMs),
      source.call('evicted', null, timeoutMs).then(() => plan.evicted?.()),
    ]);
    await plan.over?.();
    return summary(reports, startedAtMs);
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
    await Promise.all(stage.servers.map((server) => server.stop()));
  }
}

function summary(reports: (MigrationReport & { pagesDirect?: number })[], startedAtMs: number): Outcome {
  const most = (figure: (report: MigrationReport) => number): number => Math.max(...reports.map(figure));
  const sum = (figure: (report: MigrationReport) => number): number =>
    reports.reduce((total, report) => total + figure(report), 0);
  const direct = reports.map(({ pagesDirect }) => pagesDirect);
  return {
    evictionMs: most(({ evictionMs }) => evictionMs),
    totalMs: most(({ totalMs }) => totalMs),
    downtimeMs: most(({ downtimeMs }) => downtimeMs),
    startedAtMs,
    remoteFaults: sum(({ remoteFaults }) => remoteFaults.count),
    bytesOnWire: sum(({ bytesOnWire }) => bytesOnWire),
    pagesSent: sum(({ pagesSent }) => pagesSent),
    dedupCpuMs: sum(({ dedup }) => dedup?.cpuMs ?? 0),
    pagesDirect: direct.every((pages) => pages !== undefined)
      ? direct.reduce((total, pages) => total + (pages ?? 0), 0)
      : null,
  };
}

/** Each round the other way round, so that none always runs on the machine that another left warm. */
export function inTurns<T>(items: readonly T[], round: number): T[] {
  return round % 2 === 0 ? [...items] : [...items].reverse();
}
