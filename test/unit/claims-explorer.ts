/**
 * Explores every state that an image's claims can get into, in three settings: a source that parks its guest with
 * the real commit machines and somebody who claims it; a parked guest that two claim; an image of a guest that moved,
 * taken back by rollback. With a hostile network, crashes of everybody, timers that fire late, and an operator.
 *
 * The network is the set of all messages ever sent, as in commit-explorer.ts: each may be delivered at any time, any
 * number of times, or never. Callers are truthful: who asks for a rollback names an owner that is dead.
 */
import type { DestinationMessage, SourceMessage } from '../../src/protocol/commit.js';
import {
  answerUnknown,
  type DestinationEvent,
  type DestinationState,
  initialDestination,
  stepDestination,
} from '../../src/protocol/commit-destination.js';
import {
  initialSource,
  type SourceEvent,
  type SourceState,
  type SourceTimer,
  stepSource,
} from '../../src/protocol/commit-source.js';
import {
  type ClaimsAnswer,
  type ClaimsEvent,
  type ClaimsState,
  type ClaimsTimer,
  epochOf,
  initialClaims,
  ownerOf,
  stepClaims,
} from '../../src/protocol/image-claims.js';
import { BrokenLaw, type Edge, reaches, search, type Violation } from './state-search.js';

export type Setting = 'parking' | 'parked' | 'moved';
export type ClaimsMachine = typeof stepClaims;

export interface ClaimsExploration {
  states: number;
  transitions: number;
  violation: Violation | null;
  /** Who had the guest at some time: `source`, `home`, `A`, `B`, `destination`, and what ended the image. */
  seen: Set<string>;
}

type Who = 'A' | 'B';
type Claimant =
  /** `over`: the epochs that it has done with; an answer to a request that it gave up is nobody's. */
  | { phase: 'idle'; over: number }
  | { phase: 'dead' }
  /** Was given the claim; has asked for the grant; runs the guest. */
  | { phase: 'holding' | 'asking' | 'running'; epoch: number };

interface World {
  source: SourceState | null;
  sourceRuns: boolean;
  pauseOutstanding: boolean;
  sourceTimers: number;
  linkUp: boolean;
  linkTo: 0 | 1;
  dialling: number | null;
  /** The destination of a guest that moved: not yet running, running, dead. */
  destination: 'none' | 'running' | 'dead';
  alive: boolean;
  incarnation: 0 | 1;
  commit: DestinationState | null;
  prepareOutstanding: boolean;
  grantTimer: boolean;
  claims: ClaimsState | null;
  claimsTimers: number;
  A: Claimant;
  B: Claimant;
  /** Who was given each epoch, and who was granted it, as letters in order; '-' for nobody. */
  given: string;
  grantees: string;
  network: number;
}

type Message =
  | { to: 'server'; from: 'source'; incarnation: 0 | 1; commit: SourceMessage }
  | { to: 'source'; commit: DestinationMessage }
  | { to: 'server'; from: Who; ask: 'claim'; rollback: number | null }
  | { to: 'server'; from: Who; ask: 'grant' | 'release' | 'dissolve'; epoch: number }
  | { to: 'server'; from: 'owner'; ask: 'commit' | 'dissolve' }
  | { to: Who; answer: 'claimed' | 'granted' | 'stale'; epoch: number };

const sourceTimers: readonly SourceTimer[] = ['pause', 'ready', 'retry', 'doubt'];
const claimsTimers: readonly ClaimsTimer[] = ['lease', 'claim', 'ttl'];
const cause = { code: 'SYSTEM', message: '' };
const redials = 1;

function nameOf(message: Message): string {
  if ('commit' in message) {
    const to = message.to === 'source' ? 'source' : `server ${message.incarnation}`;
    return `${message.commit.type} ${message.commit.epoch} to ${to}`;
  }
  if ('answer' in message) return `${message.answer} ${message.epoch} to ${message.to}`;
  if (message.ask === 'claim') return `${message.from}: claim, rollback ${message.rollback}`;
  return 'epoch' in message
    ? `${message.from}: ${message.ask} ${message.epoch}`
    : `${message.from}: ${message.ask}`;
}

