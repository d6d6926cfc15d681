/**
 * A VMD server's memory never exceeds its cap, checked against what the kernel says its process has, beyond that of an
 * idle one: while it is filled to the last page, and while execution states as large as its memory come, are refused,
 * are replaced and are claimed at once. Whatever it took in comes back to the byte. And a server that was promised more
 * memory than there is takes what there is, instead of being killed with all that it holds.
 */
import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { ArrivingGuest, Guest } from '../../src/guest.js';
import { type ParkOptions, type ParkTicket, park, Region, unpark } from '../../src/index.js';
import { command, forEachTest } from '../support/command-line.js';
import { MemoryGroup, memoryGroupObstacle } from '../support/memory-group.js';
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

interface Parked {
  ticket: ParkTicket;
  memory: Uint8Array;
  state: Uint8Array;
}

/** Parks a guest of so many bytes; null: there was no room. */
async function parks(
  link: ParkOptions,
  seed: number,
  memoryBytes: number,
  stateBytes: number,
): Promise<Parked | null> {
  const [memory, state] = [random(memoryBytes, seed), random(stateBytes, seed + 1)];
  try {
    const { ticket } = await park(guestOf(`guest ${seed}`, memory, state), link);
    return { ticket, memory, state };
  } catch (error) {
    expect(error).toMatchObject({ code: 'VMD_CAPACITY' });
    return null;
  }
}

/** All at once; whatever was parked comes back to the byte. */
async function leave(parked: readonly Parked[]): Promise<void> {
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
}

test('pages and execution states stay below the cap', { timeout: 180_000 }, async () => {
  const flags = ['stage', '--listen', '127.0.0.1:0', '--memory', `${MEMORY_MIB}Mi`, '--no-announce'];
  const server = command(...flags, '--secret-file', place.secretFile);
  const { port } = await server.next('listening');
  const pid = server.child.pid as number;
  const idle = resident(pid).now;
  const mostMib = MEMORY_MIB + SPARE_MIB;
  const link = { secretFile: place.secretFile, via: [`127.0.0.1:${port}`] };
  const parked: Parked[] = [];
  const had = async (...sizes: [seed: number, memoryBytes: number, stateBytes: number]) => {
    const guest = await parks(link, ...sizes);
    if (guest) parked.push(guest);
    return guest !== null;
  };
  // Twelve states at once: together as much again as the server has.
  const states = await Promise.all(Array.from({ length: 12 }, (_, at) => had(2 * at, 4 * MIB, 32 * MIB)));
  expect(states).toContain(true);
  expect(states).toContain(false);
  // And the rest in pages.
  for (let mib = 64, seed = 100; mib > 0; seed += 2) {
    if (!(await had(seed, mib * MIB, 64))) mib >>= 1;
  }
  expect(resident(pid).now - idle, 'it is full').toBeGreaterThan(MEMORY_MIB * 0.9);
  expect(resident(pid).most - idle).toBeLessThan(mostMib);
  await leave(parked);
  expect(resident(pid).most - idle).toBeLessThan(mostMib);
  await expect.poll(() => resident(pid).now - idle, { timeout: 20_000 }).toBeLessThan(SPARE_MIB);
});

const obstacle = memoryGroupObstacle();
if (obstacle) console.warn(`skipped: a server in a control group: ${obstacle}`);
test.skipIf(obstacle !== null)(
  'a server that was promised more than its control group has refuses the rest, and lives',
  { timeout: 120_000 },
  async () => {
    using group = new MemoryGroup('stage', 256 * MIB);
    const flags = ['stage', '--listen', '127.0.0.1:0', '--memory', '2Gi', '--no-announce'];
    const server = command(...flags, '--secret-file', place.secretFile);
    group.join(server.child.pid as number);
    const { port } = await server.next('listening');
    const link = { secretFile: place.secretFile, via: [`127.0.0.1:${port}`] };
    const parked: Parked[] = [];
    for (let seed = 0; ; seed += 2) {
      const guest = await parks(link, seed, 24 * MIB, 64);
      if (!guest) break;
      parked.push(guest);
    }
    expect(parked.length).toBeGreaterThan(2);
    expect(parked.length).toBeLessThan(256 / 24);
    expect(server.child.exitCode ?? server.child.signalCode).toBeNull();
    await leave(parked);
    // There is room again.
    const again = await parks(link, 1000, 24 * MIB, 64);
    expect(again).not.toBeNull();
    if (again) await leave([again]);
    server.child.kill('SIGTERM');
    expect(await server.closed).toBe(0);
  },
);
