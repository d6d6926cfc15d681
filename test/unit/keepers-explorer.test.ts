/** A server that is not a parked guest's home keeps its pages as long as anybody may need them, whatever happens. */
import { describe, expect, it } from 'vitest';
import { type ClaimsAction, type ClaimsStep, stepClaims } from '../../src/protocol/image-claims.js';
import type { ClaimsMachine } from './claims-explorer.js';
import { exploreKeepers, type KeeperFaults } from './keepers-explorer.js';

it('the keepers of a parked guest keep every law', { timeout: 120_000 }, () => {
  const { states, transitions, violation, seen } = exploreKeepers();
  console.log(`explored ${states} states, ${transitions} transitions; ${[...seen].join(', ')}`);
  expect(violation).toBeNull();
  expect(states).toBeGreaterThan(5_000);
  expect([...seen]).toEqual(
    expect.arrayContaining([
      ...[
        'home parked',
        'home resumed',
        'home restarted',
        'home ended by abandoned',
        'home ended by dissolve',
      ],
      ...['keeper parked', 'keeper committed', 'keeper ended by lease', 'keeper ended by dissolve', 'A gone'],
    ]),
  );
});

const atKeeper =
  (machine: (...given: Parameters<ClaimsMachine>) => ClaimsStep | null): ClaimsMachine =>
  (state, event) =>
    (state.facts.home ? null : machine(state, event)) ?? stepClaims(state, event);
const held: ClaimsAction = { type: 'answer', answer: { type: 'held' } };

const wrong: Record<string, { breaks: RegExp; machine?: ClaimsMachine; faults?: KeeperFaults }> = {
  'a hold that does not end the lease': {
    breaks: /let go \(lease\)|does not hold it/,
    machine: atKeeper((state, event) =>
      event.type === 'hold' && state.phase === 'migrating' ? { state, actions: [held] } : null,
    ),
  },
  'a lease that ends what is held': {
    breaks: /let go \(lease\)|does not hold it/,
    machine: atKeeper((state, event) =>
      event.type === 'lease-over' && state.phase === 'parked' && !state.open
        ? {
            state: { facts: state.facts, open: state.open, phase: 'dissolved', cause: 'lease' },
            actions: [{ type: 'drop', cause: 'lease' }],
          }
        : null,
    ),
  },
  'a hold of what is gone': {
    breaks: /does not hold it/,
    machine: atKeeper((state, event) =>
      event.type === 'hold' && state.phase === 'dissolved' ? { state, actions: [held] } : null,
    ),
  },
  'a source that grants without its word': { breaks: /does not hold it/, faults: { grantsUnheld: true } },
  'a claimant that has it let go before home has': {
    breaks: /let go \(dissolve\)/,
    faults: { keeperFirst: true },
  },
  'a claim that it gives': {
    breaks: /not home gives a claim/,
    machine: atKeeper((state, event) =>
      event.type === 'claim' && state.phase === 'parked'
        ? stepClaims({ ...state, facts: { ...state.facts, home: true } }, event)
        : null,
    ),
  },
  'a lease that never ends': {
    breaks: /stay for ever/,
    machine: atKeeper((state, event) => {
      const { state: next, actions } = stepClaims(state, event);
      return {
        state: next,
        actions: actions.filter((action) => action.type !== 'start-timer' || action.timer !== 'lease'),
      };
    }),
  },
};

describe('the explorer finds', () => {
  for (const [name, { breaks, machine, faults }] of Object.entries(wrong)) {
    it(name, { timeout: 120_000 }, () => {
      const { violation } = exploreKeepers(machine, faults);
      expect(violation?.law).toMatch(breaks);
      expect(violation?.trace.length).toBeGreaterThan(0);
    });
  }
});
