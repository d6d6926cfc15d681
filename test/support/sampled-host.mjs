/**
 * A host with guests that are sampled, for tests: a real process. Its first argument says which (JSON); it tells their
 * figures every 100 ms over IPC, and ends when that does. `pageOf` is what tests know pages by.
 */
import { pathToFileURL } from 'node:url';
import { Region, sampleGuest } from '../../lib/index.js';

/** The page `index` of the image `seed`: xorshift, the same everywhere. */
export function pageOf(seed, index, bytes = 4096) {
  const page = new Uint32Array(bytes / 4);
  let state = (seed * 0x9e3779b1 + index * 0x85ebca6b + 1) >>> 0 || 1;
  for (let at = 0; at < page.length; at++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    page[at] = state >>> 0;
  }
  return new Uint8Array(page.buffer);
}

/** Pages of a base image, and then its own. */
function fill(region, { base, basePages, own, ownPages }) {
  const [view] = region.views;
  for (let at = 0; at < basePages; at++) view.set(pageOf(base, at), at * 4096);
  for (let at = 0; at < ownPages; at++) view.set(pageOf(own, at), (basePages + at) * 4096);
}

async function main({ guests, sample }) {
  const samplings = [];
  // Held until the end, as a guest holds them: what nobody holds is collected, and sampled no more.
  const regions = [];
  for (const guest of guests) {
    const region = Region.allocate({ lengthBytes: (guest.basePages + guest.ownPages) * 4096 });
    fill(region, guest);
    regions.push(region);
    samplings.push(await sampleGuest([region], sample));
  }
  const timer = setInterval(() => {
    const { user, system } = process.cpuUsage();
    process.send?.({
      stats: samplings.map((each) => each.stats()),
      processCpuMs: (user + system) / 1e3,
      atMs: performance.now(),
    });
  }, 100);
  process.once('disconnect', async () => {
    clearInterval(timer);
    await Promise.all(samplings.map((each) => each.close()));
    for (const region of regions) region.close();
  });
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) await main(JSON.parse(process.argv[2]));
