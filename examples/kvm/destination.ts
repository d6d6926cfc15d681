/**
 * Takes a guest, lets it run for a second, and compares every byte of its memory with what it has to be.
 *   node examples/kvm/build/js/destination.js 7000
 */
import { listen } from 'memferry';
import { KvmGuest } from './kvm-guest.js';
import { findWrong } from './oracle.js';

let guest: KvmGuest | undefined;
const listening = await listen({
  port: Number(process.argv[2] ?? 7000),
  accept: (offer) =>
    KvmGuest.accept(offer, -1, (arrived) => {
      guest = arrived;
    }),
});
console.log(`listening on ${listening.host}:${listening.port}`);

for await (const arrival of listening) {
  await arrival.resumed;
  console.log(`count ${guest?.vm.status().last}: it goes on here`);
  const report = await arrival.complete; // or PAGES_LOST, with the numbers of the pages that never came
  console.log(`complete: ${report.remoteFaults.count} pages were fetched because the guest waited for them`);
  await new Promise((resolve) => setTimeout(resolve, 1000));
  if (guest) {
    const { state } = await guest.pause();
    const wrong = findWrong(state, guest.ram);
    const { last } = guest.vm.status();
    console.log(wrong.length > 0 ? wrong.join('\n') : `count ${last}: every byte is as it has to be`);
    process.exitCode = wrong.length > 0 ? 1 : 0;
    guest.close();
  }
  await listening.close();
}
