/** The commit machines step by step: what each says and does, in which order, on the ways that matter most. */
import { describe, expect, it } from 'vitest';
import { toldCause } from '../../src/protocol/commit.js';
import {
  type DestinationEvent,
  initialDestination,
  stepDestination,
} from '../../src/protocol/commit-destination.js';
import { fromDestinationCommit, fromSourceCommit } from '../../src/protocol/commit-messages.js';
import {
  initialSource,
  isCommitted,
  type SourceEvent,
  stepSource,
} from '../../src/protocol/commit-source.js';
import { Tombstones } from '../../src/protocol/commit-tombstones.js';

const cause = { code: 'CANCELLED', message: 'enough' };

function source(...events: SourceEvent[]) {
  let state = initialSource();
  const log: string[] = [];
  for (const event of events) {
    const step = stepSource(state, event);
    state = step.state;
    log.push(...step.actions.map(text));
  }
  return { state, log };
}

function destination(...events: DestinationEvent[]) {
  let state = initialDestination();
  const log: string[] = [];
  for (const event of events) {
    const step = stepDestination(state, event);
    state = step.state;
    log.push(...step.actions.map(text));
  }
  return { state, log };
}

function text(action: object): string {
  const { type, timer, message, epoch, outcome } = action as Record<string, unknown> & {
    message?: { type: string; epoch: number };
  };
  return [type, timer, message && `${message.type}@${message.epoch}`, epoch, outcome]
    .filter((part) => part !== undefined)
    .join(' ');
}

const toReady: SourceEvent[] = [
  { type: 'switch' },
  { type: 'paused' },
  { type: 'transferred' },
  { type: 'message', message: { type: 'ready', epoch: 0 } },
];

