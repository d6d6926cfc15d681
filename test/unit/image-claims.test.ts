/** What the explorer does not ask: the servers that are not home, and answers that are asked for twice. */
import { describe, expect, it } from 'vitest';
import {
  type ClaimsAction,
  type ClaimsEvent,
  type ClaimsFacts,
  type ClaimsState,
  initialClaims,
  ownerOf,
  stepClaims,
} from '../../src/protocol/image-claims.js';

class Image {
  state: ClaimsState;
  actions: readonly ClaimsAction[] = [];

  constructor(facts: Partial<ClaimsFacts> = {}) {
    this.state = initialClaims({ kind: 'park', home: false, mortal: true, ...facts });
  }

  /** The answer's type, or `no: ` and why it was declined; null without one. */
  on(event: ClaimsEvent): string | null {
    const { state, actions } = stepClaims(this.state, event);
    this.state = state;
    this.actions = actions;
    const answers = actions.flatMap((action) => (action.type === 'answer' ? [action.answer] : []));
    expect(answers.length).toBeLessThanOrEqual(1);
    const [answer] = answers;
    return answer ? (answer.type === 'declined' ? `no: ${answer.reason}` : answer.type) : null;
  }

  get did(): string[] {
    return this.actions.flatMap((action) =>
      action.type === 'answer'
        ? []
        : [action.type === 'drop' ? `drop ${action.cause}` : `${action.type} ${action.timer}`],
    );
  }
}

const claim = (claimant: string, rollback: number | null = null, whole = true) =>
  ({ type: 'claim', claimant, rollback, whole }) as const;
const opened = { type: 'opened', claim: null } as const;

describe('a server that is not home', () => {
  it('holds a park once it is told to, and grants nothing', () => {
    const image = new Image();
    expect(image.on({ type: 'commit' })).toBe('no: uncommitted');
    expect(image.on({ type: 'prepared' })).toBeNull();
    expect(image.state.phase).toBe('migrating');
    expect(image.on({ type: 'hold' })).toBe('held');
    expect(image.on({ type: 'hold' })).toBe('held');
    expect(image.state.phase).toBe('parked');
    expect(image.on(claim('a'))).toBe('no: not-home');
    expect(image.on({ type: 'lease-over' })).toBeNull();
    expect(image.state.phase).toBe('parked');
  });

  it('lets a park go when nobody has had it open for its time to live, until somebody resumed from it', () => {
    const image = new Image();
    image.on({ type: 'hold' });
    expect(image.on({ type: 'ttl-over' })).toBeNull();
    expect(image.state.phase).toBe('parked');
    image.on({ type: 'connection-lost' });
    expect(image.did).toEqual(['start-timer ttl']);
    image.on(opened);
    expect(image.did).toEqual(['stop-timer ttl']);
    image.on({ type: 'connection-lost' });
    expect(image.on({ type: 'commit' })).toBe('committed');
    expect(image.did).toEqual(['stop-timer ttl']);
    image.on({ type: 'ttl-over' });
    image.on({ type: 'connection-lost' });
    expect(image.did).toEqual([]);
    expect(image.state.phase).toBe('committed');
    expect(image.on({ type: 'dissolve', epoch: 4 })).toBe('dissolved');

    const left = new Image();
    left.on({ type: 'connection-lost' });
    left.on({ type: 'hold' });
    expect(left.did).toEqual(['stop-timer lease', 'start-timer ttl']);
    left.on({ type: 'ttl-over' });
    expect(left.did).toContain('drop ttl');
    const immortal = new Image({ mortal: false });
    immortal.on({ type: 'hold' });
    immortal.on({ type: 'connection-lost' });
    expect(immortal.did).toEqual([]);
  });
});

