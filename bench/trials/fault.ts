/**
 * A remote fault on one page over loopback, as the thread that touches the page sees it: from before its read
 * until after it, on both sides. Idle, under a full push, and for a sequential reader. The floor reads the
 * event, makes one blocking round trip, and installs the page.
 *
 * Under the push a guest touches a random page some thousand times a second, and once more as fast as it can
 * (`back-to-back`): then faults alone keep one CPU busy, which the push does not get.
 */
import { loadAddon } from '../support/addon.js';
import type { TouchFigures } from '../support/engine-destination.js';
import { runFloor } from '../support/processes.js';
import { type FaultFloor, latency, type PushFigures, pushAll, touchIdle } from '../support/remote-faults.js';
import { atLeastTimesFloor, atMostTimesFloor } from '../support/result.js';
import { paired, type Trial } from '../support/trial.js';

const idleBytes = 256 * 2 ** 20;
const pushBytes = 2 ** 30;
const touches = 20_000;
const pair = { channels: 2 };
const anywhere = { order: 'random', touches: Infinity } as const;
const thinkingMs = 0.25;

export async function run(trial: Trial): Promise<void> {
  const { pageSize } = loadAddon();
  const floor = (order: 'random' | 'sequential'): Promise<FaultFloor> =>
    runFloor('fault_floor', ['--pages', idleBytes / pageSize, '--touches', touches, '--order', order]);

  const randomFloors: FaultFloor[] = [];
  const sequentialFloors: FaultFloor[] = [];
  const random: TouchFigures[] = [];
  const sequential: TouchFigures[] = [];
  const alone: PushFigures[] = [];
  const paced: PushFigures[] = [];
  const backToBack: PushFigures[] = [];
  for (let round = trial.samples(5); round > 0; round--) {
    randomFloors.push(await floor('random'));
    random.push(await touchIdle(idleBytes, pair, { order: 'random', touches, everyMs: 0 }));
    sequentialFloors.push(await floor('sequential'));
    sequential.push(await touchIdle(idleBytes, pair, { order: 'sequential', touches, everyMs: 0 }));
    alone.push(await pushAll(pushBytes, pair, null));
    paced.push(await pushAll(pushBytes, pair, { ...anywhere, everyMs: thinkingMs }));
    backToBack.push(await pushAll(pushBytes, pair, { ...anywhere, everyMs: 0 }));
  }

  const floorP50 = randomFloors.map(({ p50Us }) => p50Us);
  const floorP99 = randomFloors.map(({ p99Us }) => p99Us);
  const at = (all: { latenciesUs: Float64Array }[], q: number): number[] =>
    all.map((figures) => latency(figures, q));
  const pushRate = ({ milliseconds, pagesAsked }: PushFigures): number =>
    (pushBytes - pagesAsked * pageSize) / 1e6 / milliseconds;

  trial.report(
    'idle-p50',
    'us',
    paired(at(random, 0.5), floorP50),
    atMostTimesFloor(1.25, "the floor's p50"),
  );
  trial.report('idle-p99', 'us', paired(at(random, 0.99), floorP99), null);
  for (const [name, touched, reach] of [
    ['push', paced, atLeastTimesFloor(0.75, 'the push alone')],
    ['back-to-back', backToBack, null],
  ] as const) {
    trial.report(
      `${name}-p50`,
      'us',
      paired(at(touched, 0.5), floorP50),
      atMostTimesFloor(2, "the idle floor's p50"),
      `faults: ${touched.map(({ latenciesUs }) => latenciesUs.length).join(', ')}`,
    );
    trial.report(
      `${name}-p99`,
      'us',
      paired(at(touched, 0.99), floorP99),
      atMostTimesFloor(4, "the idle floor's p99"),
    );
    trial.report(`${name}-rate`, 'GB/s', paired(touched.map(pushRate), alone.map(pushRate)), reach);
  }
  trial.report(
    'sequential-rate',
    'pages/s',
    paired(
      sequential.map(({ reads, seconds }) => reads / seconds),
      sequentialFloors.map(({ pagesPerSecond }) => pagesPerSecond),
    ),
    atLeastTimesFloor(4, 'one page a fault'),
  );
}