describe('source', () => {
  it('departs when all goes well', () => {
    const { state, log } = source(...toReady, { type: 'message', message: { type: 'resumed', epoch: 0 } });
    expect(state).toEqual({ phase: 'departed' });
    expect(log).toEqual([
      'pause',
      'start-timer pause',
      'stop-timer pause',
      'send prepare@0',
      'start-timer ready',
      'stop-timer ready',
      'start-timer doubt',
      'start-timer retry',
      'send grant@0',
      'stop-timer retry',
      'stop-timer doubt',
      'settle departed',
    ]);
  });

  it('lets the guest run before it tells the destination that it cancelled', () => {
    const { state, log } = source(...toReady.slice(0, 3), { type: 'fail', cause });
    expect(state).toEqual({ phase: 'reclaimed', pauseOutstanding: false, cause });
    expect(log.slice(-4)).toEqual(['stop-timer ready', 'run-here', 'send cancel@0', 'settle reclaimed']);
  });

  it('undoes a pause that succeeds after the cancel', () => {
    const cancelled = source({ type: 'switch' }, { type: 'fail', cause });
    expect(cancelled.log.slice(-4)).toEqual([
      'stop-timer pause',
      'abort-pause',
      'send cancel@0',
      'settle reclaimed',
    ]);
    const late = stepSource(cancelled.state, { type: 'paused' });
    expect(late.actions).toEqual([{ type: 'run-here' }]);
    expect(stepSource(late.state, { type: 'paused' }).actions).toEqual([]);
  });

  it('asks again over new connections and never runs the guest meanwhile', () => {
    const { state, log } = source(
      ...toReady,
      { type: 'connection-lost' },
      { type: 'redial-failed', epoch: 1 },
      { type: 'timer', timer: 'retry' },
      { type: 'redialled', epoch: 2 },
      { type: 'message', message: { type: 'ready', epoch: 2 } },
      { type: 'connection-lost' },
    );
    expect(log.slice(9)).toEqual([
      'stop-timer retry',
      'redial 1',
      'start-timer retry',
      'stop-timer retry',
      'redial 2',
      'start-timer retry',
      'send query@2',
      'start-timer retry',
      'send grant@2',
      'start-timer retry', // not at once: a peer that accepts and closes must not make it spin
    ]);
    expect(isCommitted(state)).toBe(true);
    const doubt = stepSource(state, { type: 'timer', timer: 'doubt' });
    expect(doubt.state.phase).toBe('in-doubt');
    expect(doubt.actions.map(text)).not.toContain('run-here');
    const fenced = stepSource(doubt.state, { type: 'fence' });
    expect(fenced.actions.map(text)).toEqual([
      'stop-timer retry',
      'stop-timer doubt',
      'run-here',
      'settle reclaimed',
    ]);
    const again = stepSource(doubt.state, { type: 'ask-again' });
    expect(again.actions.map(text)).toEqual(['start-timer doubt', 'stop-timer retry', 'redial 3']);
  });

  it('waits twice as long for each answer, so that one from far away comes in time', () => {
    let { state } = source(...toReady);
    const waits: number[] = [];
    for (let epoch = 1; epoch <= 7; epoch++) {
      let ends = 0;
      while (state.phase === 'granted' && state.link === 'up') {
        const { state: next, actions } = stepSource(state, { type: 'timer', timer: 'retry' });
        state = next;
        ends++;
        expect(actions.map(text)).toEqual(
          next.phase === 'granted' && next.link === 'up'
            ? ['start-timer retry']
            : ['stop-timer retry', `redial ${epoch}`],
        );
      }
      waits.push(ends);
      state = stepSource(state, { type: 'redialled', epoch }).state;
    }
    expect(waits).toEqual([1, 2, 4, 8, 16, 16, 16]);
    // GRANT, when QUERY was answered, has as much time.
    const granting = stepSource(state, { type: 'message', message: { type: 'ready', epoch: 7 } });
    expect(granting.state).toMatchObject({ waits: 15 });
    // A destination that cannot be reached is dialled as often as before.
    const { state: down } = stepSource(granting.state, { type: 'connection-lost' });
    const again = stepSource(down, { type: 'timer', timer: 'retry' });
    expect(again.actions.map(text)).toEqual(['stop-timer retry', 'redial 8']);
    const { state: failed } = stepSource(again.state, { type: 'redial-failed', epoch: 8 });
    expect(stepSource(failed, { type: 'timer', timer: 'retry' }).actions.map(text)).toContain('redial 9');
  });

  it('runs the guest when the destination refuses after GRANT, not when it knows nothing', () => {
    const refused = source(...toReady, {
      type: 'message',
      message: { type: 'refused', epoch: 0, code: 'PREPARE_FAILED', message: 'no' },
    });
    expect(refused.state).toMatchObject({ phase: 'reclaimed', cause: { code: 'PREPARE_FAILED' } });
    expect(refused.log).toContain('run-here');
    const unknown = source(
      ...toReady,
      { type: 'connection-lost' },
      { type: 'redialled', epoch: 1 },
      { type: 'message', message: { type: 'unknown-migration', epoch: 1 } },
    );
    expect(unknown.state.phase).toBe('lost');
    expect(unknown.log).not.toContain('run-here');
    expect(unknown.log.at(-1)).toBe('settle lost');
  });

  it('ignores a cancel, an old READY and answers from the future once GRANT is out', () => {
    for (const event of [
      { type: 'fail', cause },
      { type: 'message', message: { type: 'ready', epoch: 0 } },
      { type: 'message', message: { type: 'resumed', epoch: 7 } },
      { type: 'timer', timer: 'ready' },
      { type: 'switch' },
    ] satisfies SourceEvent[]) {
      const before = source(...toReady);
      expect(stepSource(before.state, event)).toEqual({ state: before.state, actions: [] });
    }
  });
});

