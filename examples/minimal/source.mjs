// The smallest source: one region of memory, written ten times a second, moves while it is being written.
//   node examples/minimal/source.mjs 7000
import { migrate, Region } from 'memferry';

const region = Region.allocate({ lengthBytes: 64 * 2 ** 20 });
const [view] = region.views;
const ticks = new Uint32Array(view.buffer, view.byteOffset, 1);
let timer;

const guest = {
  name: 'ticker',
  regions: [{ name: 'heap', region }],
  module: null, // memory alone: the destination knows by itself what to run
  unpause() {
    timer = setInterval(() => ticks[0]++, 100);
  },
  // When this resolves nothing writes the region any more. What it gives arrives at the other side as it is.
  async pause() {
    clearInterval(timer);
    return new TextEncoder().encode(JSON.stringify({ left: process.pid }));
  },
};
guest.unpause();
await new Promise((resolve) => setTimeout(resolve, 1000));

const migration = migrate(guest, { to: `127.0.0.1:${process.argv[2] ?? 7000}`, mode: 'hybrid' });
migration.on('state', (state) => console.log(state));
const report = await migration.done; // or a MemferryError; before the commit the guest then runs on here
console.log(
  `moved at tick ${ticks[0]}: ${report.downtimeMs.toFixed(2)} ms of downtime, verified ${report.verified}`,
);
region.close();
