/** Every reachable state of the commit protocol keeps its laws; and the explorer sees it when one does not. */
import { describe, expect, it } from 'vitest';
import { type DestinationStep, stepDestination } from '../../src/protocol/commit-destination.js';
import { type SourceStep, stepSource } from '../../src/protocol/commit-source.js';
import { explore, type Machines } from './commit-explorer.js';

describe('the commit protocol', () => {
  it('keeps every law in every reachable state', { timeout: 120_000 }, () => {
    const { states, transitions, violation, ends } = explore();
    console.log(
      `explored ${states} states, ${transitions} transitions; ends: ${[...ends.keys()].join('; ')}`,
    );
    expect(violation).toBeNull();
    // A model in which hardly anything can happen proves nothing.
    expect(states).toBeGreaterThan(50_000);
    expect([...ends.keys()]).toEqual(
      expect.arrayContaining([
        'departed / resumed / destination',
        'departed / crashed / nobody',
        'reclaimed / abandoned / source',
        'reclaimed / crashed / source',
        'in-doubt / resumed / destination',
        'in-doubt / abandoned / nobody',
        'in-doubt / crashed / nobody',
        'lost / crashed / nobody',
        'released / resumed / destination',
        'crashed / resumed / destination',
        'crashed / abandoned / nobody',
      ]),
    );
    expect([...ends.keys()].filter((end) => end.startsWith('reclaimed / resumed'))).toEqual([]);
    expect([...ends.keys()].filter((end) => end.startsWith('lost / resumed'))).toEqual([]);
  });
});

type Mutant = { breaks: string | RegExp } & Partial<Machines>;

const takesBack = (step: SourceStep): SourceStep => ({
  state: { phase: 'reclaimed', pauseOutstanding: false, cause: { code: 'PEER_LOST', message: '' } },
  actions: [
    ...step.actions.filter((action) => action.type !== 'settle' && action.type !== 'redial'),
    { type: 'run-here' },
    { type: 'settle', outcome: 'reclaimed', cause: { code: 'PEER_LOST', message: '' } },
  ],
});

const without = <Step extends { state: unknown; actions: readonly { type: string }[] }>(
  step: Step,
  drop: (action: Step['actions'][number]) => boolean,
): Step => ({ ...step, actions: step.actions.filter((action) => !drop(action)) });

