/**
 * Explores every state that the two commit machines can get into together with a hostile network, crashes,
 * timers that fire whenever they like, and callers who cancel, fence and give up at any moment.
 *
 * The network is the set of all messages ever sent: each may be delivered at any time, any number of times, in
 * any order, or never. That is loss, duplication and reordering at once, and more than a connection can do. One
 * thing it cannot do either: bytes sent to a process that has died do not reach the one started after it, so a
 * message to the destination carries the incarnation that its connection led to.
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
  isCommitted,
  type SourceEvent,
  type SourceState,
  type SourceTimer,
  stepSource,
} from '../../src/protocol/commit-source.js';
import { BrokenLaw, type Edge, reaches, search, type Violation } from './state-search.js';

export interface Machines {
  source: typeof stepSource;
  destination: typeof stepDestination;
}

export interface Bounds {
  /** Highest epoch: how often the source redials in all. */
  redials: number;
  /** How often a caller in doubt has the destination asked again. */
  asks: number;
}

export interface Exploration {
  states: number;
  transitions: number;
  /** The first broken law and the events that lead to it; null when there is none. */
  violation: Violation | null;
  /** How many of the distinct ends (source phase / destination phase / who runs the guest) were seen. */
  ends: Map<string, number>;
}

/** Everything that decides what can happen next. Immutable; every event makes a new one. */
interface World {
  source: SourceState | null; // null: the process is dead
  sourceRuns: boolean;
  pauseOutstanding: boolean;
  sourceTimers: number;
  linkUp: boolean;
  /** The destination's incarnation that the source's newest connection leads to. */
  linkTo: 0 | 1;
  dialling: number | null;
  grantSent: boolean;
  settled: string;
  fenced: boolean;
  asks: number;
  destination: DestinationState | null; // null: dead, or restarted and knowing nothing
  incarnation: 0 | 1;
  destinationAlive: boolean;
  destinationRuns: boolean;
  prepareOutstanding: boolean;
  destinationTimer: boolean;
  /** Facts about the first incarnation that outlive it. */
  everResumed: boolean;
  everAbandoned: boolean;
  saidRefused: boolean;
  /** Bit i: message i of the catalogue is in the network. */
  network: number;
}

const SOURCE_TIMERS: readonly SourceTimer[] = ['pause', 'ready', 'retry', 'doubt'];
const cause = { code: 'SYSTEM', message: '' };

type ToDestination = { to: 'destination'; incarnation: 0 | 1; message: SourceMessage };
type ToSource = { to: 'source'; message: DestinationMessage };

/** Numbers every message that can exist, so that the network is a bit set. */
function catalogueOf(bounds: Bounds): {
  all: (ToDestination | ToSource)[];
  indexOf: (entry: ToDestination | ToSource) => number;
} {
  const all: (ToDestination | ToSource)[] = [];
  const index = new Map<string, number>();
  const name = (entry: ToDestination | ToSource) =>
    `${entry.to === 'source' ? 's' : entry.incarnation}${entry.message.type}${entry.message.epoch}`;
  const add = (entry: ToDestination | ToSource) => {
    index.set(name(entry), all.length);
    all.push(entry);
  };
  add({ to: 'destination', incarnation: 0, message: { type: 'prepare', epoch: 0 } });
  add({ to: 'destination', incarnation: 0, message: { type: 'cancel', epoch: 0, ...cause } });
  for (let epoch = 0; epoch <= bounds.redials; epoch++) {
    for (const incarnation of epoch === 0 ? ([0] as const) : ([0, 1] as const)) {
      add({ to: 'destination', incarnation, message: { type: 'grant', epoch } });
      if (epoch > 0) add({ to: 'destination', incarnation, message: { type: 'query', epoch } });
    }
    add({ to: 'source', message: { type: 'ready', epoch } });
    add({ to: 'source', message: { type: 'resumed', epoch } });
    add({ to: 'source', message: { type: 'refused', epoch, ...cause } });
    add({ to: 'source', message: { type: 'unknown-migration', epoch } });
  }
  if (all.length > 31) throw new Error(`${all.length} messages do not fit into the bit set`);
  return {
    all,
    indexOf(entry) {
      const at = index.get(name(entry));
      // A cancel may follow a redial only in a broken machine; the law below it reports that.
      if (at === undefined) throw new BrokenLaw(`a message nobody expects: ${name(entry)}`);
      return at;
    },
  };
}

