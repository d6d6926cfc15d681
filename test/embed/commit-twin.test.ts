/**
 * The commit's destination machine exists twice, in TypeScript and in C++: whatever happens in whatever order, both come
 * to the same states by the same actions.
 */
import { spawnSync } from 'node:child_process';
import { isDeepStrictEqual } from 'node:util';
import { expect, test } from 'vitest';
import {
  type DestinationEvent,
  initialDestination,
  stepDestination,
} from '../../src/protocol/commit-destination.js';

const SEQUENCES = 10_000;
const LONGEST = 14;
/** A text that is cut where UTF-16 and UTF-8 count differently. */
const long = 'ä€😀x'.repeat(1500);

function randomNumbers(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state % below;
  };
}

function randomEvent(random: (below: number) => number): DestinationEvent {
  const epoch = random(4);
  switch (random(10)) {
    case 0:
    case 1:
      return { type: 'message', message: { type: 'prepare', epoch } };
    case 2:
    case 3:
      return { type: 'prepared' };
    case 4:
    case 5:
      return { type: 'message', message: { type: 'grant', epoch } };
    case 6:
      return { type: 'message', message: { type: 'query', epoch } };
    case 7:
      return random(2) === 0
        ? { type: 'message', message: { type: 'cancel', epoch, code: 'CANCELLED', message: 'enough' } }
        : { type: 'fail', cause: { code: random(2) === 0 ? '' : long.slice(0, 80), message: long } };
    case 8:
      return { type: 'connection-lost' };
    default:
      return { type: 'timer', timer: 'grant' };
  }
}

test(`${SEQUENCES} random sequences of events`, () => {
  const program = process.env['MEMFERRY_COMMIT_TWIN'];
  if (!program) throw new Error('MEMFERRY_COMMIT_TWIN: run by `npm test -- embed`');
  const random = randomNumbers(0x2545f491);
  const sequences = Array.from({ length: SEQUENCES }, () =>
    Array.from({ length: 1 + random(LONGEST) }, () => randomEvent(random)),
  );
  const { status, stdout, stderr } = spawnSync(program, {
    input: sequences.map((events) => JSON.stringify(events)).join('\n'),
    encoding: 'utf8',
    maxBuffer: 2 ** 30,
  });
  expect(stderr).toBe('');
  expect(status).toBe(0);
  const answers = stdout.trimEnd().split('\n');
  expect(answers).toHaveLength(SEQUENCES);
  const phases = new Set<string>();
  for (const [index, events] of sequences.entries()) {
    let state = initialDestination();
    const steps = events.map((event) => {
      const step = stepDestination(state, event);
      state = step.state;
      return step;
    });
    phases.add(state.phase);
    const twin: unknown = JSON.parse(answers[index] as string);
    // A look first: `expect` would take most of the time.
    if (!isDeepStrictEqual(twin, steps)) expect({ events, steps: twin }).toEqual({ events, steps });
  }
  expect([...phases].sort()).toEqual(['abandoned', 'preparing', 'ready', 'receiving', 'resumed']);
});