const mutants: Record<string, Mutant> = {
  'the source runs the guest when the connection is lost after GRANT': {
    breaks: /two owners|without refusal/,
    source(state, event) {
      const step = stepSource(state, event);
      return state.phase === 'granted' && event.type === 'connection-lost' ? takesBack(step) : step;
    },
  },
  'the source runs the guest when its bound passes': {
    breaks: /two owners|without refusal/,
    source(state, event) {
      const step = stepSource(state, event);
      return state.phase === 'granted' && step.state.phase === 'in-doubt' ? takesBack(step) : step;
    },
  },
  'the source takes a restarted destination for a refusal': {
    breaks: /without refusal/,
    source(state, event) {
      const step = stepSource(state, event);
      return step.state.phase === 'lost' && state.phase === 'granted' ? takesBack(step) : step;
    },
  },
  'the source cancels after GRANT': {
    breaks: /two owners|without refusal/,
    source(state, event) {
      const step = stepSource(state, event);
      return state.phase === 'granted' && event.type === 'fail' ? takesBack(step) : step;
    },
  },
  'the source sends GRANT before it is ready to remember it': {
    breaks: 'GRANT before it was recorded',
    source(state, event) {
      const step = stepSource(state, event);
      return step.actions.some((action) => action.type === 'send' && action.message.type === 'grant')
        ? { ...step, state: { phase: 'preparing' } }
        : step;
    },
  },
  'the source forgets a pause that succeeds late': {
    breaks: 'the guest stands at the source before GRANT',
    source(state, event) {
      return state.phase === 'reclaimed' ? { state, actions: [] } : stepSource(state, event);
    },
  },
  'the source leaves the guest standing when the destination refuses': {
    breaks: 'the guest stands at the source before GRANT',
    source(state, event) {
      const step = stepSource(state, event);
      return event.type === 'message' && event.message.type === 'refused'
        ? without(step, (action) => action.type === 'run-here')
        : step;
    },
  },
  'the source waits for READY without a bound': {
    breaks: 'waits for ever when the network is silent',
    source: (state, event) =>
      without(
        stepSource(state, event),
        (action) => action.type === 'start-timer' && action.timer === 'ready',
      ),
  },
  'the source is in doubt without a bound': {
    breaks: 'waits for ever when the network is silent',
    source: (state, event) =>
      without(
        stepSource(state, event),
        (action) => action.type === 'start-timer' && action.timer === 'doubt',
      ),
  },
  'the source takes silence for RESUMED': {
    breaks: 'departed, but never resumed anywhere',
    source(state, event) {
      return state.phase === 'granted' && event.type === 'timer' && event.timer === 'doubt'
        ? { state: { phase: 'departed' }, actions: [{ type: 'settle', outcome: 'departed' }] }
        : stepSource(state, event);
    },
  },
  'the source ignores a refusal after GRANT': {
    breaks: 'no owner can be found although both sides live',
    source(state, event) {
      const granted = state.phase === 'granted' || state.phase === 'in-doubt';
      return granted && event.type === 'message' && event.message.type === 'refused'
        ? { state, actions: [] }
        : stepSource(state, event);
    },
  },
  'the source settles twice': {
    breaks: /settled twice/,
    source(state, event) {
      const step = stepSource(state, event);
      const settle = step.actions.find((action) => action.type === 'settle');
      return settle?.outcome === 'departed' ? { ...step, actions: [...step.actions, settle] } : step;
    },
  },
  'the destination resumes as soon as it is ready': {
    breaks: /resumed without GRANT|two owners/,
    destination(state, event) {
      const step = stepDestination(state, event);
      return event.type === 'prepared' && step.state.phase === 'ready'
        ? { ...step, actions: [...step.actions, { type: 'resume' }] }
        : step;
    },
  },
  'the destination forgets that it had given up': {
    breaks: /resumes a guest that it had abandoned|refused and resumed|two owners/,
    destination(state, event) {
      const granted = event.type === 'message' && event.message.type === 'grant';
      return state.phase === 'abandoned' && granted
        ? stepDestination({ phase: 'ready', epoch: state.epoch }, event)
        : stepDestination(state, event);
    },
  },
  'the destination answers a QUERY with a refusal and keeps waiting': {
    breaks: /refused and resumed|two owners|without refusal/,
    destination(state, event) {
      if (state.phase !== 'ready' || event.type !== 'message' || event.message.type !== 'query') {
        return stepDestination(state, event);
      }
      const { epoch } = event.message;
      return {
        state,
        actions: [{ type: 'send', message: { type: 'refused', epoch, code: 'X', message: '' } }],
      };
    },
  },
  'the destination gives up a guest that runs when the source is gone': {
    breaks: 'abandons a guest that runs',
    destination(state, event) {
      return state.phase === 'resumed' && event.type === 'connection-lost'
        ? stepDestination({ phase: 'preparing', epoch: state.epoch }, event)
        : stepDestination(state, event);
    },
  },
  'the destination resumes again at a repeated GRANT': {
    breaks: 'resumes twice',
    destination(state, event) {
      const step: DestinationStep = stepDestination(state, event);
      return state.phase === 'resumed' && event.type === 'message' && event.message.type === 'grant'
        ? { ...step, actions: [{ type: 'resume' }, ...step.actions] }
        : step;
    },
  },
  'the destination waits for GRANT without a bound': {
    breaks: 'waits for ever when the network is silent',
    destination: (state, event) =>
      without(stepDestination(state, event), (action) => action.type === 'start-timer'),
  },
  'the destination goes away silently at its bound': {
    breaks: 'no owner can be found although both sides live',
    destination(state, event) {
      const step = stepDestination(state, event);
      return step.state.phase === 'abandoned' ? without(step, (action) => action.type === 'send') : step;
    },
  },
};

describe('the explorer finds', () => {
  for (const [name, { breaks, ...machines }] of Object.entries(mutants)) {
    it(name, { timeout: 120_000 }, () => {
      const { violation } = explore(machines, { redials: 2, asks: 1 });
      expect(violation?.law).toMatch(breaks);
      expect(violation?.trace.length).toBeGreaterThan(0);
    });
  }
});
