/**
 * A VMD server's memory never exceeds its cap, checked against what the kernel says its process has, beyond that of an
 * idle one: while it is filled to the last page, and while execution states as large as its memory come, are refused,
 * are replaced and are claimed at once. Whatever it took in comes back to the byte.
 */
import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { ArrivingGuest, Guest } from '../../src/guest.js';
import { type ParkTicket, park, Region, unpark } from '../../src/index.js';
import { command, forEachTest } from '../support/command-line.js';
import { randomFrom } from '../support/random.js';

const place = forEachTest();
const MIB = 2 ** 20;
const MEMORY_MIB = 192;
/** Node's own, however much it has to do: garbage between two collections, and the buffers of connections. */
const SPARE_MIB = 80;

const random = (bytes: number, seed: number): Uint8Array => {
  const next = randomFrom(seed);
  const words = Uint32Array.from({ length: bytes / 4 }, () => next() * 2 ** 32);
  return new Uint8Array(words.buffer);
};

function guestOf(name: string, memory: Uint8Array, state: Uint8Array): Guest {
  const region = Region.allocate({ lengthBytes: memory.length });
  (region.views[0] as Uint8Array).set(memory);
  return {
    name,
    module: null,
    regions: [{ name: 'memory', region }],
    pause: async () => state,
    unpause: () => {},
  };
}

/** Of the process, in MiB: now, and the most that it has had. */
function resident(pid: number): { now: number; most: number } {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8');
  const of = (what: string) => Number(new RegExp(`^${what}:\\s+(\\d+) kB$`, 'm').exec(status)?.[1]) / 1024;
  return { now: of('VmRSS'), most: of('VmHWM') };
}

test('pages and execution states stay below the cap', { timeout: 180_000 }, async () => {
  const flags = ['stage', '--listen', '127.0.0.1:0', '--memory', `${MEMORY_MIB}Mi`, '--no-announce'];
  const server = command(...flags, '--secret-file', place.secretFile);
  const { port } = await server.next('listening');
  const pid = server.child.pid as number;
  const idle = resident(pid).now;
  const mostMib = MEMORY_MIB + SPARE_MIB;
  const link = { secretFile: place.secretFile, via: [`127.0.0.1:${port}`] };
  const parked: { ticket: ParkTicket; memory: Uint8Array; state: Uint8Array }[] = [];
  /** Whether there was room for it. */
  const parks = async (seed: number, memoryBytes: number, stateBytes: number) => {
    const [memory, state] = [random(memoryBytes, seed), random(stateBytes, seed + 1)];
    try {
      const { ticket } = await park(guestOf(`guest ${seed}`, memory, state), link);
      parked.push({ ticket, memory, state });
      return true;
    } catch (error) {
      expect(error).toMatchObject({ code: 'VMD_CAPACITY' });
      return false;
    }
  };
  // Twelve states at once: together as much again as the server has.
  const had = await Promise.all(Array.from({ length: 12 }, (_, at) => parks(2 * at, 4 * MIB, 32 * MIB)));
  expect(had).toContain(true);
  expect(had).toContain(false);
  // And the rest in pages.
  for (let mib = 64, seed = 100; mib > 0; seed += 2) {
    if (!(await parks(seed, mib * MIB, 64))) mib >>= 1;
  }
  expect(resident(pid).now - idle, 'it is full').toBeGreaterThan(MEMORY_MIB * 0.9);
  expect(resident(pid).most - idle).toBeLessThan(mostMib);
  // All of them leave at once.
  await Promise.all(
    parked.map(async ({ ticket, memory, state }) => {
      let prepared: Uint8Array | null = null;
      let region: Region | null = null;
      const { secretFile } = place;
      const accept = ({ regions }: { regions: readonly { lengthBytes: number }[] }): ArrivingGuest => {
        region = Region.allocate({ lengthBytes: regions[0]?.lengthBytes ?? 0 });
        const prepare = async (bytes: Uint8Array) => {
          prepared = Uint8Array.from(bytes);
        };
        return { regions: [region], prepare, resume() {}, abandon() {} };
      };
      await using arrived = await unpark(ticket, { secretFile, accept });
      await arrived.complete;
      expect(Buffer.compare(prepared ?? Buffer.alloc(0), state)).toBe(0);
      expect(Buffer.compare((region as unknown as Region).views[0] as Uint8Array, memory)).toBe(0);
    }),
  );
  expect(resident(pid).most - idle).toBeLessThan(mostMib);
  await expect.poll(() => resident(pid).now - idle, { timeout: 20_000 }).toBeLessThan(SPARE_MIB);
});
