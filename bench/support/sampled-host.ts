/** A host of the trials about sampling: guests of plain memory, of which a part is what others have too. */
import { Region, type Sampling, type SamplingStats, sampleGuest, type SampleOptions } from 'memferry';
import { fillRandom } from './memory.js';
import { answerCalls } from './peer.js';

export interface SampledGuest {
  lengthBytes: number;
  /** The first of them are the image's. */
  imageBytes: number;
  image: number;
  own: number;
}

const guests: Region[] = [];
const samplings: Sampling[] = [];

function random(bytes: number, seed: number): Uint8Array {
  const buffer = new ArrayBuffer(bytes);
  fillRandom(buffer, seed);
  return new Uint8Array(buffer);
}

answerCalls(
  {
    start({ lengthBytes, imageBytes, image, own }: SampledGuest): void {
      const region = Region.allocate({ lengthBytes });
      const [view] = region.views;
      view?.set(random(imageBytes, image));
      view?.set(random(lengthBytes - imageBytes, own), imageBytes);
      guests.push(region);
    },
    async sample(options: SampleOptions): Promise<void> {
      for (const region of guests) samplings.push(await sampleGuest([region], options));
    },
    stats: (): SamplingStats[] => samplings.map((each) => each.stats()),
    async stop(): Promise<void> {
      await Promise.all(samplings.splice(0).map((each) => each.close()));
    },
  },
  () => {},
);
