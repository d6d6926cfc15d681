// The smallest destination: gives the guest memory, and lets it run when it has arrived.
//   node examples/minimal/destination.mjs 7000
import { listen, Region } from 'memferry';

const listening = await listen({ port: Number(process.argv[2] ?? 7000), accept });
console.log(`listening on ${listening.host}:${listening.port}`);

for await (const arrival of listening) {
  try {
    const report = await arrival.complete;
    console.log(`complete: ${report.bytesReceived} bytes, ${report.remoteFaults.count} remote faults`);
    await listening.close(); // takes no further guests; the one that has arrived stays
  } catch (error) {
    // It never came and runs on at its source; or PAGES_LOST, with the numbers of the pages that will never come.
    console.log(`${error.code}: ${error.message}`);
  }
}

function accept(offer) {
  const [region] = offer.regions.map(({ lengthBytes }) => Region.allocate({ lengthBytes }));
  const [view] = region.views;
  const ticks = new Uint32Array(view.buffer, view.byteOffset, 1);
  let state;
  return {
    regions: [region],
    // Everything that can fail. Pages may still be missing: touching one fetches it.
    async prepare(bytes) {
      state = JSON.parse(new TextDecoder().decode(bytes));
    },
    // Nothing that can fail: from here on the guest is this side's.
    resume() {
      console.log(`${offer.name} came from process ${state.left} at tick ${ticks[0]}`);
      const timer = setInterval(() => {
        console.log(`tick ${++ticks[0]}`);
        if (ticks[0] >= 20) clearInterval(timer);
      }, 100);
    },
    // The migration failed before the commit.
    abandon: () => region.close(),
  };
}
