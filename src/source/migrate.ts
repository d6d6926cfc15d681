/** `migrate`: the source's entry. Checks what can be checked before anything is opened. */
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import type { Guest } from '../guest.js';
import {
  type MigrateOptions,
  parseAddress,
  type ResolvedMigrateOptions,
  resolveMigrateOptions,
} from '../options.js';
import { traitsOf } from '../protocol/mode-traits.js';
import type { EvictionReport, MigrationReport, MigrationState, Progress } from '../report.js';
import { requireGuest } from './check-guest.js';
import { mayHaveServers } from './choose-servers.js';
import { SourceMigration } from './migration.js';
import type { PlannedRoom } from './planned-room.js';

/** A migration under way, at its source. */
export interface Migration extends AsyncDisposable {
  /** 32 hex digits. */
  readonly id: string;
  /** Where the migration stands. */
  readonly state: MigrationState;
  /** Samples while it runs; ends with it and never throws. */
  readonly progress: AsyncIterable<Progress>;
  /** Ends the rounds after the one under way, or lets a held switchover go. */
  switchover(): void;
  /** Before the commit the guest runs on here and `done` rejects with CANCELLED; after it nothing happens. */
  cancel(reason?: unknown): void;
  /**
   * After MIGRATION_IN_DOUBT, and after the GUEST_LOST of a destination that was restarted before it had answered GRANT.
   * `fence`: the caller has proof that the destination's process is dead and stays so; the guest runs here again.
   * `askAgain`: the destination is dialled once more. Gives where the guest is. When that is 'destination', the migration
   * goes on from there: `evicted` and `done` are new promises.
   *
   * Rejects with MIGRATION_IN_DOUBT when there is no answer this time either; with GUEST_LOST when the destination was
   * restarted, after which only `fence` brings the guest back; with INVALID_ARGUMENT when there is nothing to resolve. So
   * it is after a GUEST_LOST with `facts.pages`: the destination had said that it runs the guest, and was lost before it
   * had every page. What was here of the guest is given up then.
   */
  resolve(proof: { fence: 'destination-dead' } | { askAgain: true }): Promise<'source' | 'destination'>;
  /**
   * Resolves when, and only when, the source holds nothing that anyone still needs: its process may exit then,
   * though the destination of a scatter may gather for long. Gives what the source knows of the move.
   */
  readonly evicted: Promise<EvictionReport>;
  /** The report, or the error (a MemferryError) that ended the migration. */
  readonly done: Promise<MigrationReport>;
  /** Each change of `state`. What the listener throws, or rejects with, is a warning of the process (MEMFERRY_LISTENER). */
  on(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  /** The guest has not wholly arrived here yet; the migration begins when its last page is there. */
  on(event: 'waiting', listener: (what: string) => void): this;
  /** As `on`, for the next time only. */
  once(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  once(event: 'waiting', listener: (what: string) => void): this;
  /** Takes a listener away that `on` or `once` was given. */
  off(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  off(event: 'waiting', listener: (what: string) => void): this;
  /**
   * Lets go of everything, whenever it is called; for what has ended it does nothing. Before the commit it is `cancel`.
   * After the commit of a post-copy it drops the pages that the destination does not have yet: the guest is lost, `evicted`
   * and `done` reject with GUEST_LOST. Once `evicted` has resolved nothing can be lost by it, and only the destination's
   * account is missing: `done` rejects with CHANNEL_LOST. So await `evicted` before a block with `await using` ends.
   * In doubt it gives the guest up: nothing can be resolved any more, and it does not run here.
   */
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Moves a guest to a destination that listens (`listen`, or `memferry receive`). Returns at once; everything
 * after the checks of the arguments comes by `done`.
 * @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED, REGION_CLOSED; GUEST_BUSY for a guest that has left
 */
export function migrate(guest: Guest, options: MigrateOptions): Migration {
  return startMigration(guest, options, null);
}

/** The same for a guest of a gang, with what its guests have planned for at the servers. */
export function startMigration(guest: Guest, options: MigrateOptions, room: PlannedRoom | null): Migration {
  const resolved = resolveMigrateOptions(options);
  requireGuest(guest);
  return new SourceMigration(guest, resolved, openSecret(resolved), room);
}

/** That nothing is wrong with them as far as it can be seen without a guest and without dialling anybody. */
export async function checkMigrateOptions(options: MigrateOptions): Promise<void> {
  const resolved = resolveMigrateOptions(options);
  if (traitsOf(resolved.mode).scatter) mayHaveServers(resolved);
  await openSecret(resolved);
}

/** @throws PLAINTEXT_REQUIRED; rejects with AUTH_FAILED, INVALID_ARGUMENT */
function openSecret(options: ResolvedMigrateOptions): Promise<Uint8Array> {
  const { to, via, plaintext } = options;
  for (const host of [to.host, ...via.map((address) => parseAddress(address).host)]) {
    checkAddressPolicy(host, { plaintext });
  }
  return loadSecret(options, { loopback: isLoopback(to.host) });
}
