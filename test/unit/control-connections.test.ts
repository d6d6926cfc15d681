/**
 * Control connections that nobody takes because JavaScript is blocked: a stranger cannot pile up descriptors.
 */
import fs from 'node:fs';
import { Worker } from 'node:worker_threads';
import { expect, it } from 'vitest';

import { loadAddon } from '../../src/addon.js';

const MOST_UNTAKEN = 256;
const DIALLED = 400;

/**
 * Waits to be let go, dials and says the preface; when so many as should be are hung up on, gives the rest the time for
 * it, and tells.
 */
const stranger = `
  const net = require('node:net');
  const { parentPort, workerData } = require('node:worker_threads');
  const go = new Int32Array(workerData.go);
  const done = new Int32Array(workerData.done);
  let hungUp = 0;
  let said = 0;
  // One after the other: of those that have said nothing yet the listener keeps few.
  function dial() {
    const socket = net.connect(workerData.port, '127.0.0.1', () => socket.write('MFERRYC1', heard));
    socket.on('error', () => {});
    socket.on('close', () => {
      if (++hungUp === workerData.hungUp) setTimeout(tell, 300);
    });
    socket.resume();
  }
  Atomics.wait(go, 0, 0);
  dial();
  function heard() {
    if (++said < workerData.dialled) dial();
  }
  function tell() {
    Atomics.store(done, 0, 1);
    Atomics.notify(done, 0);
    parentPort.postMessage({ said, hungUp });
  }
`;

it('keeps no more than so many for JavaScript, and all that it takes', { timeout: 40_000 }, async () => {
  const addon = loadAddon();
  const taken: number[] = [];
  const listener = addon.createListener('127.0.0.1', 0, (fd) => taken.push(fd));
  const go = new Int32Array(new SharedArrayBuffer(4));
  const done = new Int32Array(new SharedArrayBuffer(4));
  const worker = new Worker(stranger, {
    eval: true,
    workerData: {
      port: listener.port,
      dialled: DIALLED,
      hungUp: DIALLED - MOST_UNTAKEN,
      go: go.buffer,
      done: done.buffer,
    },
  });
  const told = new Promise((resolve) => worker.once('message', resolve));
  await new Promise((resolve) => worker.once('online', resolve));
  Atomics.store(go, 0, 1);
  Atomics.notify(go, 0);
  expect(Atomics.wait(done, 0, 0, 20_000)).not.toBe('timed-out');
  expect(await told).toEqual({ said: DIALLED, hungUp: DIALLED - MOST_UNTAKEN });
  await expect.poll(() => taken.length).toBe(MOST_UNTAKEN);
  await worker.terminate();
  for (const fd of taken) fs.closeSync(fd);
  listener.close();
});
