/** Timers and what has come by a socket meanwhile, when this process did not run for a while. */
import { once } from 'node:events';
import { createConnection, createServer, type Server, type Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { within } from '../../src/protocol/bounded.js';
import { Alarm, NamedTimers } from '../../src/protocol/timers.js';

let server: Server;
let said: Socket;
let heard: Socket;
beforeEach(async () => {
  server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  said = createConnection((server.address() as { port: number }).port, '127.0.0.1');
  [heard] = (await once(server, 'connection')) as [Socket];
});
afterEach(() => {
  said.destroy();
  heard.destroy();
  server.close();
});

/** As after SIGSTOP and SIGCONT: the bytes are there, and every timer is due. */
async function sayAndStop(ms: number): Promise<void> {
  said.write('x');
  // Outside of the turn that has just run the timers.
  await new Promise<void>((resolve) => setImmediate(resolve));
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, ms);
}
const moment = () => new Promise((resolve) => setTimeout(resolve, 50));

describe('an alarm', () => {
  test('rings once', async () => {
    let rung = 0;
    new Alarm(10, () => ++rung);
    await expect.poll(() => rung).toBe(1);
    await moment();
    expect(rung).toBe(1);
  });

  test('that is stopped rings never, late or not', async () => {
    let rung = 0;
    const early = new Alarm(10, () => ++rung);
    early.stop();
    const late = new Alarm(100, () => ++rung);
    heard.once('data', () => late.stop());
    await sayAndStop(500);
    await moment();
    expect(rung).toBe(0);
  });

  test('that is late still rings when nothing has come', async () => {
    let rung = 0;
    new Alarm(100, () => ++rung);
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 500);
    await expect.poll(() => rung).toBe(1);
    await moment();
    expect(rung).toBe(1);
  });
});

test('a named timer that is stopped by what came while this process stood still does not fire', async () => {
  const fired: string[] = [];
  const timers = new NamedTimers({ doubt: 200 }, (name) => fired.push(name));
  timers.start('doubt');
  heard.once('data', () => timers.stop('doubt'));
  await sayAndStop(600);
  await moment();
  expect(fired).toEqual([]);
});

test('an answer that came while this process stood still is in time', async () => {
  const answer = within(once(heard, 'data'), 200, 'PEER_LOST', 'no answer');
  await sayAndStop(600);
  expect(String((await answer)[0])).toBe('x');
});
