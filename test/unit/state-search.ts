/**
 * Every world that can be reached from a first one, breadth first, and whether a law is broken in it or on the way: what
 * the explorers of protocols have in common.
 */

export interface Edge<World> {
  label: string;
  next: World;
  /** It happens by itself, sooner or later, however quiet the network is. */
  inevitable: boolean;
}

export interface Violation {
  law: string;
  /** What happened, from the first world on. */
  trace: string[];
}

/** Thrown in the middle of a step. */
export class BrokenLaw extends Error {}

export interface Search<World> {
  readonly worlds: readonly World[];
  readonly forward: readonly { from: number; to: number; inevitable: boolean }[];
  /** The first that was found; then the search ended there. */
  readonly violation: Violation | null;
  traceTo(index: number): string[];
}

/** Worlds with the same key are one. `brokenLaw` looks at each, before anything happens in it. */
export function search<World>(
  first: World,
  {
    edgesOf,
    brokenLaw,
    keyOf,
  }: {
    edgesOf: (world: World) => Edge<World>[];
    brokenLaw: (world: World) => string | null;
    keyOf: (world: World) => string;
  },
): Search<World> {
  const keys = new Map<string, number>();
  const worlds: World[] = [];
  const parents: number[] = [];
  const labels: string[] = [];
  const forward: { from: number; to: number; inevitable: boolean }[] = [];
  const traceTo = (index: number): string[] => {
    const trace: string[] = [];
    for (let at = index; at > 0; at = parents[at] as number) trace.unshift(labels[at] as string);
    return trace;
  };
  const found = (violation: Violation | null): Search<World> => ({ worlds, forward, violation, traceTo });
  const enter = (world: World, parent: number, label: string): number => {
    const key = keyOf(world);
    const known = keys.get(key);
    if (known !== undefined) return known;
    keys.set(key, worlds.length);
    worlds.push(world);
    parents.push(parent);
    labels.push(label);
    return worlds.length - 1;
  };
  enter(first, 0, '');
  for (let at = 0; at < worlds.length; at++) {
    const world = worlds[at] as World;
    const broken = brokenLaw(world);
    if (broken) return found({ law: broken, trace: traceTo(at) });
    try {
      for (const edge of edgesOf(world)) {
        const to = enter(edge.next, at, edge.label);
        if (to !== at) forward.push({ from: at, to, inevitable: edge.inevitable });
      }
    } catch (error) {
      if (!(error instanceof BrokenLaw)) throw error;
      return found({ law: error.message, trace: [...traceTo(at), '(the next event)'] });
    }
  }
  return found(null);
}

/** Which nodes lead to one of the goals. */
export function reaches(goals: boolean[], edges: readonly { from: number; to: number }[]): boolean[] {
  const starts = new Int32Array(goals.length + 1);
  for (const { to } of edges) starts[to + 1] = (starts[to + 1] as number) + 1;
  for (let i = 0; i < goals.length; i++) starts[i + 1] = (starts[i + 1] as number) + (starts[i] as number);
  const fill = starts.slice();
  const sources = new Int32Array(edges.length);
  for (const { from, to } of edges) {
    sources[fill[to] as number] = from;
    fill[to] = (fill[to] as number) + 1;
  }
  const reached = goals.slice();
  const queue: number[] = [];
  goals.forEach((goal, at) => {
    if (goal) queue.push(at);
  });
  for (let head = 0; head < queue.length; head++) {
    const to = queue[head] as number;
    for (let i = starts[to] as number; i < (starts[to + 1] as number); i++) {
      const from = sources[i] as number;
      if (reached[from]) continue;
      reached[from] = true;
      queue.push(from);
    }
  }
  return reached;
}
