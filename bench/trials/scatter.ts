/**
 * A scatter to two VMD servers. Over loopback: the rate at which a source without a destination evicts, against
 * raw sockets to two processes; a fault served by a server, against one served by the source; what the servers'
 * index takes. Between network namespaces at 1 Gb/s: faults during a full scatter, against the floor on the idle
 * link, and what eviction makes of the link meanwhile.
 */
import { readFileSync } from 'node:fs';
import { type Host, Lab, labObstacle } from '../lab/namespaces.js';
import { loadAddon } from '../support/addon.js';
import { serversOnLoopback } from '../support/engine-servers.js';
import type { StageFigures } from '../support/engine-stage.js';
import { labFaultFloor, labLinkRate } from '../support/lab-floors.js';
import { runFloor } from '../support/processes.js';
import { type FaultFloor, latency } from '../support/remote-faults.js';
import { atLeastTimesFloor, atMost, atMostTimesFloor } from '../support/result.js';
import {
  type EvictionFigures,
  evictTouched,
  faultsBeforeAndAfter,
  type IdleFaults,
  scatterAll,
} from '../support/scatters.js';
import { paired, type Trial, takeTurns } from '../support/trial.js';

const servers = 2;
const roundBytes = 2 ** 30;
const idleBytes = 256 * 2 ** 20;
const labBytes = 512 * 2 ** 20;
const touches = 10_000;
const thinkingMs = 0.25;
/** A destination that would take as long for the guest as half a minute: most of it goes to the servers. */
const slow = { bandwidth: 16e6, gatherLimit: 16e6 };

const systemCongestionControl = (): string =>
  readFileSync('/proc/sys/net/ipv4/tcp_congestion_control', 'utf8').trim();
const p50s = (all: readonly FaultFloor[]): number[] => all.map(({ p50Us }) => p50Us);
const p99s = (all: readonly FaultFloor[]): number[] => all.map(({ p99Us }) => p99Us);
const at = (all: readonly { latenciesUs: Float64Array }[], q: number): number[] =>
  all.map((figures) => latency(figures, q));

export async function run(trial: Trial): Promise<void> {
  await measureRate(trial);
  await measureIdleFaults(trial);
  const obstacle = labObstacle();
  if (obstacle !== null) {
    trial.skip('1gbit', obstacle);
    return;
  }
  const lab = Lab.open({ hosts: 2 + servers, rate: '1gbit' });
  try {
    await measureLab(trial, lab);
  } finally {
    lab.close();
  }
}

async function measureRate(trial: Trial): Promise<void> {
  const floor = async (...more: string[]): Promise<number> => {
    const args = ['--bytes', roundBytes, '--channels', servers, '--receivers', servers, ...more];
    return (await runFloor<{ gbPerSecond: number }>('bulk_floor', args)).gbPerSecond;
  };
  const ours = async (memory: 'fresh' | 'preallocated'): Promise<number> => {
    const milliseconds = await scatterAll(roundBytes, serversOnLoopback(servers), memory === 'preallocated');
    return roundBytes / 1e6 / milliseconds;
  };
  const [freshFloors, fresh, bare, touched, unpaced, hashed] = (await takeTurns(trial.samples(5), [
    () => floor('--memory', 'fresh'),
    () => ours('fresh'),
    () => floor('--memory', 'touched'),
    () => ours('preallocated'),
    () => floor('--memory', 'touched', '--cc', 'reno'),
    () => floor('--memory', 'touched', '--cc', 'reno', '--hash'),
  ])) as [number[], number[], number[], number[], number[], number[]];
  // The system's congestion control, as a program gets it that asks for none; and the one that we ask for here.
  trial.report(
    'touched-bare-floor',
    'GB/s',
    paired(touched, bare),
    atLeastTimesFloor(0.8, 'bare raw sockets'),
    `congestion control of the floor: ${systemCongestionControl()}`,
  );
  trial.report('touched-reno-floor', 'GB/s', paired(touched, unpaced), null);
  trial.report('touched-reno-hashed-floor', 'GB/s', paired(touched, hashed), null);
  trial.report('fresh-bare-floor', 'GB/s', paired(fresh, freshFloors), null);
}

