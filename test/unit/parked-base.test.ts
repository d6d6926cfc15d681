/** Who may read a parked image as a base, beside others who want it. */
import { createServer, type Server, type Socket } from 'node:net';
import { afterEach, expect, it } from 'vitest';
import { ParkedBase } from '../../src/destination/parked-base.js';
import type { Region } from '../../src/region.js';
import { secret } from './fake-stage.js';

let server: Server | undefined;
const sockets: Socket[] = [];
afterEach(() => {
  for (const socket of sockets.splice(0)) socket.destroy();
  server?.close();
});

/** A home that takes connections and says nothing. */
async function silent(): Promise<{ home: string; dialled: Socket[] }> {
  server = createServer((socket) => {
    socket.on('error', () => {});
    sockets.push(socket);
  });
  await new Promise<void>((listening) => server?.listen(0, '127.0.0.1', listening));
  const { port } = server.address() as { port: number };
  return { home: `127.0.0.1:${port}`, dialled: sockets };
}

it('is one arrival at a time', async () => {
  const { home, dialled } = await silent();
  const read = (image: string, signal: AbortSignal) => {
    const base = new ParkedBase(
      { image, secret: '00'.repeat(32), home },
      {
        connection: { secret: Buffer.from(secret), recoverTimeoutMs: 3000 },
        maxBytes: 2 ** 20,
        recoverTimeoutMs: 3000,
        gatherLimit: 0,
      },
    );
    const [heap] = base.bases(['heap']) as [{ fill: unknown }];
    const filled = heap.fill as (
      region: Region,
      context: { signal: AbortSignal; progress(fraction: number): void },
    ) => Promise<void>;
    return filled({} as Region, { signal, progress: () => {} });
  };
  const off = new AbortController();
  const first = expect(read('01'.repeat(16), off.signal)).rejects.not.toMatchObject({
    facts: { reason: 'busy' },
  });
  // It costs the second one its base at once, and nobody a connection.
  await expect(read('01'.repeat(16), new AbortController().signal)).rejects.toMatchObject({
    code: 'VMD_REFUSED',
    facts: { reason: 'busy' },
  });
  expect(dialled.length).toBeLessThanOrEqual(1);
  // Another image is another matter; and whoever comes after the first has ended finds it free.
  const other = expect(read('02'.repeat(16), off.signal)).rejects.not.toMatchObject({
    facts: { reason: 'busy' },
  });
  off.abort();
  await first;
  await other;
  const again = new AbortController();
  const third = expect(read('01'.repeat(16), again.signal)).rejects.not.toMatchObject({
    facts: { reason: 'busy' },
  });
  setTimeout(() => again.abort(), 50);
  await third;
});
