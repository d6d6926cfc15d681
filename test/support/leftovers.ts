/** What a host process holds that a migration may have left behind. */
import { setTimeout as pause } from 'node:timers/promises';
import type { Host } from './host.js';

export interface Inventory {
  descriptors: Record<string, number>;
  registered: number;
  threads: Record<string, number>;
}

/** The threads that Node itself starts when it likes. */
const NODE_THREADS = /^(node|libuv-worker|DelayedTaskSche|V8Worker|node-.*|MainThread|SignalInspector)$/;

/** Sockets, userfaultfds, mappings that one is registered on, native threads and open files. */
export function held({ descriptors, registered, threads }: Inventory): object {
  const ours = Object.entries(threads).filter(([name]) => !NODE_THREADS.test(name));
  const { socket = 0, 'anon_inode:[userfaultfd]': pagers = 0 } = descriptors;
  const files = Object.entries(descriptors).filter(
    ([kind]) => kind.startsWith('/') && !kind.startsWith('/dev/'),
  );
  return {
    sockets: socket,
    pagers,
    registered,
    threads: Object.fromEntries(ours),
    files: Object.fromEntries(files),
  };
}

export function inventory(host: Host): Promise<Inventory> {
  return host.call<Inventory>('inventory');
}

/** Between two looks at what is waited for: who looks without a pause takes the processor from who is waited for. */
export const LOOK_AGAIN_MS = 10;

/**
 * What the host holds now, once it is what it was `before`, or when the bound has passed: what ends in the
 * background (a socket's close) is waited for.
 */
export async function heldAgain(host: Host, before: Inventory, boundMs: number): Promise<object> {
  const wanted = JSON.stringify(held(before));
  for (const end = performance.now() + boundMs; ; await pause(LOOK_AGAIN_MS)) {
    const now = held(await inventory(host));
    if (JSON.stringify(now) === wanted || performance.now() > end) return now;
  }
}