/** Of the slab, what neither is free nor holds a page, by page that the map tells of. */
function indexBytes({ image, stage }: StageFigures): number {
  const taken = stage.slabBytes - stage.freeBytes;
  return (taken - image.pagesHeld * loadAddon().pageSize) / image.pagesKnown;
}

async function measureIdleFaults(trial: Trial): Promise<void> {
  const pages = idleBytes / loadAddon().pageSize;
  const floors: FaultFloor[] = [];
  const all: IdleFaults[] = [];
  for (let round = trial.samples(5); round > 0; round--) {
    floors.push(await runFloor('fault_floor', ['--pages', pages, '--touches', touches, '--order', 'random']));
    all.push(await faultsBeforeAndAfter(idleBytes, serversOnLoopback(servers), touches));
  }
  const bySource = all.map(({ source }) => source);
  const byServers = all.map((faults) => faults.servers);
  trial.report(
    'idle-p50',
    'us',
    paired(at(byServers, 0.5), at(bySource, 0.5)),
    atMostTimesFloor(1.3, 'one served by the source'),
    `faults: ${byServers.map(({ latenciesUs }) => latenciesUs.length).join(', ')}`,
  );
  trial.report('idle-p99', 'us', paired(at(byServers, 0.99), at(bySource, 0.99)), null);
  trial.report('idle-p50-raw', 'us', paired(at(byServers, 0.5), p50s(floors)), null);
  trial.report(
    'index',
    'bytes/page',
    all.map(({ figures }) => ({ value: Math.max(...figures.map(indexBytes)), floor: null })),
    atMost(64, 'bytes'),
  );
}

async function measureLab(trial: Trial, lab: Lab): Promise<void> {
  const [source, destination, ...intermediaries] = lab.hosts as [Host, Host, ...Host[]];
  // Three hosts send to it at once.
  lab.setHostRate(destination, 'receive', '1gbit');
  const options = {
    channels: 2,
    host: destination.address,
    sourceNamespace: source.namespace,
    destinationNamespace: destination.namespace,
    limits: slow,
  };
  const places = intermediaries.map(({ address, namespace }) => ({ host: address, namespace }));
  const touching = { order: 'random', touches: Infinity, everyMs: thinkingMs } as const;
  const floors: FaultFloor[] = [];
  const links: number[] = [];
  const evictions: EvictionFigures[] = [];
  for (let round = trial.samples(5); round > 0; round--) {
    floors.push(await labFaultFloor(source, destination));
    links.push(await labLinkRate(source, destination));
    evictions.push(await evictTouched(labBytes, places, options, touching));
  }
  trial.report(
    '1gbit-p50',
    'us',
    paired(at(evictions, 0.5), p50s(floors)),
    atMostTimesFloor(2, "the idle floor's p50"),
    `faults: ${evictions.map(({ latenciesUs }) => latenciesUs.length).join(', ')}`,
  );
  trial.report(
    '1gbit-p99',
    'us',
    paired(at(evictions, 0.99), p99s(floors)),
    atMostTimesFloor(5, "the idle floor's p99"),
  );
  const pageSize = loadAddon().pageSize;
  const direct = evictions.map(({ pagesDirect }) => ((100 * pagesDirect * pageSize) / labBytes).toFixed(0));
  trial.report(
    '1gbit-eviction-and-faults',
    'MB/s',
    paired(
      evictions.map(({ milliseconds }) => labBytes / 1e3 / milliseconds),
      links,
    ),
    null,
    `floor: what a raw stream delivers; % to the destination: ${direct.join(', ')}`,
  );
}