describe('destination', () => {
  const ready: DestinationEvent[] = [
    { type: 'message', message: { type: 'prepare', epoch: 0 } },
    { type: 'prepared' },
  ];
  const grant = (epoch: number): DestinationEvent => ({ type: 'message', message: { type: 'grant', epoch } });

  it('resumes once, and repeats only the answer', () => {
    const { state, log } = destination(...ready, grant(0), grant(0), grant(1), grant(0));
    expect(state).toEqual({ phase: 'resumed', epoch: 1 });
    expect(log).toEqual([
      'prepare',
      'start-timer grant',
      'send ready@0',
      'stop-timer grant',
      'resume',
      'send resumed@0',
      'settle resumed',
      'send resumed@0',
      'send resumed@1',
    ]);
  });

  it('waits through a lost connection, then refuses for good', () => {
    const waiting = destination(...ready, { type: 'connection-lost' });
    expect(waiting.state.phase).toBe('ready');
    const gone = stepDestination(waiting.state, { type: 'timer', timer: 'grant' });
    expect(gone.actions.map(text)).toEqual([
      'stop-timer grant',
      'send refused@0',
      'abandon',
      'settle abandoned',
    ]);
    expect(stepDestination(gone.state, grant(3)).actions.map(text)).toEqual(['send refused@3']);
  });

  it('abandons when the connection is lost before READY, and ignores a late prepare', () => {
    const { state, log } = destination(
      ready[0] as DestinationEvent,
      { type: 'connection-lost' },
      { type: 'prepared' },
    );
    expect(state.phase).toBe('abandoned');
    expect(log).toEqual(['prepare', 'send refused@0', 'abandon', 'settle abandoned']);
  });
});

describe('tombstones', () => {
  const abandoned = destination({ type: 'fail', cause }).state;
  const grant = { type: 'grant', epoch: 4 } as const;

  it('answer what was decided, and UNKNOWN for what is not known', () => {
    const stones = new Tombstones();
    stones.record('a', abandoned);
    stones.record('b', { phase: 'resumed', epoch: 0 });
    expect(stones.answer('a', grant)).toEqual({ type: 'refused', epoch: 4, ...cause });
    expect(stones.answer('b', grant)).toEqual({ type: 'resumed', epoch: 4 });
    expect(stones.answer('c', grant)).toEqual({ type: 'unknown-migration', epoch: 4 });
    expect(stones.answer('c', { type: 'cancel', epoch: 0, ...cause })).toBeNull();
    expect(() => stones.record('a', { phase: 'resumed', epoch: 0 })).toThrow(/cannot end resumed/);
    expect(() => stones.record('d', initialDestination())).toThrow(/not over/);
  });

  it('answer every question, whatever anybody has asked before', () => {
    const stones = new Tombstones();
    stones.record('a', abandoned);
    for (const epoch of [2 ** 31 - 1, 1]) {
      expect(stones.answer('a', { type: 'query', epoch })).toEqual({ type: 'refused', epoch, ...cause });
    }
  });

  it('forget the oldest beyond the bound', () => {
    const stones = new Tombstones(3);
    for (const id of ['a', 'b', 'c', 'd']) stones.record(id, abandoned);
    expect(stones.size).toBe(3);
    expect(stones.answer('a', grant)?.type).toBe('unknown-migration');
    expect(stones.answer('d', grant)?.type).toBe('refused');
  });
});

it('what the machines send passes the schemas, however long a local error was', () => {
  const long = toldCause({ code: '', message: 'x'.repeat(10_000) });
  const cancel = fromSourceCommit.find((schema) => schema.shape.type.value === 'cancel');
  const refused = fromDestinationCommit.find((schema) => schema.shape.type.value === 'refused');
  expect(cancel?.safeParse({ type: 'cancel', epoch: 0, ...long }).success).toBe(true);
  expect(refused?.safeParse({ type: 'refused', epoch: 0, ...long }).success).toBe(true);
  for (const epoch of [-1, 0.5, 2 ** 31, '1', null]) {
    expect(fromSourceCommit[1].safeParse({ type: 'grant', epoch }).success).toBe(false);
  }
  expect(fromSourceCommit[1].safeParse({ type: 'grant', epoch: 1, more: 1 }).success).toBe(false);
});