describe('a home server', () => {
  const parked = () => {
    const image = new Image({ home: true });
    image.on({ type: 'prepared' });
    image.on({ type: 'park' });
    expect(image.state.phase).toBe('parked');
    return image;
  };

  it('parks by the commit alone', () => {
    const image = new Image({ home: true });
    expect(image.on({ type: 'hold' })).toBe('no: not-parked');
    expect(image.on({ type: 'commit' })).toBe('no: not-parked');
    image.on({ type: 'park' });
    expect(image.state.phase).toBe('migrating');
    image.on({ type: 'prepared' });
    expect(image.on({ type: 'dissolve', epoch: 0 })).toBe('no: parking');
    expect(image.on(claim('a'))).toBe('no: uncommitted');
    image.on({ type: 'connection-lost' });
    image.on({ type: 'lease-over' });
    expect(image.state.phase).toBe('parking');
    image.on({ type: 'abandon' });
    expect(image.did).toContain('drop abandoned');
  });

  it('answers a claimant that asks again, and it alone', () => {
    const image = parked();
    expect(image.on(claim('a'))).toBe('claimed');
    expect(image.on(claim('a'))).toBe('claimed');
    expect(image.state).toMatchObject({ epoch: 1 });
    expect(image.on(claim('b'))).toBe('no: claimed');
    expect(image.state).toMatchObject({ claimant: 'a' });
    expect(image.on({ type: 'grant', claimant: 'b', epoch: 1 })).toBe('no: stale');
    expect(image.on({ type: 'grant', claimant: 'a', epoch: 2 })).toBe('no: stale');
    expect(image.on({ type: 'release', claimant: 'b', epoch: 1 })).toBe('released');
    expect(image.state.phase).toBe('claimed');
    expect(image.on({ type: 'grant', claimant: 'a', epoch: 1 })).toBe('granted');
    expect(image.on({ type: 'grant', claimant: 'a', epoch: 1 })).toBe('granted');
    expect(image.on({ type: 'release', claimant: 'a', epoch: 1 })).toBe('no: resumed');
    expect(image.on({ type: 'commit' })).toBe('committed');
    expect(image.state.phase).toBe('resumed');
  });

  it('keeps a claim while its claimant is there, and takes it back after its lease', () => {
    const image = parked();
    image.on(claim('a'));
    image.on({ type: 'claim-over' });
    image.on({ type: 'claimant-lost', epoch: 7 });
    expect(image.state.phase).toBe('claimed');
    image.on({ type: 'claimant-lost', epoch: 1 });
    expect(image.did).toEqual(['start-timer claim']);
    image.on({ type: 'opened', claim: { claimant: 'b', epoch: 1 } });
    expect(image.did).toEqual([]);
    image.on({ type: 'opened', claim: { claimant: 'a', epoch: 1 } });
    expect(image.did).toEqual(['stop-timer claim']);
    image.on({ type: 'claim-over' });
    expect(image.state.phase).toBe('claimed');
    image.on({ type: 'claimant-lost', epoch: 1 });
    image.on({ type: 'claim-over' });
    expect(image.state).toMatchObject({ phase: 'parked', epoch: 1 });
    expect(image.on({ type: 'grant', claimant: 'a', epoch: 1 })).toBe('no: stale');
    expect(image.on({ type: 'dissolve', epoch: 1 })).toBe('no: stale');
    expect(image.on(claim('a'))).toBe('claimed');
    expect(image.state).toMatchObject({ epoch: 2 });
  });

  it('goes back to its owner when a rollback is given back', () => {
    const image = parked();
    image.on(claim('a'));
    image.on({ type: 'grant', claimant: 'a', epoch: 1 });
    expect(image.on(claim('b', 0))).toBe('no: resumed');
    expect(image.on(claim('b', 1, false))).toBe('no: incomplete');
    expect(image.on(claim('b', 1))).toBe('claimed');
    expect(ownerOf(image.state)).toBe(1);
    expect(image.on({ type: 'release', claimant: 'b', epoch: 2 })).toBe('released');
    expect(image.state).toMatchObject({ phase: 'resumed', granted: 1, epoch: 2 });
    expect(image.on(claim('c'))).toBe('no: resumed');
    // Who was said to be dead stays so.
    expect(image.on({ type: 'grant', claimant: 'a', epoch: 1 })).toBe('no: stale');
    expect(image.on({ type: 'dissolve', epoch: 1 })).toBe('no: stale');
    expect(image.on(claim('c', 1))).toBe('claimed');
  });

  it('declines everything once the image is gone', () => {
    const image = parked();
    expect(image.on({ type: 'drop' })).toBe('dropped');
    for (const event of [
      claim('a'),
      { type: 'grant', claimant: 'a', epoch: 1 },
      { type: 'commit' },
      { type: 'hold' },
      { type: 'dissolve', epoch: 0 },
      { type: 'drop' },
    ] as const) {
      expect(image.on(event)).toBe('no: gone');
    }
    image.on({ type: 'park' });
    image.on(opened);
    expect(image.state.phase).toBe('dissolved');
  });
});
