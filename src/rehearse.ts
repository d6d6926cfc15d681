/**
 * `rehearse`: a whole small migration through a VMD server, all of it in this process, before the one that counts. The
 * first migration of a process otherwise compiles, loads and allocates on its way what later ones find ready; on a host
 * that gets little CPU time this takes longer than all the rest until its guest can move.
 */
import { randomBytes } from 'node:crypto';
import { loadAddon } from './addon.js';
import { listen } from './destination/listen.js';
import type { Guest } from './guest.js';
import { within } from './protocol/bounded.js';
import { Region } from './region.js';
import { migrate } from './source/migrate.js';
import { stage } from './staging/server.js';

/** Whatever keeps it from ending will keep a real migration from it too, and that one tells. */
const boundMs = 15_000;
const stageBytes = 16 * 2 ** 20;
const guestPages = 64;

let rehearsal: Promise<void> | null = null;

/**
 * Plays a migration through, over loopback: source, destination and VMD server in this process, a guest of 64 pages.
 * About 0.2 s of CPU time, once: further calls give the first one's promise. For a process that is to send, to receive
 * or to take part soon and has time now. It never rejects; where a migration is not possible it does nothing.
 */
export function rehearse(): Promise<void> {
  rehearsal ??= within(play(), boundMs, 'CANCELLED', 'the rehearsal takes too long').catch(() => {});
  return rehearsal;
}

async function play(): Promise<void> {
  const signal = AbortSignal.timeout(boundMs);
  const secret = Uint8Array.from(randomBytes(32));
  const here = { host: '127.0.0.1', port: 0, secret };
  await using server = await stage({ ...here, memoryBytes: stageBytes });
  await using destination = await listen({ ...here, signal });
  const arrived = (async () => {
    for await (const arrival of destination) {
      await Promise.all([arrival.resumed, arrival.complete]);
      for (const region of arrival.regions) region.close();
      return;
    }
  })();
  arrived.catch(() => {});
  const region = Region.allocate({ lengthBytes: guestPages * loadAddon().pageSize });
  try {
    for (const view of region.views) view.fill(1);
    const guest: Guest = {
      name: 'rehearsal',
      module: null,
      regions: [{ name: 'memory', region }],
      pause: async () => new Uint8Array(0),
      unpause() {},
    };
    const to = { host: here.host, port: destination.port };
    await migrate(guest, { to, secret, signal, mode: 'scatter', via: [`${here.host}:${server.port}`] }).done;
    await arrived;
  } finally {
    region.close();
  }
}
