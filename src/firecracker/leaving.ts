/**
 * A microVM as a guest that leaves: one that runs (a fork that tracks writes by its userfaultfd), or a snapshot on files.
 * Both are one region, `memory`, and Firecracker's own snapshot file as the execution state.
 */
import { mkdtemp, readFile, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout } from 'node:timers/promises';
import { z } from 'zod';
import { checkCallbacks, checkRegion } from '../check-options.js';
import { memferryError, nativeAsync } from '../errors.js';
import type { Guest } from '../guest.js';
import { callback, label, parse } from '../options/fields.js';
import { untilAborted } from '../protocol/bounded.js';
import { Region } from '../region.js';
import type { FirecrackerApi } from './api.js';

const resumeAgainMs = 200;

/** How a running microVM is stopped and started; `firecrackerControl` does it by Firecracker's API. */
export interface MicroVmControl {
  /** No virtual CPU runs and no device writes from here on. Gives the execution state. */
  pause(options: { signal: AbortSignal }): Promise<Uint8Array>;
  /** It runs on here: the migration failed before the commit. */
  unpause(): Promise<void>;
  /** Its guest belongs to the destination; its memory here is not needed any more: end it. */
  release?(): Promise<void> | void;
}

/** A microVM that runs, as `migrate` and `park` take it. `region`: of `MicroVm.toRegion`. @throws INVALID_ARGUMENT */
export function microVmGuest(name: string, region: Region, control: MicroVmControl): Guest {
  parse(label, name, 'microVmGuest.name');
  checkRegion(region, 'microVmGuest.region');
  const { pause, unpause, release } = Object(control) as Partial<MicroVmControl>;
  if (typeof pause !== 'function' || typeof unpause !== 'function')
    throw memferryError('INVALID_ARGUMENT', 'microVmGuest.control: it has pause() and unpause()');
  checkCallbacks('microVmGuest.control', { release });
  return {
    name,
    module: null,
    regions: [{ name: 'memory', region }],
    pause: (options) => control.pause(options),
    unpause: () => control.unpause(),
    release: () => control.release?.(),
  };
}

const controlSchema = z.strictObject({
  directory: z.string().min(1).optional(),
  release: callback().optional(),
});

/** By Firecracker's API. The state comes by a file in a directory that Firecracker may write too. @throws INVALID_ARGUMENT */
export function firecrackerControl(
  api: FirecrackerApi,
  options: { directory?: string; release?: () => Promise<void> | void } = {},
): MicroVmControl {
  const { pause: pausing, resume, createSnapshot } = Object(api) as Partial<FirecrackerApi>;
  if ([pausing, resume, createSnapshot].some((call) => typeof call !== 'function'))
    throw memferryError('INVALID_ARGUMENT', 'firecrackerControl.api: expected a FirecrackerApi');
  parse(controlSchema, options, 'firecrackerControl');
  // One that was cancelled lets the microVM run again: it must not do so under the next one's feet.
  let before: Promise<unknown> = Promise.resolve();
  const after = <T>(turn: Promise<T>): Promise<T> => {
    before = Promise.allSettled([before, turn]);
    return turn;
  };
  const pause = async (last: Promise<unknown>, signal: AbortSignal) => {
    await untilAborted(last, signal);
    // Before it stands: what fails here costs nothing.
    const folder = await mkdtemp(join(options.directory ?? tmpdir(), 'memferry-microvm-'));
    try {
      const path = join(folder, 'state');
      // It may stand although the answer was lost or nobody waited for it.
      await api.pause(signal);
      await api.createSnapshot(path, null, signal);
      return await readFile(path);
    } catch (error) {
      await resumed(api).catch((cause) => {
        process.emitWarning(`the microVM may stand: it could not be resumed: ${String(cause)}`, {
          code: 'MEMFERRY_RESUME_THREW',
        });
      });
      throw error;
    } finally {
      await rm(folder, { recursive: true, force: true }).catch(() => {});
    }
  };
  return {
    pause: ({ signal }) => after(pause(before, signal)),
    unpause: () => after(resumed(api)),
    ...(options.release ? { release: options.release } : {}),
  };
}

/** Once more after a moment: a request that was given up may still be under way there. */
async function resumed(api: FirecrackerApi): Promise<void> {
  try {
    await api.resume();
  } catch {
    await setTimeout(resumeAgainMs);
    await api.resume();
  }
}

const filesSchema = z.strictObject({ memory: z.string().min(1), state: z.string().min(1) });

/**
 * A snapshot on files as a guest: `park(await snapshotGuest(...), ...)` puts it into the VMD. It is read into memory
 * first; `close` the region after.
 * @throws INVALID_ARGUMENT (not whole pages), SYSTEM, NO_MEMORY
 */
export async function snapshotGuest(
  name: string,
  files: { memory: string; state: string },
): Promise<Guest & Disposable> {
  parse(label, name, 'snapshotGuest.name');
  parse(filesSchema, files, 'snapshotGuest.files');
  const [state, { size }] = await Promise.all([readFile(files.state), stat(files.memory)]).catch((cause) => {
    throw memferryError('SYSTEM', `the snapshot cannot be read: ${(cause as Error).message}`, { cause });
  });
  const region = Region.allocate({ lengthBytes: size });
  try {
    const got = await nativeAsync(() => region.native.fill(files.memory, 0, 0, region.pages));
    if (got !== size) throw memferryError('SYSTEM', `${files.memory}: ${got} of ${size} bytes could be read`);
  } catch (error) {
    region.close();
    throw error;
  }
  return {
    name,
    module: null,
    regions: [{ name: 'memory', region }],
    pause: async () => state,
    unpause: () => {},
    [Symbol.dispose]: () => region.close(),
  };
}
