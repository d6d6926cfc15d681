/** What both sides have of a QEMU: its QMP connection, what it is made of, and its RAM as regions of this process. */
import { stat } from 'node:fs/promises';
import { fstatSync } from 'node:fs';
import { loadAddon } from '../addon.js';
import { memferryError, native } from '../errors.js';
import { closeDescriptors } from '../fd-channel.js';
import type { GuestRegion } from '../guest.js';
import { Region } from '../region.js';
import { type Backend, inspect, type Machine } from './inspect.js';
import { matchMemory } from './match-memory.js';
import { type FilledFiles, filledFiles, requireMappedByNoOther } from './memory-users.js';
import type { Qmp } from './qmp.js';
import { connectTo } from './same-process.js';
import { Shim } from './shim.js';

/** How a QEMU is reached. */
export interface QemuSockets {
  /** The path of QEMU's QMP socket. */
  qmp: string;
  /** The path that QEMU was given as MEMFERRY_SHIM_SOCKET. */
  shim: string;
  /** Aborting it ends `QemuGuest.attach`; at a destination the listener's own counts. */
  signal?: AbortSignal | undefined;
}

export interface AttachOptions {
  /** Of the userfaultfd: asked for in this order, until QEMU's kernel has all of one. */
  features: readonly bigint[];
  /** What is in the memory is going to be discarded: no other process may have it. */
  discards?: boolean;
}

export class QemuAttachment {
  private constructor(
    readonly qmp: Qmp,
    readonly machine: Machine,
    /** In the order of the machine's backends, named as these. */
    readonly regions: readonly GuestRegion[],
    readonly process: { readonly pid: number; alive(): boolean; end(): void },
    readonly uid: number,
  ) {}

  static async open(sockets: QemuSockets, options: AttachOptions): Promise<QemuAttachment> {
    const { signal } = sockets;
    // It serves one at a time, and not for long: asked who it is now, and for the memory when that is known to be right.
    const { pid, uid } = await Shim.identify(sockets.shim);
    const qmp = await connectTo(sockets.qmp, { pid, uid }, { signal });
    try {
      const machine = await inspect(qmp, { signal });
      const { owner, regions, filled } = await takeHold(
        sockets.shim,
        pid,
        machine.backends,
        options.features,
      );
      const attachment = new QemuAttachment(qmp, machine, regions, owner, uid);
      if (options.discards) {
        await requireMappedByNoOther(filled, pid).catch(async (error) => {
          await attachment.close();
          throw error;
        });
      }
      return attachment;
    } catch (error) {
      await qmp.close();
      throw error;
    }
  }

  get pid(): number {
    return this.process.pid;
  }

  /** Another QMP connection to the same QEMU. */
  reconnect(): Promise<Qmp> {
    return connectTo(this.qmp.path, { pid: this.pid, uid: this.uid });
  }

  async close(): Promise<void> {
    await this.qmp.close();
    for (const { region } of this.regions) {
      try {
        region.close();
      } catch {
        // Still moving: it is let go of by whoever moves it.
      }
    }
  }
}

interface Memory {
  regions: GuestRegion[];
  /** Of its files those in which something is. */
  filled: FilledFiles;
}

/** The shim does not wait for long: nothing is done here that takes its time. */
async function takeHold(
  path: string,
  pid: number,
  backends: readonly Backend[],
  features: readonly bigint[],
) {
  using shim = await Shim.connect(path);
  if (shim.pid !== pid) throw memferryError('OWNER_GONE', `QEMU (process ${pid}) ended meanwhile`);
  const owner = native(() => loadAddon().holdProcess(shim.pidfd));
  return { owner, ...(await attachMemory(shim, backends, features)) };
}

async function attachMemory(
  shim: Shim,
  backends: readonly Backend[],
  features: readonly bigint[],
): Promise<Memory> {
  const { mappings, files } = await shim.memory();
  const descriptors = [...files];
  const made: GuestRegion[] = [];
  try {
    const paths = new Map<string, number>();
    for (const { id, memPath } of backends) {
      const file = memPath === null ? null : await fileOf(memPath, files);
      if (file !== null) paths.set(id, file);
    }
    const found = matchMemory(backends, mappings, ({ id }) => paths.get(id) ?? null);
    const uffd = await firstUserfaultfd(shim, features);
    descriptors.push(uffd);
    for (const { id, pieces, file } of found) {
      const region = Region.attach({
        pidfd: shim.pidfd,
        uffd,
        mappings: pieces,
        memory: files[file] as number,
      });
      made.push({ name: id, region });
    }
    const filled = filledFiles(found.map(({ id, file }) => ({ id, descriptor: files[file] as number })));
    return { regions: made, filled };
  } catch (error) {
    for (const { region } of made) region.close();
    throw error;
  } finally {
    closeDescriptors(descriptors);
  }
}

/** Which of QEMU's files a path names; null where it is a directory, or names none of them. */
async function fileOf(path: string, files: readonly number[]): Promise<number | null> {
  const named = await stat(path).catch(() => null);
  if (!named?.isFile()) return null;
  const at = files.findIndex((fd) => {
    const status = fstatSync(fd);
    return status.dev === named.dev && status.ino === named.ino;
  });
  return at < 0 ? null : at;
}

async function firstUserfaultfd(shim: Shim, features: readonly bigint[]): Promise<number> {
  let reason: unknown = memferryError('USERFAULTFD_UNAVAILABLE', 'no features to ask for');
  for (const wanted of features) {
    try {
      return await shim.userfaultfd(wanted);
    } catch (error) {
      reason = error;
    }
  }
  throw reason;
}
