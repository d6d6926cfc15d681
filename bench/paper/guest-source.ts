/** The source process of a trial: one guest, or a gang that leaves at once. */
import {
  type Guest,
  type MigrateOptions,
  type Migration,
  type MigrationReport,
  migrate,
  rehearse,
} from 'memferry';
import { answerCalls, monotonicMs } from '../support/peer.js';
import { type GuestSpec, makeGuest } from './guests.js';

let guests: Guest[] = [];
let migrations: Migration[] = [];

export interface StartParameters {
  to: { host: string; port: number };
  /** As migrate() takes them; of this version of memferry or of a later one. */
  options: Record<string, unknown>;
}

answerCalls(
  {
    make: async ({ spec, count, host }: { spec: GuestSpec; count: number; host: string }) => {
      await rehearse(); // as `memferry send` does while its guest runs
      for (let index = 0; index < count; index++) {
        guests.push(await makeGuest(spec, host, `guest-${index}`, index + 1));
      }
    },
    /** When it began. */
    start: ({ to, options }: StartParameters) => {
      const startedAtMs = monotonicMs();
      migrations = guests.map((guest) => migrate(guest, { ...options, to } as MigrateOptions));
      // Whoever asks for them later is told; until then nothing is unhandled.
      for (const { evicted, done } of migrations) {
        evicted.catch(() => {});
        done.catch(() => {});
      }
      return startedAtMs;
    },
    /** When the last guest was evicted. */
    evicted: async () => {
      await Promise.all(migrations.map(({ evicted }) => evicted));
      return monotonicMs();
    },
    done: async (): Promise<MigrationReport[]> => Promise.all(migrations.map(({ done }) => done)),
  },
  () => {
    guests = [];
  },
);
