/**
 * A gang: several guests leave a source at once, to one destination or several, through one VMD. Each is a
 * migration of its own with a commit of its own; what they share are the servers, whose memory is planned for together,
 * and the link. JavaScript thread.
 */
import { checkOptions } from '../check-options.js';
import { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import type { MigrateOptions } from '../options.js';
import type { EvictionReport, MigrationReport } from '../report.js';
import { type Migration, startMigration } from './migrate.js';
import { PlannedRoom } from './planned-room.js';

/** One guest of a gang. */
export interface GangMember {
  /** What moves. */
  guest: Guest;
  /** As for `migrate`; each may have a destination of its own. */
  options: MigrateOptions;
}

/** What is known when the last guest is evicted. */
export interface GangEviction {
  /** The first one's start until the last one is evicted, in ms. */
  evictionMs: number;
  /** In the order of the members. */
  guests: EvictionReport[];
}

/** What is known when every destination holds every page. */
export interface GangReport extends GangEviction {
  /** The first one's start until every destination holds every page, in ms. */
  totalMs: number;
  /** In the order of the members. */
  guests: MigrationReport[];
}

/** Several migrations under way. */
export interface Gang extends AsyncDisposable {
  /** In the order of the members. */
  readonly migrations: readonly Migration[];
  /**
   * Every guest is evicted. Rejects with the first failure, which names its guest (in `facts.guest` too); the others go
   * on, each with its own outcome.
   */
  readonly evicted: Promise<GangEviction>;
  /** Every guest has arrived whole. Rejects with the first failure, as `evicted`. */
  readonly done: Promise<GangReport>;
  /**
   * Each guest that is not committed yet runs on here, and its migration rejects with CANCELLED; the others go on, since
   * there is no way back for these.
   */
  cancel(reason?: unknown): void;
  /** As each migration's: before its commit it is `cancel`, and after it lets go of what its destination lacks. */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Starts all of them at once. @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED; then none was started */
export function migrateGang(members: readonly GangMember[]): Gang {
  if (!Array.isArray(members) || members.length === 0)
    throw new MemferryError('INVALID_ARGUMENT', 'a gang is a list of at least one { guest, options }');
  const started = performance.now();
  const migrations: Migration[] = [];
  const room = new PlannedRoom();
  try {
    for (const [index, member] of members.entries()) {
      checkOptions(member, `migrateGang[${index}]`, ['guest', 'options']);
      try {
        migrations.push(startMigration(member.guest, member.options, room));
      } catch (error) {
        throw named(error, member.guest, index);
      }
    }
  } catch (error) {
    for (const migration of migrations) {
      migration.evicted.catch(() => {});
      migration.done.catch(() => {});
      migration.cancel(error);
    }
    throw error;
  }
  for (const { id, done } of migrations) {
    const over = () => room.release(id);
    void done.then(over, over);
  }
  const each = <T>(of: (migration: Migration) => Promise<T>) =>
    Promise.all(
      migrations.map((migration, index) =>
        of(migration).catch((error) => {
          throw named(error, members[index]?.guest, index);
        }),
      ),
    );
  const evicted = each((migration) => migration.evicted).then((guests) => ({
    evictionMs: performance.now() - started,
    guests,
  }));
  const done = each((migration) => migration.done).then(async (guests) => ({
    totalMs: performance.now() - started,
    evictionMs: (await evicted).evictionMs,
    guests,
  }));
  // Whoever asks is told; whoever waits for the single migrations has been told already.
  evicted.catch(() => {});
  done.catch(() => {});
  return {
    migrations,
    evicted,
    done,
    cancel(reason) {
      for (const migration of migrations) migration.cancel(reason);
    },
    async [Symbol.asyncDispose]() {
      // Whoever disposes of the gang waits for no single one.
      for (const { evicted, done } of migrations) for (const one of [evicted, done]) one.catch(() => {});
      const disposed = await Promise.allSettled(migrations.map((each) => each[Symbol.asyncDispose]()));
      for (const one of disposed) if (one.status === 'rejected') throw one.reason;
    },
  };
}

/** As it was, with whose it is. */
function named(error: unknown, guest: Guest | undefined, index: number): unknown {
  if (!(error instanceof MemferryError)) return error;
  const name = typeof guest?.name === 'string' ? guest.name : `number ${index}`;
  return new MemferryError(error.code, `guest '${name}': ${error.message}`, {
    cause: error,
    facts: { ...error.facts, guest: name },
  });
}
