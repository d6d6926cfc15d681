/**
 * Remote faults between two network namespaces at 1 Gb/s, during a full push that is not told the link's
 * rate. Latencies as in `fault`, against the floor on the idle link; what push and faults move together
 * against what one raw stream does; an eviction with a fault now and then against one without.
 */
import { Lab, labObstacle } from '../lab/namespaces.js';
import { labFaultFloor, labLinkRate } from '../support/lab-floors.js';
import { type FaultFloor, latency, type PushFigures, pushAll } from '../support/remote-faults.js';
import { atLeastTimesFloor, atMostTimesFloor } from '../support/result.js';
import { paired, type Trial } from '../support/trial.js';

const pushBytes = 512 * 2 ** 20;
const thinkingMs = 0.25;
const occasionalEveryMs = 20;

export async function run(trial: Trial): Promise<void> {
  const obstacle = labObstacle();
  if (obstacle !== null) {
    trial.skip('1gbit', obstacle);
    return;
  }
  const lab = Lab.open({ hosts: 2, rate: '1gbit' });
  try {
    await measure(trial, lab);
  } finally {
    lab.close();
  }
}

async function measure(trial: Trial, lab: Lab): Promise<void> {
  const [source, destination] = lab.hosts;
  if (source === undefined || destination === undefined) throw new Error('a lab of two hosts');
  const pair = {
    channels: 2,
    host: destination.address,
    sourceNamespace: source.namespace,
    destinationNamespace: destination.namespace,
  };

  const floors: FaultFloor[] = [];
  const links: number[] = [];
  const busy: PushFigures[] = [];
  const alone: PushFigures[] = [];
  const occasional: PushFigures[] = [];
  for (let round = trial.samples(5); round > 0; round--) {
    floors.push(await labFaultFloor(source, destination));
    links.push(await labLinkRate(source, destination));
    busy.push(await pushAll(pushBytes, pair, { order: 'random', touches: Infinity, everyMs: thinkingMs }));
    alone.push(await pushAll(pushBytes, pair, null));
    const touching = { order: 'random', touches: Infinity, everyMs: occasionalEveryMs } as const;
    occasional.push(await pushAll(pushBytes, pair, touching));
  }

  const at = (q: number): number[] => busy.map((figures) => latency(figures, q));
  trial.report(
    '1gbit-push-p50',
    'us',
    paired(
      at(0.5),
      floors.map(({ p50Us }) => p50Us),
    ),
    atMostTimesFloor(2, "the idle floor's p50"),
    `faults: ${busy.map(({ latenciesUs }) => latenciesUs.length).join(', ')}`,
  );
  trial.report(
    '1gbit-push-p99',
    'us',
    paired(
      at(0.99),
      floors.map(({ p99Us }) => p99Us),
    ),
    atMostTimesFloor(5, "the idle floor's p99"),
  );
  trial.report(
    '1gbit-push-and-faults',
    'MB/s',
    paired(
      busy.map(({ milliseconds }) => pushBytes / 1e3 / milliseconds),
      links,
    ),
    atLeastTimesFloor(0.93, 'what a raw stream delivers'),
  );
  trial.report(
    '1gbit-eviction-occasional-faults',
    'ms',
    paired(
      occasional.map(({ milliseconds }) => milliseconds),
      alone.map(({ milliseconds }) => milliseconds),
    ),
    atMostTimesFloor(1.03, 'the eviction without faults'),
    `faults: ${occasional.map(({ latenciesUs }) => latenciesUs.length).join(', ')}`,
  );
}
