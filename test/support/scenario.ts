/** What most migration tests do: two hosts, a guest that writes, and the questions asked at the end. */
import { setTimeout as pause } from 'node:timers/promises';
import { expect } from 'vitest';
import { type Check, Host, type RegionSpec, type Settled, type Status } from './host.js';
import { held, heldAgain, type Inventory, inventory, LOOK_AGAIN_MS } from './leftovers.js';

export { type Inventory, inventory };

export const SECRET = 'a secret that only the hosts of this test know';

/** 4 MiB where a page has 4 KiB; a multiple of a WebAssembly page everywhere. */
export const PAGES = 1024;

export function regionsOf(kind: RegionSpec['kind'], pages = PAGES): RegionSpec[] {
  return [{ kind, pages, maxPages: pages * 2 }];
}

export interface Report {
  mode: string;
  switchedToPostCopy: boolean;
  state: string;
  verified: boolean | null;
  tracker: string | null;
  pauseWaitMs: number;
  downtimeMs: number;
  evictionMs: number;
  totalMs: number;
  bytesOnWire: number;
  pagesSent: number;
  pagesZero: number;
  pagesResent: number;
  heapBytes: number;
  rounds: { round: number; pagesSent: number; dirtyPagesAfter: number; durationMs: number }[];
  remoteFaults: { count: number; p50Us: number; p99Us: number; maxUs: number };
  redials: number;
  base: {
    used: boolean;
    reason: string;
    problem: string | null;
    pagesSame: number;
    bytesSaved: number;
    pagesCompared: number;
    bytesExchanged: number;
    roundTrips: number;
    waitMs: number;
    replayMs: number;
    replay: 'applied' | 'skipped' | 'none';
  } | null;
  pagesDirect: number;
  intermediaries: Intermediary[];
}

export interface Intermediary {
  name: string;
  pages: number;
  bytes: number;
  failed: string | null;
}

export async function hosts<const Names extends string[]>(
  ...names: Names
): Promise<{ [K in keyof Names]: Host }> {
  return (await Promise.all(names.map((name) => Host.start(name)))) as { [K in keyof Names]: Host };
}

/** A guest named `guest` that runs on `host`. */
export async function startGuest(
  host: Host,
  regions: RegionSpec[],
  options: { guest?: string; rate?: object; behaviour?: object } = {},
): Promise<void> {
  const { guest = 'g', rate = {}, behaviour = {} } = options;
  await host.call('create', { guest, regions, rate, behaviour });
  await host.call('start', { guest });
}

export async function listen(
  host: Host,
  args: { options?: object; [more: string]: unknown } = {},
): Promise<number> {
  const options = { secret: SECRET, ...args.options };
  const { port } = await host.call<{ port: number }>('listen', { ...args, options });
  return port;
}

/** A VMD server in a process of its own. */
export interface Stage {
  host: Host;
  name: string;
  port: number;
  /** While it held nothing. */
  freeBytes: number;
}

export interface StageStatus {
  memoryBytes: number;
  freeBytes: number;
  images: number;
  held: { id: string; phase: string; pagesHeld: number; sealed: boolean; bytesOut: number }[];
}

export async function startStage(name: string, options: object = {}): Promise<Stage> {
  const host = await Host.start(name);
  const { port } = await host.call<{ port: number }>('stage', {
    options: { secret: SECRET, memoryBytes: 64 * 2 ** 20, name, ...options },
  });
  const { freeBytes } = await host.call<StageStatus>('stageStatus');
  return { host, name, port, freeBytes };
}

export async function startStages<const Names extends string[]>(
  ...names: Names
): Promise<{ [K in keyof Names]: Stage }> {
  return (await Promise.all(names.map((name) => startStage(name)))) as { [K in keyof Names]: Stage };
}

/** What `migrate` takes: servers, or the proxies in front of them. */
export function via(...servers: { port: number }[]): { via: string[] } {
  return { via: servers.map(({ port }) => `127.0.0.1:${port}`) };
}

