/** Moves of a microVM that follow one another: what a cancelled one puts back comes before the next one's pause. */
import { writeFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import type { FirecrackerApi } from '../../src/firecracker/api.js';
import { firecrackerControl } from '../../src/firecracker/leaving.js';
import { untilAborted } from '../../src/protocol/bounded.js';
import { deferred } from '../../src/protocol/deferred.js';

const turns = async () => {
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setTimeout(resolve, 5));
};

test('a pause waits until a cancelled one has let the microVM run again', async () => {
  const calls: string[] = [];
  const resuming = deferred<void>();
  let snapshots = 0;
  const api = {
    pause: async () => void calls.push('pause'),
    createSnapshot: async (path: string, _memory: null, signal: AbortSignal) => {
      if (++snapshots === 1) await untilAborted(new Promise<void>(() => {}), signal);
      writeFileSync(path, 'state');
    },
    resume: async () => {
      await resuming.promise;
      calls.push('resumed');
    },
  } as unknown as FirecrackerApi;
  const control = firecrackerControl(api);
  const cancelled = new AbortController();
  const first = control.pause({ signal: cancelled.signal });
  first.catch(() => {});
  await expect.poll(() => snapshots).toBe(1);
  cancelled.abort();
  await turns();
  const second = control.pause({ signal: new AbortController().signal });
  await turns();
  expect(calls).toEqual(['pause']);
  resuming.resolve();
  expect(String(Buffer.from(await second))).toBe('state');
  expect(calls).toEqual(['pause', 'resumed', 'pause']);
  await expect(first).rejects.toMatchObject({ code: 'CANCELLED' });
  // One that is cancelled while it waits pauses nothing.
  const third = new AbortController();
  const waits = control.unpause().then(() => {});
  third.abort();
  await expect(control.pause({ signal: third.signal })).rejects.toMatchObject({ code: 'CANCELLED' });
  await waits;
  expect(calls.filter((call) => call === 'pause')).toHaveLength(2);
});
