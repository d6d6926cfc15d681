/** The guests of the evaluation, made at the source and taken in at the destination, by kind. */
import { type ArrivingGuest, type Guest, type GuestOffer, Region } from 'memferry';
import { WritingGuest } from '../support/guest-writer.js';
import { fillRandom, fillShared } from '../support/memory.js';
import { fillTable } from './key-value.js';
import { ServingGuest } from './serving-guest.js';

export interface GuestSpec {
  /** `idle`: random bytes that nobody touches. `busy`: overwrites its pages. `serving`: answers queries. */
  kind: 'idle' | 'busy' | 'serving';
  lengthBytes: number;
  /** Busy guests. */
  writerBytesPerSecond: number;
  /** Serving guests: where they listen, on either side's address. */
  port: number;
  /** Pages in a thousand that every guest with this has alike; without it none. */
  alike?: number;
}

/** Started, with its memory filled. */
export async function makeGuest(spec: GuestSpec, host: string, name: string, seed: number): Promise<Guest> {
  const { kind, lengthBytes } = spec;
  const region = Region.allocate({ lengthBytes });
  for (const [index, view] of region.views.entries()) {
    if (kind === 'serving') fillTable(view.buffer);
    else if (spec.alike === undefined) fillRandom(view.buffer, seed * 16 + index + 1);
    else fillShared(view.buffer, region.pageSize, { seed: index + 1, ownSeed: seed, alike: spec.alike });
  }
  const regions = [{ name: 'heap', region }];
  if (kind === 'busy') {
    const guest = new WritingGuest(region, spec.writerBytesPerSecond);
    await guest.writing();
    return guest;
  }
  if (kind === 'idle') {
    return { name, module: null, regions, pause: async () => new Uint8Array(0), unpause: () => {} };
  }
  const serving = await ServingGuest.start(region, host, spec.port);
  serving.serve();
  return {
    name,
    module: null,
    regions,
    pause: async () => ({ state: new Uint8Array(0), pausedAtNs: await serving.stop() }),
    unpause: () => serving.serve(),
    departed: () => serving.leave(),
  };
}

/**
 * Makes ready for a guest, as a host does that knows what is coming: the worker that will serve is not started in the
 * middle of the migration. Gives what `listen` is to make of an offer; the first one gets what was made ready.
 */
export async function makeReady(
  spec: GuestSpec,
  host: string,
): Promise<(offer: GuestOffer) => Promise<ArrivingGuest>> {
  let ready = spec.kind === 'serving' ? await makeVessel(spec, host, [spec.lengthBytes]) : null;
  return async (offer) => {
    const vessel =
      ready ??
      (await makeVessel(
        spec,
        host,
        offer.regions.map(({ lengthBytes }) => lengthBytes),
      ));
    ready = null;
    return arriving(spec, vessel);
  };
}

interface Vessel {
  regions: Region[];
  serving: ServingGuest | null;
}

async function makeVessel(spec: GuestSpec, host: string, lengths: readonly number[]): Promise<Vessel> {
  const regions = lengths.map((lengthBytes) => Region.allocate({ lengthBytes }));
  const region = regions[0];
  if (region === undefined) throw new Error('a guest without memory');
  const serving = spec.kind === 'serving' ? await ServingGuest.start(region, host, spec.port) : null;
  return { regions, serving };
}

function arriving(spec: GuestSpec, { regions, serving }: Vessel): ArrivingGuest {
  const region = regions[0] as Region;
  return {
    regions,
    prepare: async () => {},
    resume: () => {
      serving?.serve();
      if (spec.kind === 'busy') new WritingGuest(region, spec.writerBytesPerSecond);
    },
    abandon: () => {
      for (const one of regions) one.close();
    },
  };
}
