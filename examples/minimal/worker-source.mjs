// The same with a live worker: the guest is a module (examples/counter), its host only starts and moves it.
//   node examples/minimal/worker-source.mjs 7000
import { migrate } from 'memferry';
import { WorkerGuest } from 'memferry/worker';

const url = new URL('../counter/counter.mjs', import.meta.url);
const guest = await WorkerGuest.start({ module: { name: 'counter', url } });
console.log('here', await guest.request({ add: 3 }));

const migration = migrate(guest, { to: `127.0.0.1:${process.argv[2] ?? 7000}`, mode: 'post-copy' });
const report = await migration.done;
console.log(
  `moved: ${report.downtimeMs.toFixed(2)} ms of downtime, ${report.remoteFaults.count} remote faults`,
);
await guest.terminate();
