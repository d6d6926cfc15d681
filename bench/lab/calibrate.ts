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
/** Of a small guest: near enough to try the whole one. */
const closeEnough = 0.12;
const smallScale = 1 / 4;
const smallProbes = 4;
const wholeProbes = 3;
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

/** Small guests first, in as much less room: the quota is the same, and a probe takes a quarter of the time. */
async function search(
  host: PressuredHost,
  source: Host,
  bytes: number,
  wanted: Wanted,
  tell: (text: string) => void,
): Promise<Step> {
  const { target } = wanted;
  const probe = async (
    scale: number,
    cpuShare: number | null,
  ): Promise<{ pressure: Pressure; rate: number }> => {
    const pressure = pressureFor(wanted, scale, cpuShare);
    const timeoutMs = 2000 + (patience * bytes * scale * 1e3) / (target * 1e6);
    await host.apply(pressure);
    const rate = await bareRate(host, source, Math.floor((bytes * scale) / 4096) * 4096, timeoutMs);
    await host.release();
    const share = cpuShare === null ? 'no quota' : `${cpuShare.toFixed(3)} CPU`;
    tell(
      `calibrating ${target} MB/s: ${share} gives ${rate.toFixed(1)}${scale < 1 ? ' (a small guest)' : ''}`,
    );
    return { pressure, rate };
  };
  const adjusted = (cpuShare: number, rate: number): number => {
    const factor = Math.min(largestStep, Math.max(1 / largestStep, rate > 0 ? target / rate : largestStep));
    return Math.min(quotas.most, Math.max(quotas.least, cpuShare * factor));
  };
  let cpuShare = wanted.roomBytes === null ? null : target / firstGuess;
  for (let probes = 0; probes < smallProbes && cpuShare !== null; probes++) {
    const { rate } = await probe(smallScale, cpuShare);
    if (fits(wanted, rate, closeEnough)) break;
    cpuShare = adjusted(cpuShare, rate);
  }
  let best: Step | null = null;
  for (let probes = 0; probes < wholeProbes; probes++) {
    const { pressure, rate } = await probe(1, cpuShare);
    const reached = fits(wanted, rate, tolerance);
    if (best === null || Math.abs(rate - target) < Math.abs(best.measured - target)) {
      best = { target, pressure, measured: rate, reached };
    }
    if (reached || cpuShare === null) break;
    cpuShare = adjusted(cpuShare, rate);
  }
  if (best === null) throw new Error('no probe was made');
  return best;
}

function pressureFor({ roomBytes, thrashBytes }: Wanted, scale: number, cpuShare: number | null): Pressure {
  const scaled = (part: number): number => Math.floor((part * scale) / 4096) * 4096;
  return {
    memoryBytes: roomBytes === null ? null : receiverBytes + scaled(thrashBytes) + scaled(roomBytes),
    thrashBytes: scaled(thrashBytes),
    cpuShare,
  };
}

/** For the step that is "below 20" any rate below it is one, as long as a run ends. */
function fits({ target, below }: Wanted, rate: number, within: number): boolean {
  if (below !== undefined) return rate < below && rate > below / 2;
  return Math.abs(rate / target - 1) <= within;
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