/** Numbers every message that can exist, so that the network is a bit set. */
function catalogueOf(setting: Setting, claimants: readonly Who[], epochs: number) {
  const all: Message[] = [];
  if (setting === 'parking') {
    all.push({ to: 'server', from: 'source', incarnation: 0, commit: { type: 'prepare', epoch: 0 } });
    all.push({
      to: 'server',
      from: 'source',
      incarnation: 0,
      commit: { type: 'cancel', epoch: 0, ...cause },
    });
    for (let epoch = 0; epoch <= redials; epoch++) {
      for (const incarnation of epoch === 0 ? ([0] as const) : ([0, 1] as const)) {
        all.push({ to: 'server', from: 'source', incarnation, commit: { type: 'grant', epoch } });
        if (epoch > 0)
          all.push({ to: 'server', from: 'source', incarnation, commit: { type: 'query', epoch } });
      }
      all.push({ to: 'source', commit: { type: 'ready', epoch } });
      all.push({ to: 'source', commit: { type: 'resumed', epoch } });
      all.push({ to: 'source', commit: { type: 'refused', epoch, ...cause } });
      if (epoch > 0) all.push({ to: 'source', commit: { type: 'unknown-migration', epoch } });
    }
  }
  all.push({ to: 'server', from: 'owner', ask: 'dissolve' });
  if (setting === 'moved') all.push({ to: 'server', from: 'owner', ask: 'commit' });
  for (const from of claimants) {
    all.push({ to: 'server', from, ask: 'claim', rollback: null });
    for (let rollback = setting === 'moved' ? 0 : 1; rollback < epochs; rollback++) {
      all.push({ to: 'server', from, ask: 'claim', rollback });
    }
  }
  // An epoch belongs to one claimant, so one bit does for both.
  for (let epoch = 1; epoch <= epochs; epoch++) {
    for (const ask of ['grant', 'release', 'dissolve'] as const) {
      all.push({ to: 'server', from: 'A', ask, epoch });
    }
    for (const answer of ['claimed', 'granted', 'stale'] as const) all.push({ to: 'A', answer, epoch });
  }
  if (all.length > 31) throw new Error(`${all.length} messages do not fit into the bit set`);
  const index = new Map(all.map((message, at) => [nameOf(message), at]));
  return {
    all,
    bit(message: Message): number {
      // By epoch: whose it is, the world knows.
      const shared: Message =
        'answer' in message
          ? { ...message, to: 'A' }
          : 'ask' in message && message.from !== 'owner' && message.ask !== 'claim'
            ? { ...message, from: 'A' }
            : message;
      const at = index.get(nameOf(shared));
      if (at === undefined) throw new BrokenLaw(`a message nobody expects: ${nameOf(message)}`);
      return 1 << at;
    },
  };
}

