/**
 * Decisions that exist twice, in TypeScript and in C++. The commit's machines: whatever happens in whatever order, both
 * come to the same states by the same actions. Placement on servers that were named: both say the same.
 */
import { spawnSync } from 'node:child_process';
import { isDeepStrictEqual } from 'node:util';
import { expect, test } from 'vitest';
import type { MemferryError } from '../../src/errors.js';
import {
  type DestinationEvent,
  initialDestination,
  stepDestination,
} from '../../src/protocol/commit-destination.js';
import { initialSource, type SourceEvent, stepSource } from '../../src/protocol/commit-source.js';
import { place } from '../../src/staging/placement.js';

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

function destinationEvent(random: (below: number) => number): DestinationEvent {
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

type DestinationWord = Extract<SourceEvent, { type: 'message' }>['message'];

/** What leads on comes more often: a random walk would hardly ever be granted anything. */
function sourceEvent(random: (below: number) => number): SourceEvent {
  const epoch = random(3);
  const cause = { code: random(2) === 0 ? '' : long.slice(0, 80), message: long };
  const messages: DestinationWord[] = [
    { type: 'ready', epoch },
    { type: 'ready', epoch: 0 },
    { type: 'resumed', epoch },
    { type: 'refused', epoch, code: 'PEER_LOST', message: 'too late' },
    { type: 'unknown-migration', epoch },
  ];
  const events: SourceEvent[] = [
    { type: 'fail', cause },
    { type: 'pause-failed', cause },
    { type: 'connection-lost' },
    { type: 'redialled', epoch },
    { type: 'redial-failed', epoch },
    { type: 'fence' },
    { type: 'ask-again' },
    { type: 'release' },
    { type: 'timer', timer: 'pause' },
    { type: 'timer', timer: 'ready' },
    { type: 'timer', timer: 'doubt' },
    { type: 'timer', timer: 'retry' },
    { type: 'timer', timer: 'retry' },
    { type: 'redialled', epoch: 1 },
    { type: 'ask-again' },
  ];
  switch (random(8)) {
    case 0:
    case 1:
      return { type: 'switch' };
    case 2:
      return { type: 'paused' };
    case 3:
      return { type: 'transferred' };
    case 4:
    case 5:
      return { type: 'message', message: messages[random(messages.length)] as DestinationWord };
    default:
      return events[random(events.length)] as SourceEvent;
  }
}

/** The same chance to get far: it begins where the guest stands. */
function sourceEvents(random: (below: number) => number): SourceEvent[] {
  const begun: SourceEvent[] =
    random(2) === 0
      ? []
      : [
          { type: 'switch' },
          { type: 'paused' },
          { type: 'transferred' },
          { type: 'message', message: { type: 'ready', epoch: 0 } },
        ];
  return [
    ...begun.slice(0, random(begun.length + 1)),
    ...Array.from({ length: 1 + random(LONGEST) }, () => sourceEvent(random)),
  ];
}

/** An answer a line. */
function askTwin(decision: string, questions: readonly unknown[]): unknown[] {
  const program = process.env['MEMFERRY_COMMIT_TWIN'];
  if (!program) throw new Error('MEMFERRY_COMMIT_TWIN: run by `npm test -- embed`');
  const { status, stdout, stderr } = spawnSync(program, [decision], {
    input: questions.map((question) => JSON.stringify(question)).join('\n'),
    encoding: 'utf8',
    maxBuffer: 2 ** 30,
  });
  expect(stderr).toBe('');
  expect(status).toBe(0);
  const answers = stdout.trimEnd().split('\n');
  expect(answers).toHaveLength(questions.length);
  return answers.map((answer) => JSON.parse(answer) as unknown);
}

/** Gives the phases in which sequences ended. */
function compareMachines<Event, State extends { phase: string }>(
  name: string,
  sequences: readonly Event[][],
  initial: () => State,
  stepBy: (state: State, event: Event) => { state: State; actions: readonly unknown[] },
): Set<string> {
  const twins = askTwin(name, sequences);
  const phases = new Set<string>();
  for (const [index, events] of sequences.entries()) {
    let state = initial();
    const steps = events.map((event) => {
      const step = stepBy(state, event);
      state = step.state;
      return step;
    });
    phases.add(state.phase);
    const twin = twins[index];
    // A look first: `expect` would take most of the time.
    if (!isDeepStrictEqual(twin, steps)) expect({ events, steps: twin }).toEqual({ events, steps });
  }
  return phases;
}

test(`the destination: ${SEQUENCES} random sequences of events`, () => {
  const random = randomNumbers(0x2545f491);
  const sequences = Array.from({ length: SEQUENCES }, () =>
    Array.from({ length: 1 + random(LONGEST) }, () => destinationEvent(random)),
  );
  const phases = compareMachines('destination', sequences, initialDestination, stepDestination);
  expect([...phases].sort()).toEqual(['abandoned', 'preparing', 'ready', 'receiving', 'resumed']);
});

test(`the source: ${SEQUENCES} random sequences of events`, () => {
  const random = randomNumbers(0x1d872b41);
  const sequences = Array.from({ length: SEQUENCES }, () => sourceEvents(random));
  const phases = compareMachines('source', sequences, initialSource, stepSource);
  expect([...phases].sort()).toEqual([
    'departed',
    'granted',
    'in-doubt',
    'lost',
    'pausing',
    'preparing',
    'reclaimed',
    'released',
    'running',
    'transferring',
  ]);
});

test('which servers hold a guest, and what is said where they do not', () => {
  const random = randomNumbers(0x51f15eed);
  const questions = Array.from({ length: 3000 }, () => {
    const pages = 1 + random(1 << (1 + random(20)));
    const freeBytes = Array.from({ length: 1 + random(7) }, () => random(1 << (10 + random(20))) * 7);
    const replicas = (1 + random(2)) as 1 | 2;
    return { need: { bytes: (pages - random(pages)) * 4096, pages, replicas }, freeBytes };
  });
  const twins = askTwin('placement', questions);
  const held = { yes: 0, no: 0 };
  for (const [index, { need, freeBytes }] of questions.entries()) {
    const servers = freeBytes.map((free, at) => ({
      ...{
        name: `s${at}`,
        identity: at.toString(16).padStart(16, '0'),
        rack: null,
        memoryBytes: free,
        freeBytes: free,
        bandwidth: 0,
        images: 0,
      },
      ...{ host: '127.0.0.1', port: 7000 + at },
    }));
    let said: unknown = null;
    try {
      place({
        need: { ...need, linkBytesPerSecond: null },
        servers,
        via: servers.map(({ host, port }) => `${host}:${port}`),
        source: { rack: null },
        destination: { rack: null },
      });
      held.yes++;
    } catch (error) {
      const { code, message } = error as MemferryError;
      said = { code, message };
      held.no++;
    }
    expect(twins[index]).toEqual(said);
  }
  expect(Math.min(held.yes, held.no)).toBeGreaterThan(300);
});
