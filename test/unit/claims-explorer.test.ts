/** Every reachable state of an image's claims keeps their laws; and the explorer sees it when one does not. */
import { describe, expect, it } from 'vitest';
import {
  type ClaimsAction,
  type ClaimsState,
  type ClaimsStep,
  stepClaims,
} from '../../src/protocol/image-claims.js';
import { type ClaimsMachine, exploreClaims, type Setting } from './claims-explorer.js';

describe('the claims of an image', () => {
  const expected: Record<Setting, { epochs: number; least: number; seen: string[] }> = {
    parking: { epochs: 2, least: 20_000, seen: ['source', 'home', 'A', 'ended by abandoned'] },
    parked: { epochs: 3, least: 100_000, seen: ['home', 'A', 'B', 'ended by dissolve', 'ended by ttl'] },
    moved: { epochs: 3, least: 5_000, seen: ['source', 'destination', 'A', 'ended by lease'] },
  };
  for (const [setting, { epochs, least, seen }] of Object.entries(expected)) {
    it(`keep every law when ${setting}`, { timeout: 240_000 }, () => {
      const found = exploreClaims(setting as Setting, { epochs });
      console.log(
        `${setting}: explored ${found.states} states, ${found.transitions} transitions; ${[...found.seen].join(', ')}`,
      );
      expect(found.violation).toBeNull();
      expect(found.states).toBeGreaterThan(least);
      expect([...found.seen]).toEqual(expect.arrayContaining(seen));
    });
  }
});

const step = (state: ClaimsState, ...actions: ClaimsAction[]): ClaimsStep => ({ state, actions });
const without = ({ state, actions }: ClaimsStep, drop: (action: ClaimsAction) => boolean): ClaimsStep => ({
  state,
  actions: actions.filter((action) => !drop(action)),
});
const granted: ClaimsAction = { type: 'answer', answer: { type: 'granted' } };

const mutants: Record<string, { in: Setting; breaks: string | RegExp; machine: ClaimsMachine }> = {
  'a grant to an older epoch': {
    in: 'parked',
    breaks: /two owners|granted to two/,
    machine: (state, event) =>
      event.type === 'grant' && state.phase === 'resumed' ? step(state, granted) : stepClaims(state, event),
  },
  'a grant of a claim that was given back': {
    in: 'parked',
    breaks: 'two owners',
    machine: (state, event) =>
      event.type === 'grant' && event.epoch > 0 && state.phase === 'parked'
        ? step(state, granted)
        : stepClaims(state, event),
  },
  'a second claim beside the first, with its epoch': {
    in: 'parked',
    breaks: /two owners|to two/,
    machine: (state, event) =>
      event.type === 'claim' && state.phase === 'claimed'
        ? step(state, { type: 'answer', answer: { type: 'claimed', epoch: state.epoch } })
        : stepClaims(state, event),
  },
  'a claim of a guest that somebody runs': {
    in: 'parked',
    breaks: 'two owners',
    machine: (state, event) =>
      event.type === 'claim' && state.phase === 'resumed'
        ? stepClaims(state, { ...event, rollback: state.granted })
        : stepClaims(state, event),
  },
  'a rollback that says nothing of whose': {
    in: 'moved',
    breaks: 'two owners',
    machine: (state, event) =>
      event.type === 'claim' && state.phase === 'committed'
        ? stepClaims(state, { ...event, rollback: 0 })
        : stepClaims(state, event),
  },
  "a claim while the guest is still its source's": {
    in: 'moved',
    breaks: 'two owners',
    machine: (state, event) =>
      event.type === 'claim' && state.phase === 'migrating'
        ? stepClaims({ facts: state.facts, open: state.open, phase: 'parked', epoch: 0 }, event)
        : stepClaims(state, event),
  },
  'a guest that is parked before its GRANT': {
    in: 'parking',
    breaks: /the home server has a guest that its source runs|GRANT does not park/,
    machine: (state, event) => {
      const next = stepClaims(state, event);
      return next.state.phase === 'parking'
        ? step({ facts: state.facts, open: state.open, phase: 'parked', epoch: 0 })
        : next;
    },
  },
  'a lease that ends what is committed': {
    in: 'moved',
    breaks: /dropped \(lease\) while committed/,
    machine: (state, event) =>
      event.type === 'lease-over' && state.phase === 'committed'
        ? step(
            { facts: state.facts, open: state.open, phase: 'dissolved', cause: 'lease' },
            { type: 'drop', cause: 'lease' },
          )
        : stepClaims(state, event),
  },
  'a time to live that ends a claim': {
    in: 'parked',
    breaks: /dropped \(ttl\) while claimed/,
    machine: (state, event) =>
      event.type === 'ttl-over' && state.phase === 'claimed'
        ? step(
            { facts: state.facts, open: state.open, phase: 'dissolved', cause: 'ttl' },
            { type: 'drop', cause: 'ttl' },
          )
        : stepClaims(state, event),
  },
  'a dissolve by whoever asks': {
    in: 'parked',
    breaks: 'dissolved by somebody else than its owner',
    machine: (state, event) =>
      event.type === 'dissolve' && state.phase === 'resumed'
        ? stepClaims(state, { type: 'dissolve', epoch: state.granted })
        : stepClaims(state, event),
  },
  'a claim that stays with a claimant that is gone': {
    in: 'parked',
    breaks: 'a claim whose claimant is gone is never given back',
    machine: (state, event) =>
      without(
        stepClaims(state, event),
        (action) => action.type === 'start-timer' && action.timer === 'claim',
      ),
  },
  'a rollback that is refused although the owner is dead': {
    in: 'parked',
    breaks: 'a guest that nobody has and nobody can claim',
    machine: (state, event) =>
      event.type === 'claim' && state.phase === 'resumed'
        ? stepClaims(state, { ...event, rollback: null })
        : stepClaims(state, event),
  },
  'a lease that never ends': {
    in: 'moved',
    breaks: 'an image that nobody committed stays for ever',
    machine: (state, event) =>
      without(
        stepClaims(state, event),
        (action) => action.type === 'start-timer' && action.timer === 'lease',
      ),
  },
};

describe('the explorer finds', () => {
  for (const [name, { in: setting, breaks, machine }] of Object.entries(mutants)) {
    it(name, { timeout: 120_000 }, () => {
      const { violation } = exploreClaims(setting, { machine });
      expect(violation?.law).toMatch(breaks);
      expect(violation?.trace.length).toBeGreaterThan(0);
    });
  }
});