export function exploreClaims(
  setting: Setting,
  { machine = stepClaims, epochs = 2 }: { machine?: ClaimsMachine; epochs?: number } = {},
): ClaimsExploration {
  const claimants: readonly Who[] = setting === 'parked' ? ['A', 'B'] : ['A'];
  const catalogue = catalogueOf(setting, claimants, epochs);
  const seen = new Set<string>();

  function claimsIn(world: World, event: ClaimsEvent): { next: World; answer: ClaimsAnswer | null } {
    if (!world.claims) return { next: world, answer: null };
    const before = world.claims;
    const { state, actions } = machine(before, event);
    let next: World = { ...world, claims: state };
    let answer: ClaimsAnswer | null = null;
    for (const action of actions) {
      switch (action.type) {
        case 'answer':
          if (answer) throw new BrokenLaw('two answers to one request');
          answer = action.answer;
          break;
        case 'start-timer':
          next.claimsTimers |= 1 << claimsTimers.indexOf(action.timer);
          break;
        case 'stop-timer':
          next.claimsTimers &= ~(1 << claimsTimers.indexOf(action.timer));
          break;
        case 'drop': {
          const allowed =
            action.cause === 'drop' ||
            (action.cause === 'ttl' && before.phase === 'parked' && !before.open) ||
            (action.cause === 'lease' && before.phase === 'migrating' && !before.open) ||
            (action.cause === 'abandoned' && ['migrating', 'parking'].includes(before.phase)) ||
            (action.cause === 'dissolve' &&
              ['migrating', 'committed', 'parked', 'resumed'].includes(before.phase));
          if (!allowed) throw new BrokenLaw(`dropped (${action.cause}) while ${before.phase}`);
          const owner = ownerOf(before);
          if (
            action.cause === 'dissolve' &&
            event.type === 'dissolve' &&
            owner !== null &&
            owner !== event.epoch
          )
            throw new BrokenLaw('dissolved by somebody else than its owner');
          seen.add(`ended by ${action.cause}`);
          next = commitIn(next, { type: 'fail', cause });
          break;
        }
      }
    }
    return { next, answer };
  }

  function commitIn(world: World, event: DestinationEvent): World {
    if (!world.commit) return world;
    const { state, actions } = stepDestination(world.commit, event);
    let next: World = { ...world, commit: state };
    for (const action of actions) {
      switch (action.type) {
        case 'prepare':
          next.prepareOutstanding = true;
          break;
        case 'resume':
          next = claimsIn(next, { type: 'park' }).next;
          if (next.claims?.phase !== 'parked') throw new BrokenLaw('GRANT does not park the guest');
          break;
        case 'abandon':
          next = claimsIn(next, { type: 'abandon' }).next;
          break;
        case 'send':
          next = { ...next, network: next.network | catalogue.bit({ to: 'source', commit: action.message }) };
          break;
        case 'start-timer':
          next.grantTimer = true;
          break;
        case 'stop-timer':
          next.grantTimer = false;
          break;
        case 'settle':
          break;
      }
    }
    return next;
  }

  function sourceIn(world: World, event: SourceEvent): World {
    if (!world.source) return world;
    const { state, actions } = stepSource(world.source, event);
    const next: World = { ...world, source: state };
    for (const action of actions) {
      switch (action.type) {
        case 'pause':
          next.pauseOutstanding = true;
          break;
        case 'run-here':
          next.sourceRuns = true;
          break;
        case 'send':
          if (next.linkUp) {
            const { linkTo: incarnation } = next;
            next.network |= catalogue.bit({
              to: 'server',
              from: 'source',
              incarnation,
              commit: action.message,
            });
          }
          break;
        case 'redial':
          next.linkUp = false;
          next.dialling = action.epoch;
          break;
        case 'start-timer':
          next.sourceTimers |= 1 << sourceTimers.indexOf(action.timer);
          break;
        case 'stop-timer':
          next.sourceTimers &= ~(1 << sourceTimers.indexOf(action.timer));
          break;
        default:
          break;
      }
    }
    return next;
  }

  /** Nobody is left who could run the guest by this owner's right. */
  function isDead(world: World, owner: number): boolean {
    if (owner === 0) return world.destination === 'dead';
    const who = world.grantees[owner - 1];
    return who === 'A' || who === 'B' ? world[who].phase === 'dead' : false;
  }

  /** Who a message of this epoch is from or to; null while nobody has it. */
  function ofEpoch(world: World, epoch: number): Who | null {
    for (const who of claimants) {
      const claimant = world[who];
      if ('epoch' in claimant && claimant.epoch === epoch) return who;
    }
    return null;
  }

  function edgesOf(world: World): Edge<World>[] {
    const edges: Edge<World>[] = [];
    const add = (label: string, next: World, inevitable = false) => {
      if (next !== world) edges.push({ label, next, inevitable });
    };
    const sendTo = (label: string, from: World, message: Message) => {
      if (from.alive) add(label, { ...from, network: from.network | catalogue.bit(message) });
    };
    addSource(world, add);
    if (setting === 'moved') {
      // The migration's own commit is explored elsewhere: here it happens, or the guest stays.
      if (world.destination === 'none' && world.sourceRuns) {
        add('the guest resumes at its destination', { ...world, sourceRuns: false, destination: 'running' });
        if (world.alive)
          sendTo('the source gives up', world, { to: 'server', from: 'owner', ask: 'dissolve' });
      }
      if (world.destination === 'running') {
        sendTo('destination: commit', world, { to: 'server', from: 'owner', ask: 'commit' });
        sendTo('destination: dissolve', world, { to: 'server', from: 'owner', ask: 'dissolve' });
        add('destination: CRASH', { ...world, destination: 'dead' });
      }
    } else if (world.source?.phase === 'reclaimed' || (setting === 'parked' && world.grantees === '')) {
      sendTo('owner: dissolve', world, { to: 'server', from: 'owner', ask: 'dissolve' });
    }
    for (const who of claimants) addClaimant(world, who, add, sendTo);
    addServer(world, add);
    catalogue.all.forEach((message, bit) => {
      if ((world.network & (1 << bit)) === 0) return;
      const next = deliver(world, message);
      if (next) add(`deliver ${nameOf(message)}`, next);
    });
    return edges;
  }

  type Add = (label: string, next: World, inevitable?: boolean) => void;

  function addSource(world: World, add: Add): void {
    const state = world.source;
    if (!state) return;
    const on = (event: SourceEvent, from: Partial<World> = {}) => sourceIn({ ...world, ...from }, event);
    add('source: switch', on({ type: 'switch' }), true);
    if (world.pauseOutstanding) {
      add('source: paused', on({ type: 'paused' }, { pauseOutstanding: false, sourceRuns: false }));
      add('source: pause failed', on({ type: 'pause-failed', cause }, { pauseOutstanding: false }));
    }
    add('source: transferred', on({ type: 'transferred' }), true);
    add('source: fail', on({ type: 'fail', cause }));
    if (world.linkUp) {
      const peerDead = !world.alive || world.linkTo !== world.incarnation;
      add('source: connection lost', on({ type: 'connection-lost' }, { linkUp: false }), peerDead);
    }
    if (world.dialling !== null) {
      const epoch = world.dialling;
      add('source: redial failed', on({ type: 'redial-failed', epoch }, { dialling: null }), true);
      if (world.alive) {
        const link = { dialling: null, linkUp: true, linkTo: world.incarnation };
        add('source: redialled', on({ type: 'redialled', epoch }, link));
      }
    }
    sourceTimers.forEach((timer, bit) => {
      if ((world.sourceTimers & (1 << bit)) === 0) return;
      if (timer === 'retry' && state.phase === 'granted' && state.epoch >= redials) return;
      const from = { sourceTimers: world.sourceTimers & ~(1 << bit) };
      add(`source: timer ${timer}`, on({ type: 'timer', timer }, from), true);
    });
    // A fence is about the guest: the home server is dead, and nobody got the guest from it.
    const nobody = claimants.every((who) => ['idle', 'dead', 'holding'].includes(world[who].phase));
    if (nobody && (!world.alive || world.incarnation === 1)) add('source: fence', on({ type: 'fence' }));
    add('source: CRASH', {
      ...world,
      source: null,
      sourceRuns: false,
      pauseOutstanding: false,
      sourceTimers: 0,
      linkUp: false,
      dialling: null,
    });
  }

  function addClaimant(
    world: World,
    who: Who,
    add: Add,
    send: (label: string, from: World, message: Message) => void,
  ): void {
    const claimant = world[who];
    if (claimant.phase === 'dead') return;
    add(`${who}: CRASH`, { ...world, [who]: { phase: 'dead' } });
    if (claimant.phase === 'idle') {
      send(`${who}: claim`, world, { to: 'server', from: who, ask: 'claim', rollback: null });
      for (let owner = setting === 'moved' ? 0 : 1; owner < epochs; owner++) {
        if (!isDead(world, owner)) continue;
        const ask: Message = { to: 'server', from: who, ask: 'claim', rollback: owner };
        send(`${who}: claim, ${owner} is dead`, world, ask);
      }
      return;
    }
    const { epoch } = claimant;
    if (claimant.phase === 'holding') {
      const asking = { ...world, [who]: { phase: 'asking', epoch } };
      send(`${who}: grant`, asking, { to: 'server', from: who, ask: 'grant', epoch });
      const idle = { ...world, [who]: { phase: 'idle', over: epoch } };
      send(`${who}: release`, idle, { to: 'server', from: who, ask: 'release', epoch });
      add(`${who}: gives up`, idle);
    }
    if (claimant.phase === 'asking') {
      send(`${who}: grant again`, world, { to: 'server', from: who, ask: 'grant', epoch });
    }
    if (claimant.phase === 'running') {
      send(`${who}: dissolve`, world, { to: 'server', from: who, ask: 'dissolve', epoch });
    }
    if (claimant.phase !== 'running') {
      add(`${who}: opens again`, claimsIn(world, { type: 'opened', claim: { claimant: who, epoch } }).next);
    }
  }

  function addServer(world: World, add: Add): void {
    if (!world.alive) {
      if (world.incarnation === 0) add('server: restart', { ...world, alive: true, incarnation: 1 });
      return;
    }
    if (world.incarnation === 1) return;
    const on = (event: ClaimsEvent, from: Partial<World> = {}) => claimsIn({ ...world, ...from }, event).next;
    const state = world.claims as ClaimsState;
    const sourceGone =
      !world.source || world.source.phase === 'reclaimed' || world.source.phase === 'released';
    if (world.commit) {
      const commit = (event: DestinationEvent, from: Partial<World> = {}) =>
        commitIn({ ...world, ...from }, event);
      if (world.prepareOutstanding) {
        const prepared = on({ type: 'prepared' }, { prepareOutstanding: false });
        add(
          'server: prepared',
          commitIn(
            prepared,
            prepared.claims?.phase === 'parking' ? { type: 'prepared' } : { type: 'fail', cause },
          ),
        );
        add('server: pages are missing', commit({ type: 'fail', cause }, { prepareOutstanding: false }));
      }
      add('server: commit connection lost', commit({ type: 'connection-lost' }), sourceGone);
      if (world.grantTimer) {
        add('server: timer grant', commit({ type: 'timer', timer: 'grant' }, { grantTimer: false }), true);
      }
    }
    const allGone =
      !world.sourceRuns &&
      sourceGone &&
      world.destination !== 'running' &&
      claimants.every((who) => world[who].phase === 'dead');
    if (state.open) add('server: connection lost', on({ type: 'connection-lost' }), allGone);
    else if (!allGone) add('server: opened', on({ type: 'opened', claim: null }));
    if (state.phase === 'claimed' && state.held) {
      const holder = world[state.claimant as Who];
      const gone = !('epoch' in holder) || holder.epoch !== state.epoch;
      add('server: claimant lost', on({ type: 'claimant-lost', epoch: state.epoch }), gone);
    }
    claimsTimers.forEach((timer, bit) => {
      const armed = (world.claimsTimers & (1 << bit)) !== 0;
      const from = armed ? { claimsTimers: world.claimsTimers & ~(1 << bit) } : {};
      add(`server: timer ${timer}${armed ? '' : ' (stale)'}`, on({ type: `${timer}-over` }, from), armed);
    });
    if (state.phase !== 'dissolved') add('server: an operator drops it', on({ type: 'drop' }));
    add('server: CRASH', {
      ...world,
      alive: false,
      commit: null,
      claims: null,
      claimsTimers: 0,
      prepareOutstanding: false,
      grantTimer: false,
    });
  }

  function deliver(world: World, message: Message): World | null {
    if ('commit' in message) {
      if (message.to === 'source') return sourceIn(world, { type: 'message', message: message.commit });
      if (!world.alive || message.incarnation !== world.incarnation) return null;
      if (world.commit) return commitIn(world, { type: 'message', message: message.commit });
      const answer = answerUnknown(message.commit);
      return answer && { ...world, network: world.network | catalogue.bit({ to: 'source', commit: answer }) };
    }
    if ('answer' in message) return deliverAnswer(world, message);
    // A restarted server has no image: it declines, and that changes nothing.
    if (!world.alive || !world.claims) return null;
    if (message.ask === 'claim') {
      if (epochOf(world.claims) >= epochs) return null; // the budget of claims ends here
      const { from: claimant, rollback } = message;
      const { next, answer } = claimsIn(world, { type: 'claim', claimant, rollback, whole: true });
      if (answer?.type !== 'claimed') return answer ? next : null;
      return {
        ...next,
        given: withLetter(next.given, answer.epoch, claimant, 'one epoch given to two'),
        network: next.network | catalogue.bit({ to: claimant, answer: 'claimed', epoch: answer.epoch }),
      };
    }
    if (message.from === 'owner') {
      const event =
        message.ask === 'commit' ? ({ type: 'commit' } as const) : ({ type: 'dissolve', epoch: 0 } as const);
      return claimsIn(world, event).next;
    }
    const { ask } = message;
    const epoch = 'epoch' in message ? message.epoch : 0;
    if (ask === 'dissolve') return claimsIn(world, { type: 'dissolve', epoch }).next;
    // Requests name the claimant: whose epoch it was.
    const claimant = world.given[epoch - 1] as Who;
    if (ask === 'release') return claimsIn(world, { type: 'release', claimant, epoch }).next;
    if (ask !== 'grant') return null;
    const { next, answer } = claimsIn(world, { type: 'grant', claimant, epoch });
    const said = answer?.type === 'granted' ? 'granted' : 'stale';
    const to = claimant;
    const grantees =
      said === 'granted' ? withLetter(next.grantees, epoch, to, 'one epoch granted to two') : next.grantees;
    return { ...next, grantees, network: next.network | catalogue.bit({ to, answer: said, epoch }) };
  }

  function deliverAnswer(world: World, { answer, epoch }: { answer: string; epoch: number }): World | null {
    if (answer === 'claimed') {
      const who = world.given[epoch - 1] as Who;
      const claimant = world[who];
      if (claimant.phase !== 'idle' || epoch <= claimant.over) return null;
      return { ...world, [who]: { phase: 'holding', epoch } };
    }
    const who = ofEpoch(world, epoch);
    if (!who || world[who].phase !== 'asking') return null;
    return {
      ...world,
      [who]: answer === 'granted' ? { phase: 'running', epoch } : { phase: 'idle', over: epoch },
    };
  }

  function brokenLaw(world: World): string | null {
    const running = claimants.filter((who) => world[who].phase === 'running');
    const owners = [
      ...(world.sourceRuns ? ['source'] : []),
      ...(world.destination === 'running' ? ['destination'] : []),
      ...running,
    ];
    for (const owner of owners) seen.add(owner);
    if (owners.length > 1) return 'two owners';
    const { claims } = world;
    if (!claims) return null;
    if (claims.facts.kind === 'park' && ['parked', 'claimed', 'resumed'].includes(claims.phase)) {
      seen.add('home');
      if (world.sourceRuns) return 'the home server has a guest that its source runs';
    }
    // Nobody is refused for ever: a parked guest can be claimed, and a dead owner's one by rollback.
    const owner = ownerOf(claims);
    if (claims.phase === 'parked' || claims.phase === 'resumed' || claims.phase === 'committed') {
      const probe = machine(claims, { type: 'claim', claimant: 'X', rollback: owner, whole: true });
      const answered = probe.actions.some(
        (action) => action.type === 'answer' && action.answer.type === 'claimed',
      );
      if (!answered) return 'a guest that nobody has and nobody can claim';
    }
    return null;
  }

  const { worlds, forward, violation, traceTo } = search(firstWorld(setting), { edgesOf, brokenLaw, keyOf });
  const result = (broken: Violation | null): ClaimsExploration => ({
    states: worlds.length,
    transitions: forward.length,
    violation: broken,
    seen,
  });
  if (violation) return result(violation);

  const inevitable = forward.filter((edge) => edge.inevitable);
  const claimGone = ({ claims, ...world }: World) => {
    if (claims?.phase !== 'claimed') return false;
    const holder = world[claims.claimant as Who];
    return !('epoch' in holder) || holder.epoch !== claims.epoch;
  };
  const free = reaches(
    worlds.map((world) => !claimGone(world)),
    inevitable,
  );
  const stuck = free.indexOf(false);
  if (stuck >= 0)
    return result({ law: 'a claim whose claimant is gone is never given back', trace: traceTo(stuck) });
  const settled = reaches(
    worlds.map(({ claims }) => claims?.phase !== 'migrating' && claims?.phase !== 'parking'),
    inevitable,
  );
  const left = worlds.findIndex(
    (world, at) =>
      !settled[at] &&
      !world.source &&
      !world.sourceRuns &&
      world.destination !== 'running' &&
      claimants.every((who) => world[who].phase === 'dead'),
  );
  if (left >= 0)
    return result({ law: 'an image that nobody committed stays for ever', trace: traceTo(left) });
  return result(null);
}

