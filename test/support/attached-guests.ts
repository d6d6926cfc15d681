/** Guests whose memory belongs to other processes, moved from one such process to another by this one. */
import { expect } from 'vitest';
import {
  type Arrival,
  type Guest,
  type GuestOffer,
  type Listening,
  type ListenOptions,
  listen,
  type MigrateOptions,
  migrate,
  type Region,
  stage,
} from '../../lib/index.js';
import { endOwners, features, MemoryOwner, type OwnerKind } from './memory-owner.js';

/** Closed after the test, the last first. */
export const open: { close(): unknown }[] = [];

export async function closeAll(): Promise<void> {
  for (const each of open.splice(0).reverse()) await each.close();
  endOwners();
}

export const pages = 4096;
export const tracked = features.missingShmem | features.wpShmem | features.wpUnpopulated | features.wpAsync;

export interface Source {
  owner: MemoryOwner;
  guest: Guest;
  region: Region;
  /** What it held when it was paused. */
  paused: Buffer | null;
}

export async function source(kind: Partial<OwnerKind>, writes = true): Promise<Source> {
  const owner = await MemoryOwner.start({ pages, shared: true, features: tracked, ...kind });
  await owner.ask(`fill 7 ${pages / 2}`);
  const region = owner.attach();
  const made: Source = {
    owner,
    region,
    paused: null,
    guest: {
      name: 'g',
      regions: [{ name: 'ram', region }],
      module: null,
      async pause() {
        await owner.ask('stop');
        made.paused = await owner.content();
        return new TextEncoder().encode('state');
      },
      unpause() {
        void owner.ask('run 3');
      },
    },
  };
  if (writes) await owner.ask('run 1');
  open.push({ close: () => region.close() });
  return made;
}

export interface Destination {
  owner: MemoryOwner;
  port: number;
  arrival: Promise<Arrival>;
  resumed: Promise<void>;
  abandoned: Promise<void>;
  region: () => Region | null;
}

export async function destination(
  kind: Partial<OwnerKind>,
  options: Omit<ListenOptions, 'accept'> = {},
): Promise<Destination> {
  const owner = await MemoryOwner.start({ pages, shared: true, features: features.missingShmem, ...kind });
  let region: Region | null = null;
  let resume = () => {};
  let abandon = () => {};
  const resumed = new Promise<void>((resolve) => (resume = resolve));
  const abandoned = new Promise<void>((resolve) => (abandon = resolve));
  const listening: Listening = await listen({
    ...options,
    accept: (_offer: GuestOffer) => {
      region = owner.attach();
      return { regions: [region], async prepare() {}, resume, abandon };
    },
  });
  open.push(listening);
  const arrival = (async () => {
    for await (const each of listening) return each;
    throw new Error('nothing came');
  })();
  arrival.catch(() => {});
  return { owner, port: listening.port, arrival, resumed, abandoned, region: () => region };
}

export async function move(from: Source, to: Destination, options: Partial<MigrateOptions> = {}) {
  const migration = migrate(from.guest, {
    to: `127.0.0.1:${to.port}`,
    verify: true,
    ...options,
  } as MigrateOptions);
  migration.done.catch(() => {});
  migration.evicted.catch(() => {});
  return migration;
}

/** It runs there; or why it does not. */
export function resumed(to: Destination, migration: Awaited<ReturnType<typeof move>>): Promise<unknown> {
  return Promise.race([to.resumed, migration.done.then(() => to.resumed)]);
}

export async function expectSame(from: Source, to: Destination) {
  const here = await to.owner.content();
  expect(here.length).toBe(pages * 4096);
  expect(Buffer.compare(here, from.paused as Buffer)).toBe(0);
}

/** It arrives whole while everything of it is touched at once, and its owner runs on there. */
export async function expectArrives(
  from: Source,
  to: Destination,
  migration: Awaited<ReturnType<typeof move>>,
) {
  await resumed(to, migration);
  const arrival = await to.arrival;
  const over = Promise.all([migration.done, arrival.complete]);
  // From wherever it comes; or waits for ever for what is lost.
  await Promise.race([expectSame(from, to), over.then(() => new Promise(() => {}))]);
  const [report, summary] = await over;
  expect(report.verified).toBe(true);
  expect(summary).toMatchObject({ guest: 'g', verified: true });
  await to.owner.ask('run 5');
  await to.owner.ask('stop');
}

/** VMD servers, by address. */
export async function servers(count: number): Promise<string[]> {
  const addresses: string[] = [];
  for (let i = 0; i < count; i++) {
    const server = await stage({ memoryBytes: 64 * 2 ** 20 });
    open.push(server);
    addresses.push(`127.0.0.1:${server.port}`);
  }
  return addresses;
}
