/**
 * Page distribution before anybody moves: eight guests on four hosts, from two images, sampled in the background. What
 * that takes of a core on each host, and how long it takes until a share has what they have in common.
 */
import { SampledFleet } from '../support/sampling.js';
import type { Trial } from '../support/trial.js';

const MiB = 2 ** 20;
/** After the share is there the figures go on, so that several passes are in them. */
const longerMs = 8000;

export async function run(trial: Trial): Promise<void> {
  const shares: number[] = [];
  const primed: number[] = [];
  const notes: string[] = [];
  for (let sample = 0; sample < trial.samples(3); sample++) {
    const fleet = new SampledFleet({
      hosts: 4,
      images: 2,
      lengthBytes: 64 * MiB,
      imageBytes: 48 * MiB,
      budgetBytes: 128 * MiB,
    });
    try {
      await fleet.start();
      const { primedMs, hosts, pagesInShare, bytesOnWire } = await fleet.prime(longerMs);
      primed.push(primedMs / 1000);
      shares.push(Math.max(...hosts.map(({ share }) => 100 * share)));
      notes.push(`${pagesInShare} pages, ${(bytesOnWire / MiB).toFixed(0)} MiB on the wire`);
    } finally {
      await fleet.stop();
    }
  }
  const samples = (values: number[]) => values.map((value) => ({ value, floor: null }));
  trial.report('sampling, the busiest host', '% of a core', samples(shares), {
    words: 'at most 2 % of one core',
    met: ({ value }) => value <= 2,
  });
  trial.report('until the share is primed', 's', samples(primed), null, notes.join('; '));
}
