/**
 * A microVM that will never be granted. It may have all of the guest by then, paused: whoever resumed it would make two of
 * it, as soon as the guest runs on where it was. So its process is ended, by its host or from here.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { loadAddon } from '../addon.js';
import { memferryError, native } from '../errors.js';
import type { FirecrackerHost } from './arriving.js';
import type { Greeted } from './greet.js';

const killTimeoutMs = 5_000;

/** Firecracker's process, once it has connected. Null where it is not visible; then it is given no page. */
export class Held {
  #process: { pid: number; alive(): boolean; end(): void } | null = null;

  /** @throws OWNER_GONE, SYSTEM */
  take({ connection }: Greeted): void {
    const { pidfd } = connection.peer;
    if (pidfd !== null) this.#process = native(() => loadAddon().holdProcess(pidfd));
  }

  /** It is the guest's owner from here on. */
  release(): void {
    this.#process = null;
  }

  /** @throws SYSTEM: it does not end; and what the host throws */
  async giveUp(host: FirecrackerHost): Promise<void> {
    if (host.abandon) return await host.abandon();
    const held = this.#process;
    if (held?.alive()) held.end();
    for (const until = performance.now() + killTimeoutMs; held?.alive(); await sleep(10)) {
      if (performance.now() < until) continue;
      throw memferryError(
        'SYSTEM',
        `Firecracker (process ${held.pid}) does not end; its guest must never run`,
      );
    }
  }
}
