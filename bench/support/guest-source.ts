/** The source process of a trial of whole migrations, through the public API. */
import { type Mode, migrate, Region } from 'memferry';
import { WritingGuest } from './guest-writer.js';
import { fillRandom } from './memory.js';
import { answerCalls } from './peer.js';
import { residentBytes } from './resident.js';

const idleBytes = residentBytes().now;
let region: Region | null = null;
let guest: WritingGuest | null = null;

export interface GuestParameters {
  lengthBytes: number;
  writerBytesPerSecond: number;
}

answerCalls(
  {
    makeGuest: async ({ lengthBytes, writerBytesPerSecond }: GuestParameters) => {
      region = Region.allocate({ lengthBytes });
      let seed = 1;
      for (const view of region.views) fillRandom(view.buffer, seed++);
      guest = new WritingGuest(region, writerBytesPerSecond);
      await guest.writing();
    },
    /** Resolves with the report. */
    migrate: async ({ port, mode }: { port: number; mode: Mode }) => {
      if (guest === null) throw new Error('called too early');
      return await migrate(guest, { to: { host: '127.0.0.1', port }, mode }).done;
    },
    /** The most that this process ever held beyond the region and what it held when idle. */
    extraBytes: () => residentBytes().peak - idleBytes - (region?.lengthBytes ?? 0),
  },
  () => {},
);
