/**
 * Explores what becomes of a parked guest's pages at a server that is not its home: a *keeper*, which is told to hold what
 * it has before home is granted the guest, to commit when somebody runs it, and to let go. Home's own machine and the
 * keeper's are the real ones; the park's source and a claimant are as src/source/park.ts and src/staging/image-set.ts have
 * them. With a network that loses, repeats and delays, crashes of everybody, timers that fire late, and connections that
 * come and go.
 *
 * The network is the set of all messages ever sent, as in claims-explorer.ts.
 */
import {
  type ClaimsAnswer,
  type ClaimsEvent,
  type ClaimsState,
  type ClaimsTimer,
  initialClaims,
  stepClaims,
} from '../../src/protocol/image-claims.js';
import type { ClaimsExploration, ClaimsMachine } from './claims-explorer.js';
import { BrokenLaw, type Edge, reaches, search, type Violation } from './state-search.js';

/** What the source and the claimant do; the real ones have neither. */
export interface KeeperFaults {
  /** The source grants without the keeper's word. */
  grantsUnheld?: boolean;
  /** The claimant has the keeper let go before home has. */
  keeperFirst?: boolean;
}

const messages = [
  ...['hold to keeper', 'held to source', 'not held to source', 'dissolve to keeper, from source'],
  ...['prepare to home', 'ready to source', 'grant to home', 'parked to source', 'refused to source'],
  ...['cancel to home', 'claim to home', 'claimed to A', 'grant claim to home', 'granted to A'],
  ...['commit to keeper', 'dissolve to home, from A', 'dissolved to A', 'dissolve to keeper, from A'],
] as const;
type Message = (typeof messages)[number];

type Server = 'home' | 'keeper';

interface World {
  source: 'writing' | 'holding' | 'preparing' | 'granting' | 'parked' | 'reclaimed' | 'dead';
  A: 'idle' | 'claiming' | 'holding' | 'asking' | 'running' | 'leaving' | 'gone' | 'dead';
  /** null: it was restarted, and has lost everything. */
  home: ClaimsState | null;
  keeper: ClaimsState | null;
  homeTimers: number;
  keeperTimers: number;
  /** An operator has dropped it: nobody's fault. */
  dropped: boolean;
  network: number;
}

/** Without a time to live, which is an operator's wish. */
const timers: readonly ClaimsTimer[] = ['lease', 'claim'];

