/**
 * A migration without an engine, inside one process: pause, copy every region's bytes, prepare, resume. What
 * lies in a worker's WebAssembly memory is reached through /proc/self/mem, as the main thread has no view of it.
 */
import { closeSync, openSync, readFileSync, readSync, writeSync } from 'node:fs';

import type { GuestOffer } from '../../../lib/guest.js';
import type { Region } from '../../../lib/region.js';
import type { ArrivingWorkerGuest, WorkerGuest, WorkerGuestsOptions } from '../../../lib/worker/index.js';
import { workerGuests } from '../../../lib/worker/index.js';

export const guestModule = (file: string): URL => new URL(file, import.meta.url);
export const sqliteModule = new URL('../../../lib/demo/sqlite-guest.js', import.meta.url);

export function offerOf(guest: WorkerGuest): GuestOffer {
  return {
    name: guest.name,
    module: guest.module,
    // What a source sends arrives as JSON.
    description: JSON.parse(JSON.stringify(guest.description)),
    regions: guest.regions.map(({ name, region }) => ({
      name,
      lengthBytes: region.lengthBytes,
      capacityBytes: region.capacityBytes,
      pageSize: region.pageSize,
    })),
  };
}

/** Start addresses of the WebAssembly memories of this process: readable pages before gigabytes of guards. */
export function wasmMemories(): Map<number, number> {
  const found = new Map<number, number>();
  let before = null as { start: number; end: number } | null;
  for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
    const match = /^([0-9a-f]+)-([0-9a-f]+) (\S{4})/.exec(line);
    if (!match) continue;
    const [start, end] = [Number.parseInt(match[1] ?? '', 16), Number.parseInt(match[2] ?? '', 16)];
    const guard = match[3] === '---p' && end - start > 2 ** 32;
    if (guard && before?.end === start) found.set(before.start, before.end - before.start);
    before = match[3] === 'rw-p' ? { start, end } : null;
  }
  return found;
}

export interface Moved {
  arriving: ArrivingWorkerGuest;
  guest: WorkerGuest;
  state: Uint8Array;
}

/**
 * `meanwhile` runs when the destination is set up and the guest still runs at the source. `sourceMemories` is
 * what `wasmMemories` gave before the source was started.
 */
export async function moveByHand(
  source: WorkerGuest,
  options: WorkerGuestsOptions,
  before: ReadonlyMap<number, number>,
  meanwhile: () => Promise<void> = async () => {},
): Promise<Moved> {
  const ofSource = added(before, wasmMemories());
  const known = wasmMemories();
  const arriving = await workerGuests(options)(offerOf(source));
  const ofDestination = added(known, wasmMemories());
  await meanwhile();
  const state = await source.pause();
  for (const [index, { name, region }] of source.regions.entries()) {
    const target = arriving.regions[index] as Region;
    if (region.lengthBytes > target.lengthBytes) await arriving.grow(index, region.lengthBytes);
    if (region.views.length > 0) {
      region.views.forEach((view, i) => {
        target.views[i]?.set(view);
      });
    } else copy(name, only(ofSource, region), only(ofDestination, target), region.lengthBytes);
  }
  await arriving.prepare(state);
  source.departed();
  arriving.resume();
  await source.release();
  return { arriving, guest: arriving.guest, state };
}

function added(before: ReadonlyMap<number, number>, after: ReadonlyMap<number, number>): number[] {
  return [...after.keys()].filter((start) => !before.has(start));
}

/** The one memory among `starts` that is now as long as the region. */
function only(starts: number[], region: Region): number {
  const now = wasmMemories();
  const matching = starts.filter((start) => now.get(start) === region.lengthBytes);
  if (matching.length !== 1) {
    throw new Error(`${matching.length} of ${starts.length} memories have ${region.lengthBytes} bytes`);
  }
  return matching[0] as number;
}

function copy(name: string, from: number, to: number, lengthBytes: number): void {
  const memory = openSync('/proc/self/mem', 'r+');
  try {
    const piece = Buffer.alloc(2 ** 20);
    for (let at = 0; at < lengthBytes; at += piece.length) {
      const count = Math.min(piece.length, lengthBytes - at);
      if (readSync(memory, piece, 0, count, from + at) !== count) throw new Error(`${name}: short read`);
      if (writeSync(memory, piece, 0, count, to + at) !== count) throw new Error(`${name}: short write`);
    }
  } finally {
    closeSync(memory);
  }
}