function withLetter(before: string, epoch: number, who: Who, law: string): string {
  const letters = before.padEnd(epoch, '-').split('');
  const had = letters[epoch - 1];
  if (had !== '-' && had !== who) throw new BrokenLaw(law);
  letters[epoch - 1] = who;
  return letters.join('');
}

function firstWorld(setting: Setting): World {
  const made = initialClaims({ kind: setting === 'moved' ? 'migration' : 'park', home: true, mortal: true });
  const parked: ClaimsState = { facts: made.facts, open: true, phase: 'parked', epoch: 0 };
  return {
    source: setting === 'parking' ? initialSource() : null,
    sourceRuns: setting !== 'parked',
    pauseOutstanding: false,
    sourceTimers: 0,
    linkUp: true,
    linkTo: 0,
    dialling: null,
    destination: 'none',
    alive: true,
    incarnation: 0,
    commit: setting === 'parking' ? initialDestination() : null,
    prepareOutstanding: false,
    grantTimer: false,
    claims: setting === 'parked' ? parked : made,
    claimsTimers: 0,
    A: { phase: 'idle', over: 0 },
    B: { phase: 'idle', over: 0 },
    given: '',
    grantees: '',
    network: 0,
  };
}

/** Causes are told, never acted on: worlds that differ in them alone are one. */
function keyOf(world: World): string {
  return JSON.stringify(world, (name, value) => (name === 'cause' || name === 'facts' ? undefined : value));
}