export function explore(
  machines: Partial<Machines> = {},
  bounds: Bounds = { redials: 3, asks: 2 },
): Exploration {
  const source = machines.source ?? stepSource;
  const destination = machines.destination ?? stepDestination;
  const catalogue = catalogueOf(bounds);

  function stepSourceIn(world: World, event: SourceEvent): World {
    if (!world.source) return world;
    const step = source(world.source, event);
    const next: World = { ...world, source: step.state };
    for (const action of step.actions) {
      switch (action.type) {
        case 'pause':
          if (next.pauseOutstanding || !next.sourceRuns)
            throw new BrokenLaw('pauses a guest that is not running');
          next.pauseOutstanding = true;
          break;
        case 'run-here':
          if (next.sourceRuns) throw new BrokenLaw('lets a guest run that was not paused');
          next.sourceRuns = true;
          break;
        case 'send':
          if (action.message.type === 'grant') {
            if (!isCommitted(next.source as SourceState)) throw new BrokenLaw('GRANT before it was recorded');
            next.grantSent = true;
          }
          if (action.message.type === 'cancel' && next.grantSent) throw new BrokenLaw('CANCEL after GRANT');
          if (next.linkUp) {
            const entry: ToDestination = {
              to: 'destination',
              incarnation: next.linkTo,
              message: action.message,
            };
            next.network |= 1 << catalogue.indexOf(entry);
          }
          break;
        case 'redial':
          next.linkUp = false;
          next.dialling = action.epoch;
          break;
        case 'start-timer':
          next.sourceTimers |= 1 << SOURCE_TIMERS.indexOf(action.timer);
          break;
        case 'stop-timer':
          next.sourceTimers &= ~(1 << SOURCE_TIMERS.indexOf(action.timer));
          break;
        case 'settle':
          if (next.settled !== '' && next.settled !== 'in-doubt' && next.settled !== 'lost') {
            throw new BrokenLaw(`settled twice: ${next.settled}, then ${action.outcome}`);
          }
          next.settled = action.outcome;
          break;
        case 'abort-pause':
          break;
      }
    }
    return next;
  }

  function stepDestinationIn(world: World, event: DestinationEvent): World {
    if (!world.destination) return world;
    const step = destination(world.destination, event);
    const next: World = { ...world, destination: step.state };
    for (const action of step.actions) {
      switch (action.type) {
        case 'prepare':
          if (next.prepareOutstanding) throw new BrokenLaw('prepares twice');
          next.prepareOutstanding = true;
          break;
        case 'resume':
          if (next.everResumed) throw new BrokenLaw('resumes twice');
          if (next.everAbandoned) throw new BrokenLaw('resumes a guest that it had abandoned');
          next.destinationRuns = true;
          next.everResumed = true;
          break;
        case 'abandon':
          if (next.everResumed) throw new BrokenLaw('abandons a guest that runs');
          next.everAbandoned = true;
          break;
        case 'send':
          if (action.message.type === 'refused') next.saidRefused = true;
          next.network |= 1 << catalogue.indexOf({ to: 'source', message: action.message });
          break;
        case 'start-timer':
          next.destinationTimer = true;
          break;
        case 'stop-timer':
          next.destinationTimer = false;
          break;
        case 'settle':
          break;
      }
    }
    return next;
  }

  function edgesOf(world: World): Edge<World>[] {
    const edges: Edge<World>[] = [];
    const add = (label: string, next: World, inevitable = false) => {
      if (next !== world) edges.push({ label, next, inevitable });
    };
    const state = world.source;
    if (state) {
      const on = (event: SourceEvent, from: Partial<World> = {}) =>
        stepSourceIn({ ...world, ...from }, event);
      add('source: switch', on({ type: 'switch' }), true);
      if (world.pauseOutstanding) {
        add('source: paused', on({ type: 'paused' }, { pauseOutstanding: false, sourceRuns: false }));
        add('source: pause failed', on({ type: 'pause-failed', cause }, { pauseOutstanding: false }));
      }
      add('source: transferred', on({ type: 'transferred' }), true);
      add('source: fail', on({ type: 'fail', cause }));
      add('source: release', on({ type: 'release' }));
      if (world.linkUp) {
        const peerDead = !world.destinationAlive || world.linkTo !== world.incarnation;
        add('source: connection lost', on({ type: 'connection-lost' }, { linkUp: false }), peerDead);
      }
      if (world.dialling !== null) {
        const epoch = world.dialling;
        add('source: redial failed', on({ type: 'redial-failed', epoch }, { dialling: null }), true);
        if (world.destinationAlive) {
          const link = { dialling: null, linkUp: true, linkTo: world.incarnation };
          add('source: redialled', on({ type: 'redialled', epoch }, link));
        }
      }
      SOURCE_TIMERS.forEach((timer, bit) => {
        const armed = (world.sourceTimers & (1 << bit)) !== 0;
        // The budget of redials ends here; the machine's own bound is the doubt timer.
        if (timer === 'retry' && state.phase === 'granted' && state.epoch >= bounds.redials) return;
        // A timer may fire although it was stopped just before (its event was queued): that must be harmless.
        const sourceTimers = armed ? world.sourceTimers & ~(1 << bit) : world.sourceTimers;
        add(
          `source: timer ${timer}${armed ? '' : ' (stale)'}`,
          on({ type: 'timer', timer }, { sourceTimers }),
          armed,
        );
      });
      // Callers fence truthfully: the process that was granted is dead.
      if (!world.destinationAlive || world.incarnation === 1) {
        add('source: fence', on({ type: 'fence' }, isCommitted(state) ? { fenced: true } : {}));
      }
      if (world.asks < bounds.asks && state.phase === 'in-doubt' && state.epoch < bounds.redials) {
        add('source: ask again', on({ type: 'ask-again' }, { asks: world.asks + 1 }));
      }
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
    if (world.destination) {
      const on = (event: DestinationEvent, from: Partial<World> = {}) =>
        stepDestinationIn({ ...world, ...from }, event);
      if (world.prepareOutstanding) {
        add('destination: prepared', on({ type: 'prepared' }, { prepareOutstanding: false }));
        add('destination: prepare failed', on({ type: 'fail', cause }, { prepareOutstanding: false }));
      }
      add('destination: fail', on({ type: 'fail', cause }));
      const sourceGone = !state || state.phase === 'reclaimed' || state.phase === 'released';
      add('destination: connection lost', on({ type: 'connection-lost' }), sourceGone);
      const armed = world.destinationTimer;
      add(
        `destination: timer grant${armed ? '' : ' (stale)'}`,
        on({ type: 'timer', timer: 'grant' }, { destinationTimer: false }),
        armed,
      );
    }
    if (world.destinationAlive && world.incarnation === 0) {
      add('destination: CRASH', {
        ...world,
        destination: null,
        destinationAlive: false,
        destinationRuns: false,
        prepareOutstanding: false,
        destinationTimer: false,
      });
    }
    if (!world.destinationAlive && world.incarnation === 0) {
      add('destination: restart', { ...world, destinationAlive: true, incarnation: 1 });
    }
    catalogue.all.forEach((entry, bit) => {
      if ((world.network & (1 << bit)) === 0) return;
      const label = `deliver ${entry.message.type} ${entry.message.epoch} to ${entry.to}`;
      if (entry.to === 'source') {
        if (state) add(label, stepSourceIn({ ...world }, { type: 'message', message: entry.message }));
        return;
      }
      if (!world.destinationAlive || entry.incarnation !== world.incarnation) return;
      if (world.destination) {
        add(label, stepDestinationIn({ ...world }, { type: 'message', message: entry.message }));
        return;
      }
      const answer = answerUnknown(entry.message);
      if (!answer) return;
      const network = world.network | (1 << catalogue.indexOf({ to: 'source', message: answer }));
      add(`${label} (restarted)`, { ...world, network });
    });
    return edges;
  }

  const { worlds, forward, violation, traceTo } = search(firstWorld(), { edgesOf, brokenLaw, keyOf });
  const ends = new Map<string, number>();
  for (const world of worlds) {
    if (!sourceIsOver(world) || !destinationIsOver(world)) continue;
    const owner = world.sourceRuns ? 'source' : world.destinationRuns ? 'destination' : 'nobody';
    const end = `${world.source?.phase ?? 'crashed'} / ${world.destination?.phase ?? 'crashed'} / ${owner}`;
    ends.set(end, (ends.get(end) ?? 0) + 1);
  }
  const result = (broken: Violation | null): Exploration => ({
    states: worlds.length,
    transitions: forward.length,
    violation: broken,
    ends,
  });
  if (violation) return result(violation);

  // Nothing waits for ever: with the network silent and nobody helping, both sides come to an end.
  const ending = reaches(
    worlds.map((world) => sourceIsOver(world) && destinationIsOver(world)),
    forward.filter((edge) => edge.inevitable),
  );
  const stuck = ending.indexOf(false);
  if (stuck >= 0) return result({ law: 'waits for ever when the network is silent', trace: traceTo(stuck) });

  // Nothing is lost for good while both processes live and the caller does not give up: one owner can be found,
  // and without anybody's death or fence.
  const bothLive = (world: World) => world.source !== null && world.destination !== null && !world.fenced;
  const owned = reaches(
    worlds.map(
      (world) =>
        sourceIsOver(world) && destinationIsOver(world) && world.sourceRuns !== world.destinationRuns,
    ),
    forward.filter(({ to }) => bothLive(worlds[to] as World)),
  );
  const orphan = worlds.findIndex(
    (world, at) => !owned[at] && bothLive(world) && world.source?.phase !== 'released',
  );
  if (orphan >= 0)
    return result({ law: 'no owner can be found although both sides live', trace: traceTo(orphan) });
  return result(null);
}

function firstWorld(): World {
  return {
    source: initialSource(),
    sourceRuns: true,
    pauseOutstanding: false,
    sourceTimers: 0,
    linkUp: true,
    linkTo: 0,
    dialling: null,
    grantSent: false,
    settled: '',
    fenced: false,
    asks: 0,
    destination: initialDestination(),
    incarnation: 0,
    destinationAlive: true,
    destinationRuns: false,
    prepareOutstanding: false,
    destinationTimer: false,
    everResumed: false,
    everAbandoned: false,
    saidRefused: false,
    network: 0,
  };
}

/** The laws as facts about who really runs what, not about what a machine believes. */
function brokenLaw(world: World): string | null {
  const { source } = world;
  if (world.sourceRuns && world.destinationRuns) return 'two owners';
  if (world.everResumed && !world.grantSent) return 'resumed without GRANT';
  if (world.everResumed && world.saidRefused) return 'refused and resumed';
  if (source && world.grantSent && world.sourceRuns && !world.fenced && !world.everAbandoned) {
    return 'the source runs after GRANT without refusal or fence';
  }
  if (source && world.grantSent && !world.sourceRuns && world.fenced && source.phase === 'reclaimed') {
    return 'a fence that does not let the guest run';
  }
  if (source && !world.grantSent) {
    const standing = source.phase === 'transferring' || source.phase === 'preparing';
    if (!world.sourceRuns && !standing) return 'the guest stands at the source before GRANT';
    if (world.settled !== '' && world.settled !== 'reclaimed') return `settled ${world.settled} before GRANT`;
  }
  if (source && sourceIsOver(world) && world.settled === '') return 'over, but never settled';
  if (source?.phase === 'departed' && !world.everResumed) return 'departed, but never resumed anywhere';
  return null;
}

/** In doubt counts: the promise is settled and what follows is the caller's. */
function sourceIsOver({ source }: World): boolean {
  if (!source) return true;
  return !['running', 'pausing', 'transferring', 'preparing', 'granted'].includes(source.phase);
}

function destinationIsOver({ destination }: World): boolean {
  return !destination || destination.phase === 'resumed' || destination.phase === 'abandoned';
}

/** Causes are told, never acted on: worlds that differ in them alone are one. Everything else is in the key. */
function keyOf(world: World): string {
  const parts: (string | number | boolean | null)[] = [];
  for (const value of Object.values(world) as World[keyof World][]) {
    if (value === null || typeof value !== 'object') {
      parts.push(typeof value === 'boolean' ? Number(value) : value);
      continue;
    }
    for (const [name, part] of Object.entries(value) as [string, unknown][]) {
      if (name !== 'cause') parts.push(String(part));
    }
  }
  return parts.join(',');
}
