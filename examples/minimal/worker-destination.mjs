// Runs the modules that it lists, and no other.
//   node examples/minimal/worker-destination.mjs 7000
import { listen } from 'memferry';
import { workerGuests } from 'memferry/worker';

let arrived;
const listening = await listen({
  port: Number(process.argv[2] ?? 7000),
  accept: workerGuests({
    modules: { counter: new URL('../counter/counter.mjs', import.meta.url) },
    onGuest: (guest) => {
      arrived = guest; // it runs; its pages may still be on their way
    },
  }),
});
console.log(`listening on ${listening.host}:${listening.port}`);

for await (const arrival of listening) {
  try {
    await arrival.resumed;
    console.log('there', await arrived.request({ add: 4 }), await arrived.request('history'));
    await arrival.complete;
    await listening.close();
  } catch (error) {
    console.log(`${error.code}: ${error.message}`); // it never came and runs on at its source, or pages are lost
  }
}
await arrived.terminate();
