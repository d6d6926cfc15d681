/**
 * A destination under memory pressure: a memory cgroup with compressed swap, a neighbour that thrashes in it, and
 * a quota of CPU time, which stands for a swap device slower than memory. Processes of the host run in `place`.
 */
import { join } from 'node:path';
import { floorsDirectory } from '../support/paths.js';
import { type Place, type Server, startServer } from '../support/processes.js';
import { Cgroup, cgroupObstacle } from './cgroups.js';
import { CompressedSwap, swapObstacle } from './compressed-swap.js';
import type { Host } from './namespaces.js';

export interface Pressure {
  /** Of everything on the host; null: no limit. */
  memoryBytes: number | null;
  /** The neighbour's memory; 0: no neighbour. */
  thrashBytes: number;
  /** CPU seconds a second of who receives; null: no limit. */
  cpuShare: number | null;
}

/** What a process that receives holds besides the guest: Node, and the engine's buffers. */
export const receiverBytes = 32 * 2 ** 20;

/**
 * The neighbour takes memory, and not the CPU time that the other hosts of the lab need. Its quota is its own: one that
 * it shared with the receiver would give the more to whoever has more threads.
 */
const thrashPagesPerSecond = 5000;
const thrashCpuShare = 0.15;
const parts = { receiver: 'receiver', neighbour: 'neighbour' };

export function pressureObstacle(): string | null {
  return cgroupObstacle() ?? swapObstacle();
}

export class PressuredHost implements Disposable {
  readonly place: Place;
  readonly #cgroup: Cgroup;
  readonly #swap: CompressedSwap;
  #neighbour: Server | null = null;

  private constructor(
    readonly host: Host,
    cgroup: Cgroup,
    swap: CompressedSwap,
  ) {
    this.#cgroup = cgroup;
    this.#swap = swap;
    this.place = { namespace: host.namespace, cgroups: cgroup.procsFiles(parts.receiver) };
  }

  /** `swapBytes`: all that may ever be swapped out at once. */
  static open(host: Host, swapBytes: number): PressuredHost {
    // In this order: at the process's end the group's members go before the swap does.
    const cgroup = Cgroup.open('destination', Object.values(parts));
    try {
      return new PressuredHost(host, cgroup, CompressedSwap.open(swapBytes));
    } catch (error) {
      cgroup.close();
      throw error;
    }
  }

  /** While nothing but the neighbour runs here. */
  async apply({ memoryBytes, thrashBytes, cpuShare }: Pressure): Promise<void> {
    await this.release();
    this.#cgroup.limitMemory(memoryBytes);
    if (thrashBytes > 0) {
      const args = ['--bytes', String(thrashBytes), '--pages-per-second', String(thrashPagesPerSecond)];
      this.#neighbour = await startServer(join(floorsDirectory, 'thrash'), args, {
        cgroups: this.#cgroup.procsFiles(parts.neighbour),
      });
    }
    // Only now: what the neighbour fills its memory with takes CPU time.
    this.#cgroup.limitCpu(parts.neighbour, thrashCpuShare);
    this.#cgroup.limitCpu(parts.receiver, cpuShare);
  }

  async release(): Promise<void> {
    for (const part of Object.values(parts)) this.#cgroup.limitCpu(part, null);
    this.#cgroup.limitMemory(null);
    await this.#neighbour?.stop();
    this.#neighbour = null;
  }

  close(): void {
    this.#cgroup.close();
    this.#swap.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}
