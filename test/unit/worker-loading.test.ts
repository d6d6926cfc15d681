/** A worker that is ended while it loads its modules: Node would keep the files open that it was reading. */
import { readdirSync, readlinkSync } from 'node:fs';
import { setTimeout as rest } from 'node:timers/promises';
import { expect, test } from 'vitest';
import { WorkerLink } from '../../lib/worker/worker-link.js';

const url = new URL('../../lib/demo/sqlite-guest.js', import.meta.url).href;
const events = { message() {}, shape() {}, trapped: () => null, ended() {} };
const boot = {
  ...{ url, name: 'g', workers: 1, worker: 0, data: null },
  ...{ sharedHeap: [], sharedMemory: null, plan: null },
};

/** Modules that this process has open. */
function modules(): string[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const path = readlinkSync(`/proc/self/fd/${fd}`);
      return /\.[cm]?js$|\.wasm$/.test(path) ? [path] : [];
    } catch {
      return []; // the one that lists them
    }
  });
}

test('leaves no file open, whenever it is', async () => {
  const before = modules().length;
  for (let ms = 0; ms < 120; ms += 12) {
    const ending = new AbortController();
    const started = WorkerLink.start(boot, events, undefined, ending.signal);
    await rest(ms);
    ending.abort();
    const link = await started.catch((error: Error) => error);
    if (link instanceof WorkerLink) await link.stop(new Error('it had started'));
    else expect(link.message).toBe('the start was cancelled');
  }
  expect(modules().length).toBe(before);
}, 60_000);

test('and one that never loads ends all the same', async () => {
  const ending = new AbortController();
  const endless = `data:text/javascript,${encodeURIComponent('await new Promise((resolve) => setInterval(resolve.bind, 1e6))')}`;
  const started = WorkerLink.start({ ...boot, url: endless }, events, undefined, ending.signal);
  await rest(300);
  ending.abort();
  await expect(started).rejects.toThrow('the start was cancelled');
}, 20_000);
