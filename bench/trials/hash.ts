/** XXH3 of 4 KiB pages through the addon, against libxxhash in a bare loop. */
import { loadAddon } from '../support/addon.js';
import { fillRandom } from '../support/memory.js';
import { runFloor } from '../support/processes.js';
import { atLeastTimesFloor } from '../support/result.js';
import { interleave, type Trial } from '../support/trial.js';

const lengthBytes = 256 * 2 ** 20;
const pageBytes = 4096;
/** The best of so many passes is one sample, on both sides. */
const passes = 9;

export async function run(trial: Trial): Promise<void> {
  const addon = loadAddon();
  const region = addon.allocate(lengthBytes);
  const buffer = region.buffers()[0] as ArrayBuffer;
  fillRandom(buffer, 1);
  const view = new Uint8Array(buffer);
  const hashes = new BigUint64Array(lengthBytes / pageBytes);

  const ours = (): number => {
    let best = 0;
    for (let pass = 0; pass < passes; pass++) {
      const start = process.hrtime.bigint();
      addon.hashPages(view, pageBytes, hashes);
      best = Math.max(best, lengthBytes / Number(process.hrtime.bigint() - start));
    }
    return best;
  };
  const floor = async (): Promise<number> =>
    (await runFloor<{ gbPerSecond: number }>('hash_floor', ['--bytes', lengthBytes, '--passes', passes]))
      .gbPerSecond;
  trial.report(
    'pages-4k',
    'GB/s',
    await interleave(trial.samples(7), ours, floor),
    atLeastTimesFloor(0.95, 'libxxhash in a bare loop'),
    addon.hashImplementation(),
  );
  region.close();
}
