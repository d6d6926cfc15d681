/**
 * A source in TypeScript's world for destination.c: a guest of 16 MiB that counts, moved by hybrid.
 *   MEMFERRY_SECRET='at least sixteen bytes' node send.mjs PORT
 */
import { migrate, Region } from 'memferry';

const region = Region.allocate({ lengthBytes: 16 * 2 ** 20 });
const [memory] = region.views;
for (let at = 0; at < memory.length; at += 4096) memory[at] = 1 + (at % 251);
let running = setInterval(() => memory.fill(memory[0] + 1, 0, 65536), 1);

const guest = {
  name: 'counter',
  regions: [{ name: 'memory', region }],
  module: null,
  async pause() {
    clearInterval(running);
    running = null;
    return { state: Buffer.from('registers and such') };
  },
  unpause() {
    running = setInterval(() => memory.fill(memory[0] + 1, 0, 65536), 1);
  },
};

const migration = migrate(guest, {
  to: { host: '127.0.0.1', port: Number(process.argv[2]) },
  mode: 'hybrid',
  secret: process.env.MEMFERRY_SECRET,
});
const { verified, downtimeMs, totalMs } = await migration.done;
console.log(`moved: verified ${verified}, downtime ${downtimeMs.toFixed(2)} ms of ${totalMs.toFixed(0)} ms`);
region.close();