export function exploreKeepers(
  machine: ClaimsMachine = stepClaims,
  { grantsUnheld = false, keeperFirst = false }: KeeperFaults = {},
): ClaimsExploration {
  const seen = new Set<string>();
  const say = (world: World, message: Message): World => ({
    ...world,
    network: world.network | (1 << messages.indexOf(message)),
  });

  /** An event at a server that has the image, or had it. */
  function at(world: World, where: Server, event: ClaimsEvent): { next: World; answer: ClaimsAnswer | null } {
    const before = world[where];
    if (!before) return { next: world, answer: null };
    const { state, actions } = machine(before, event);
    let armed = where === 'home' ? world.homeTimers : world.keeperTimers;
    let answer: ClaimsAnswer | null = null;
    for (const action of actions) {
      if (action.type === 'answer') answer = action.answer;
      else if (action.type === 'start-timer') armed |= 1 << timers.indexOf(action.timer);
      else if (action.type === 'stop-timer') armed &= ~(1 << timers.indexOf(action.timer));
      else {
        seen.add(`${where} ended by ${action.cause}`);
        if (where === 'keeper' && action.cause !== 'drop' && isNeeded(world))
          throw new BrokenLaw(
            `a keeper let go (${action.cause}) of a guest that is parked, or runs on its pages`,
          );
      }
    }
    const next = { ...world, [where]: state, [`${where}Timers`]: armed };
    return { next, answer };
  }

  /** Home has the guest, or a claimant of it needs its pages still. */
  function isNeeded({ home, A }: World): boolean {
    return home !== null && ['parked', 'claimed', 'resumed'].includes(home.phase) && A !== 'gone';
  }

  function edgesOf(world: World): Edge<World>[] {
    const edges: Edge<World>[] = [];
    const add = (label: string, next: World, inevitable = false) => {
      if (next !== world) edges.push({ label, next, inevitable });
    };
    addSource(world, add);
    addClaimant(world, add);
    for (const where of ['home', 'keeper'] as const) addServer(world, where, add);
    messages.forEach((message, bit) => {
      if ((world.network & (1 << bit)) === 0) return;
      const next = deliver(world, message);
      if (next) add(`deliver ${message}`, next);
    });
    return edges;
  }

  type Add = (label: string, next: World, inevitable?: boolean) => void;

  function addSource(world: World, add: Add): void {
    const { source } = world;
    if (source === 'dead') return;
    add('source: CRASH', { ...world, source: 'dead' });
    const reclaimed = (): World => {
      const told = say(say(world, 'cancel to home'), 'dissolve to keeper, from source');
      return { ...told, source: 'reclaimed' };
    };
    if (source === 'writing') {
      add('source: hold', { ...say(world, 'hold to keeper'), source: 'holding' });
      if (grantsUnheld) add('source: prepare', { ...say(world, 'prepare to home'), source: 'preparing' });
    }
    // Until GRANT it may give up, for any reason; from then on it asks.
    if (source === 'writing' || source === 'holding' || source === 'preparing')
      add('source: gives up', reclaimed());
    if (source === 'holding') add('source: hold again', say(world, 'hold to keeper'));
    if (source === 'granting') {
      add('source: grant again', say(world, 'grant to home'));
      if (!world.home && (world.A === 'idle' || world.A === 'dead')) add('source: fence', reclaimed());
    }
  }

  function addClaimant(world: World, add: Add): void {
    const { A } = world;
    if (A === 'dead' || A === 'gone') return;
    add('A: CRASH', { ...world, A: 'dead' });
    if (A === 'idle') add('A: claim', { ...say(world, 'claim to home'), A: 'claiming' });
    if (A === 'claiming') add('A: claim again', say(world, 'claim to home'));
    if (A === 'holding') add('A: grant', { ...say(world, 'grant claim to home'), A: 'asking' });
    if (A === 'asking') add('A: grant again', say(world, 'grant claim to home'));
    if (A === 'running') {
      // That somebody runs it, and that it has every page.
      add('A: commit', say(world, 'commit to keeper'));
      add('A: dissolve', { ...say(world, 'dissolve to home, from A'), A: 'leaving' });
      if (keeperFirst) add('A: dissolve at the keeper', say(world, 'dissolve to keeper, from A'));
    }
    if (A === 'leaving') {
      add('A: dissolve again', say(world, 'dissolve to home, from A'));
      // What is gone already refuses nothing.
      if (!world.home) add('A: home is gone', { ...say(world, 'dissolve to keeper, from A'), A: 'gone' });
    }
  }

  function addServer(world: World, where: Server, add: Add): void {
    const state = world[where];
    if (!state) return;
    const on = (event: ClaimsEvent, from: Partial<World> = {}) =>
      at({ ...world, ...from }, where, event).next;
    const allGone =
      ['parked', 'reclaimed', 'dead'].includes(world.source) && ['idle', 'gone', 'dead'].includes(world.A);
    if (state.open) add(`${where}: connection lost`, on({ type: 'connection-lost' }), allGone);
    else if (!allGone) add(`${where}: opened`, on({ type: 'opened', claim: null }));
    if (where === 'home' && state.phase === 'parking')
      add('home: the grant does not come', say(on({ type: 'abandon' }), 'refused to source'), true);
    timers.forEach((timer, bit) => {
      const armed = where === 'home' ? world.homeTimers : world.keeperTimers;
      const isArmed = (armed & (1 << bit)) !== 0;
      const from = isArmed ? { [`${where}Timers`]: armed & ~(1 << bit) } : {};
      add(
        `${where}: timer ${timer}${isArmed ? '' : ' (stale)'}`,
        on({ type: `${timer}-over` }, from),
        isArmed,
      );
    });
    add(`${where}: restart`, { ...world, [where]: null, [`${where}Timers`]: 0 });
    if (where === 'keeper' && state.phase !== 'dissolved')
      add('keeper: an operator drops it', { ...on({ type: 'drop' }), dropped: true });
  }

  function deliver(world: World, message: Message): World | null {
    switch (message) {
      case 'hold to keeper': {
        const { next, answer } = at(world, 'keeper', { type: 'hold' });
        return say(next, answer?.type === 'held' ? 'held to source' : 'not held to source');
      }
      case 'held to source':
        return world.source === 'holding' ? { ...say(world, 'prepare to home'), source: 'preparing' } : null;
      case 'not held to source':
        if (world.source !== 'holding') return null;
        return {
          ...say(say(world, 'cancel to home'), 'dissolve to keeper, from source'),
          source: 'reclaimed',
        };
      case 'prepare to home': {
        if (world.home?.phase !== 'migrating') return null;
        const { next } = at(world, 'home', { type: 'prepared' });
        return next.home?.phase === 'parking' ? say(next, 'ready to source') : next;
      }
      case 'ready to source':
        return world.source === 'preparing' ? { ...say(world, 'grant to home'), source: 'granting' } : null;
      case 'grant to home': {
        const { next } = at(world, 'home', { type: 'park' });
        const phase = next.home?.phase;
        if (phase === 'migrating' || phase === 'parking')
          throw new BrokenLaw('GRANT does not park the guest');
        if (!next.home) return null; // nobody knows
        return say(
          next,
          phase === 'dissolved' && !wasParked(next.home) ? 'refused to source' : 'parked to source',
        );
      }
      case 'parked to source':
        return world.source === 'granting' ? { ...world, source: 'parked' } : null;
      case 'refused to source':
        if (world.source !== 'granting' && world.source !== 'preparing') return null;
        return { ...say(world, 'dissolve to keeper, from source'), source: 'reclaimed' };
      case 'cancel to home':
        return world.home?.phase === 'migrating' || world.home?.phase === 'parking'
          ? at(world, 'home', { type: 'abandon' }).next
          : null;
      case 'claim to home': {
        const asked = { type: 'claim', claimant: 'A', rollback: null, whole: true } as const;
        const { next, answer } = at(world, 'home', asked);
        return answer?.type === 'claimed' ? say(next, 'claimed to A') : next;
      }
      case 'claimed to A':
        return world.A === 'claiming' ? { ...world, A: 'holding' } : null;
      case 'grant claim to home': {
        const { next, answer } = at(world, 'home', { type: 'grant', claimant: 'A', epoch: 1 });
        return answer?.type === 'granted' ? say(next, 'granted to A') : next;
      }
      case 'granted to A':
        return world.A === 'asking' ? { ...world, A: 'running' } : null;
      case 'commit to keeper':
        return at(world, 'keeper', { type: 'commit' }).next;
      case 'dissolve to home, from A': {
        const { next, answer } = at(world, 'home', { type: 'dissolve', epoch: 1 });
        const isGone = answer?.type === 'dissolved' || next.home?.phase === 'dissolved';
        return isGone ? say(next, 'dissolved to A') : next;
      }
      case 'dissolved to A':
        return world.A === 'leaving' ? { ...say(world, 'dissolve to keeper, from A'), A: 'gone' } : null;
      case 'dissolve to keeper, from A':
        return at(world, 'keeper', { type: 'dissolve', epoch: 1 }).next;
      case 'dissolve to keeper, from source':
        return at(world, 'keeper', { type: 'dissolve', epoch: 0 }).next;
    }
  }

  function brokenLaw({ home, keeper, dropped, A }: World): string | null {
    seen
      .add(`home ${home?.phase ?? 'restarted'}`)
      .add(`keeper ${keeper?.phase ?? 'restarted'}`)
      .add(`A ${A}`);
    const probe = keeper && machine(keeper, { type: 'claim', claimant: 'X', rollback: null, whole: true });
    if (
      probe?.actions.some(
        ({ type, ...rest }) => type === 'answer' && 'answer' in rest && rest.answer.type === 'claimed',
      )
    )
      return 'a server that is not home gives a claim';
    if (!keeper || dropped || home?.phase !== 'parked') return null;
    // Whoever claims it now would wait for these pages.
    return keeper.phase === 'parked' || keeper.phase === 'committed'
      ? null
      : 'home has a guest whose keeper does not hold it';
  }

  const made = (home: boolean) => initialClaims({ kind: 'park', home, mortal: false });
  const first = { home: made(true), keeper: made(false), homeTimers: 0, keeperTimers: 0 };
  const { worlds, forward, violation, traceTo } = search<World>(
    { source: 'writing', A: 'idle', ...first, dropped: false, network: 0 },
    {
      edgesOf,
      brokenLaw,
      keyOf: (world) => JSON.stringify(world, (name, value) => (name === 'facts' ? undefined : value)),
    },
  );
  const result = (broken: Violation | null): ClaimsExploration => ({
    states: worlds.length,
    transitions: forward.length,
    violation: broken,
    seen,
  });
  if (violation) return result(violation);
  const settled = reaches(
    worlds.map(({ keeper }) => keeper?.phase !== 'migrating'),
    forward.filter(({ inevitable }) => inevitable),
  );
  const left = worlds.findIndex(
    ({ source, A }, index) => !settled[index] && source === 'dead' && (A === 'idle' || A === 'dead'),
  );
  if (left >= 0)
    return result({ law: 'pages that nobody told a keeper to hold stay for ever', trace: traceTo(left) });
  return result(null);
}

/** Whether what is gone was its claimant's. */
function wasParked(home: ClaimsState): boolean {
  return home.phase === 'dissolved' && home.cause === 'dissolve';
}
