/**
 * Finds the pressure under which a host takes memory in at a given rate, by a bare writer (floors/pressure_floor.c)
 * that receives a guest's worth over the lab's link. The rate is what the writer did over the whole of it, not a
 * model's: memory and neighbour follow from the step, the CPU quota is searched for.
 */
import { runFloor, startFloorServer } from '../support/processes.js';
import { type Host, labCongestionControl } from './namespaces.js';
import { type Pressure, type PressuredHost, receiverBytes } from './pressured-host.js';

export interface Step {
  /** MB/s; the step's name. */
  target: number;
  pressure: Pressure;
  /** MB/s, what the bare writer did in the end. */
  measured: number;
  /** Within 15 % of the target, and on the side of it that the target asks for. */
  reached: boolean;
}

export interface Wanted {
  /** MB/s. */
  target: number;
  /** What must not be exceeded, MB/s: for the step that is "below 20". */
  below?: number;
  /** Bytes of the guest that fit beside the neighbour; null: all memory there is, and no CPU quota. */
  roomBytes: number | null;
  thrashBytes: number;
}

const tolerance = 0.15;
/** A first probe this close is worth a second one of the same quota; both together decide. */
const closeEnough = 0.12;
const mostProbes = 10;
/** Less is below the kernel's least quota; more is no limit for a receiver here. */
const quotas = { least: 0.02, most: 2 };
/** The rate follows the quota, roughly in proportion, and not quite the same twice: no step may be too large. */
const largestStep = 2;
/** A writer this much slower than wanted is not waited for. */
const patience = 3;
/** Where the search begins: MB/s that a whole CPU swaps out here. */
const firstGuess = 150;

const rates = new WeakMap<PressuredHost, Map<string, Promise<Step>>>();

/** MB/s that a bare writer takes in; 0 when it would take longer than `timeoutMs`. */
export async function bareRate(
  host: PressuredHost,
  source: Host,
  bytes: number,
  timeoutMs: number,
): Promise<number> {
  const cc = ['--cc', labCongestionControl];
  const server = await startFloorServer(
    'pressure_floor',
    ['--host', host.host.address, '--ballast', receiverBytes, ...cc],
    host.host.namespace,
    host.place,
  );
  try {
    const args = [
      '--role',
      'client',
      '--host',
      host.host.address,
      '--port',
      server.port,
      '--bytes',
      bytes,
      ...cc,
    ];
    const { bytesPerSecond } = await runFloor<{ bytesPerSecond: number }>('link_floor', args, {
      namespace: source.namespace,
      timeoutMs,
    });
    return bytesPerSecond / 1e6;
  } catch {
    return 0;
  } finally {
    await server.stop();
  }
}

/** Cached for the host, that is for the run. The host is left released. */
export function calibrate(
  host: PressuredHost,
  source: Host,
  bytes: number,
  wanted: Wanted,
  tell: (text: string) => void,
): Promise<Step> {
  const known = rates.get(host) ?? new Map<string, Promise<Step>>();
  rates.set(host, known);
  const key = JSON.stringify([bytes, wanted]);
  const step = known.get(key) ?? search(host, source, bytes, wanted, tell);
  known.set(key, step);
  return step;
}

async function search(
  host: PressuredHost,
  source: Host,
  bytes: number,
  { target, below, roomBytes, thrashBytes }: Wanted,
  tell: (text: string) => void,
): Promise<Step> {
  const memoryBytes = roomBytes === null ? null : receiverBytes + thrashBytes + roomBytes;
  const error = (rate: number): number => Math.abs(rate / target - 1);
  const timeoutMs = 2000 + (patience * bytes * 1e3) / (target * 1e6);
  let cpuShare: number | null = roomBytes === null ? null : target / firstGuess;
  let probes = 0;
  const probe = async (pressure: Pressure): Promise<number> => {
    probes++;
    await host.apply(pressure);
    const rate = await bareRate(host, source, bytes, timeoutMs);
    await host.release();
    const share = pressure.cpuShare === null ? 'no quota' : `${pressure.cpuShare.toFixed(3)} CPU`;
    tell(`calibrating ${target} MB/s: ${share} gives ${rate.toFixed(1)}`);
    return rate;
  };
  let best: Step | null = null;
  while (probes < mostProbes) {
    const pressure = { memoryBytes, thrashBytes, cpuShare };
    let measured = await probe(pressure);
    if (error(measured) <= closeEnough && cpuShare !== null) {
      measured = (measured + (await probe(pressure))) / 2;
    }
    const reached = error(measured) <= tolerance && (below === undefined || measured < below);
    if (best === null || error(measured) < error(best.measured))
      best = { target, pressure, measured, reached };
    if (reached || cpuShare === null) break;
    const wanting = measured > 0 ? target / measured : largestStep;
    const factor = Math.min(largestStep, Math.max(1 / largestStep, wanting));
    cpuShare = Math.min(quotas.most, Math.max(quotas.least, cpuShare * factor));
  }
  if (best === null) throw new Error('no probe was made');
  return best;
}

/**
 * The paper's 16, 15, 14, 13 and 12 GB: about 120, 80, 60, 40 and below 20 MB/s. At the first everything fits, as
 * it nearly did there; then less and less of the guest does.
 */
export function paperSteps(guestBytes: number): Wanted[] {
  const page = 4096;
  const part = (fraction: number): number => Math.floor((guestBytes * fraction) / page) * page;
  const thrashBytes = part(0.25);
  return [
    { target: 120, roomBytes: null, thrashBytes },
    { target: 80, roomBytes: part(0.7), thrashBytes },
    { target: 60, roomBytes: part(0.55), thrashBytes },
    { target: 40, roomBytes: part(0.4), thrashBytes },
    { target: 17, below: 20, roomBytes: part(0.25), thrashBytes },
  ];
}
