/**
 * A microVM of 1 GiB that is restored lazily by Firecracker's protocol: its faults at random, and one pass over all of
 * its memory, from a local file and from the VMD. The guest is a process of its own on both sides, and measures itself.
 * The floor answers each fault with one page that it reads from the file, or asks for in one round trip over loopback.
 *
 * The file is in the page cache on both sides. What arrives from the VMD on its own account is held down for the faults,
 * so that they are faults; for the pass it is not.
 */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { park, snapshotGuest, stage, type ParkTicket } from 'memferry';
import { loadAddon } from '../support/addon.js';
import { runFloor } from '../support/processes.js';
import { atLeast, atMostTimesFloor } from '../support/result.js';
import {
  makeSnapshot,
  randomTouches,
  sequentialRate,
  startFloor,
  startGuest,
  startHandler,
} from '../support/restored-guest.js';
import { paired, type Trial } from '../support/trial.js';

const bytes = 2 ** 30;
const touches = 20_000;
const secret = 'a secret of the benchmark alone';

export async function run(trial: Trial): Promise<void> {
  loadAddon();
  const folder = mkdtempSync(join(tmpdir(), 'memferry-restore-'));
  process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
  const socket = join(folder, 'socket');
  const snapshot = join(folder, 'memory');
  const state = join(folder, 'state');
  const ticketFile = join(folder, 'ticket');
  const secretFile = join(folder, 'secret');
  await makeSnapshot(snapshot, bytes);
  writeFileSync(state, 'the state is none of the guest of this trial');
  writeFileSync(secretFile, secret, { mode: 0o600 });

  /** One microVM, from its handler's start to its end. */
  const once = async <T>(
    handler: ReturnType<typeof startHandler>,
    ready: string | null,
    measure: (guest: Awaited<ReturnType<typeof startGuest>>) => Promise<T>,
  ): Promise<T> => {
    await (ready === null ? handler.next() : handler.until(ready));
    // The guest's memory is fresh: no hypervisor's own first touch of it is measured.
    await runFloor('back_memory', ['--bytes', (bytes * 5) / 4]);
    const guest = await startGuest(socket, bytes);
    try {
      if (ready === 'load') await handler.until('granted');
      return await measure(guest);
    } finally {
      await guest.end();
      await handler.end();
      rmSync(socket, { force: true });
    }
  };
  const floor = (remote: boolean, seed: number) =>
    once(startFloor(socket, snapshot, remote), null, (guest) => randomTouches(guest, touches, seed));
  const fromFile = <T>(measure: (guest: Awaited<ReturnType<typeof startGuest>>) => Promise<T>) =>
    once(startHandler(socket, ['--snapshot', snapshot]), 'listening', measure);
  const fromVmd = async <T>(
    flags: string[],
    measure: (guest: Awaited<ReturnType<typeof startGuest>>) => Promise<T>,
  ): Promise<T> => {
    const server = await stage({ secret, memoryBytes: 2 * bytes });
    try {
      using guest = await snapshotGuest('restore', { memory: snapshot, state });
      const { ticket }: { ticket: ParkTicket } = await park(guest, {
        secret,
        via: [`127.0.0.1:${server.port}`],
      });
      writeFileSync(ticketFile, JSON.stringify(ticket));
      const from = [
        '--from-vmd',
        ticketFile,
        '--state',
        `${state}.out`,
        '--secret-file',
        secretFile,
        ...flags,
      ];
      return await once(startHandler(socket, from), 'load', measure);
    } finally {
      await server.close();
    }
  };

  const rounds = trial.samples(5);
  const figures = { floor: [], remote: [], file: [], vmd: [], fileRate: [], vmdRate: [] } as Record<
    string,
    number[]
  >;
  for (let round = 0; round < rounds; round++) {
    figures['floor']?.push(await floor(false, round));
    figures['file']?.push(await fromFile((guest) => randomTouches(guest, touches, round)));
    figures['fileRate']?.push(await fromFile(sequentialRate));
    figures['remote']?.push(await floor(true, round));
    figures['vmd']?.push(
      await fromVmd(['--gather-limit', '1'], (guest) => randomTouches(guest, touches, round)),
    );
    figures['vmdRate']?.push(await fromVmd([], sequentialRate));
  }
  const of = (name: string): number[] => figures[name] as number[];
  const alone = (values: number[]) => values.map((value) => ({ value, floor: null }));
  trial.report('file-p50', 'us', paired(of('file'), of('floor')), atMostTimesFloor(1.25, "the floor's p50"));
  trial.report(
    'vmd-p50',
    'us',
    paired(of('vmd'), of('remote')),
    atMostTimesFloor(1.25, "the remote floor's p50"),
  );
  trial.report('file-sequential', 'GB/s', alone(of('fileRate')), atLeast(1, 'GB/s'));
  trial.report('vmd-sequential', 'GB/s', alone(of('vmdRate')), atLeast(1, 'GB/s'));
}