/** Two servers for a scatter mode, none for the others. */
export async function serversOf(mode: string): Promise<Stage[]> {
  return mode.startsWith('scatter') ? startStages('i', 'j') : [];
}

/** What `migrate` takes for a mode with these. */
export function through(servers: Stage[]): { via?: string[] } {
  return servers.length > 0 ? via(...servers) : {};
}

export function stageStatus({ host }: Stage): Promise<StageStatus> {
  return host.call('stageStatus');
}

/** No image, and its memory is free again: dissolving is told by nobody, so it is waited for. */
export async function expectEmpty(stage: Stage, boundMs = 20_000): Promise<void> {
  for (const end = performance.now() + boundMs; ; await pause(LOOK_AGAIN_MS)) {
    const { images, held, freeBytes } = await stageStatus(stage);
    if (images === 0 && freeBytes === stage.freeBytes) return;
    if (performance.now() > end) {
      throw new Error(
        `${stage.name} holds ${JSON.stringify(held)}, ${freeBytes} of ${stage.freeBytes} bytes free`,
      );
    }
  }
}

export function migrate(
  host: Host,
  port: number,
  options: object = {},
  args: { key?: string; guest?: string; abortable?: boolean } = {},
): Promise<void> {
  const { guest = 'g', ...rest } = args;
  return host.call('migrate', {
    guest,
    ...rest,
    options: { to: { host: '127.0.0.1', port }, secret: SECRET, ...options },
  });
}

export function done(host: Host, key = 'main', boundMs?: number): Promise<Settled<Report>> {
  return host.call('done', { key }, boundMs);
}

/** The report; a failure is thrown with its code. */
export async function report(host: Host, key = 'main', boundMs?: number): Promise<Report> {
  const result = await done(host, key, boundMs);
  if (!result.ok) throw new Error(`${result.error.code}: ${result.error.message}`);
  return result.value;
}

/** The error, which must have come within the bound. */
export async function failure(host: Host, key = 'main', boundMs?: number) {
  const result = await done(host, key, boundMs);
  if (result.ok) throw new Error('the migration should have failed, and did not');
  return result.error;
}

/** Every byte is what the journal says. */
export async function expectIntact(host: Host, guest = 'g'): Promise<Check> {
  const check = await host.call<Check>('check', { guest });
  expect(check.wrong).toEqual([]);
  expect(check.pages).toBeGreaterThan(0);
  return check;
}

/**
 * The guest writes here, now. It says so itself: asked again and again what it has written, its thread may do nothing but
 * answer (Node takes one message after the other before it looks at timers), most easily where there is one processor.
 */
export async function expectRuns(host: Host, guest = 'g'): Promise<void> {
  await expectIntact(host, guest);
  await host.call('untilWrites', { guest });
}

export async function expectStands(host: Host, guest = 'g'): Promise<void> {
  expect((await host.call<Status>('status', { guest })).runs).toBe(false);
}

/** No two of the times during which the guest ran, on any host, overlap: there never were two owners. */
export async function expectOneOwner(where: Host[], guest = 'g'): Promise<void> {
  const intervals = (
    await Promise.all(
      where.map(async (host) => {
        const { intervals } = await host.call<Status>('status', { guest });
        return intervals.map(([first, last]) => ({ host: host.name, first, last }));
      }),
    )
  )
    .flat()
    .sort((a, b) => (a.first < b.first ? -1 : 1));
  expect(intervals.length).toBeGreaterThan(0);
  for (const [index, interval] of intervals.slice(1).entries()) {
    const before = intervals[index] as (typeof intervals)[number];
    if (before.last >= interval.first) {
      throw new Error(`${before.host} still wrote when ${interval.host} did already`);
    }
  }
}

/** Sockets, userfaultfds, registered mappings, native threads and open files are again what they were. */
export async function expectNothingLeft(host: Host, before: Inventory, boundMs = 20_000): Promise<void> {
  expect(await heldAgain(host, before, boundMs)).toEqual(held(before));
}
