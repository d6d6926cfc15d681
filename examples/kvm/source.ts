/**
 * Starts a guest, lets it run for a second, and moves it.
 *   node examples/kvm/build/js/source.js 7000 [mode]
 */
import { type Mode, modes } from 'memferry';
import { KvmGuest } from './kvm-guest.js';

const [port = '7000', wanted = 'hybrid'] = process.argv.slice(2);
const mode = modes.find((known) => known === wanted) as Mode;
const guest = KvmGuest.boot('counting', 16 * 2 ** 20, -1);
await new Promise((resolve) => setTimeout(resolve, 1000));
console.log(`count ${guest.vm.status().last}`);

const migration = guest.migrate({ to: `127.0.0.1:${port}`, mode });
migration.on('state', (state) => console.log(state));
const report = await migration.done; // or a MemferryError; before the commit the guest then runs on here
console.log(
  `moved: ${report.downtimeMs.toFixed(2)} ms of downtime, ${report.rounds.length} rounds, ` +
    `tracked by ${report.tracker}, verified ${report.verified}`,
);
