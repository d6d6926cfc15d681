/** `migrate`: the source's entry. Checks what can be checked before anything is opened. */
import { checkAddressPolicy, isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import type { Guest } from '../guest.js';
import { type MigrateOptions, resolveMigrateOptions } from '../options.js';
import type { EvictionReport, MigrationReport, MigrationState, Progress } from '../report.js';
import { requireGuest } from './check-guest.js';
import { SourceMigration } from './migration.js';

/** A migration under way, at its source. */
export interface Migration extends AsyncDisposable {
  /** 32 hex digits. */
  readonly id: string;
  readonly state: MigrationState;
  /** Samples while it runs; ends with it and never throws. */
  readonly progress: AsyncIterable<Progress>;
  /** Ends the rounds after the one under way, or lets a held switchover go. */
  switchover(): void;
  /** Before the commit the guest runs on here and `done` rejects with CANCELLED; after it nothing happens. */
  cancel(reason?: unknown): void;
  /**
   * After MIGRATION_IN_DOUBT or GUEST_LOST. `fence`: the caller has proof that the destination's process is dead
   * and stays so; the guest runs here again. `askAgain`: the destination is dialled once more.
   * When that gives 'destination', the migration goes on from there: `evicted` and `done` are new promises.
   */
  resolve(proof: { fence: 'destination-dead' } | { askAgain: true }): Promise<'source' | 'destination'>;
  /**
   * Resolves when, and only when, the source holds nothing that anyone still needs: its process may exit then,
   * though the destination of a scatter may gather for long. Gives what the source knows of the move.
   */
  readonly evicted: Promise<EvictionReport>;
  /** The report, or the error (a MemferryError) that ended the migration. */
  readonly done: Promise<MigrationReport>;
  on(event: 'state', listener: (state: MigrationState, previous: MigrationState) => void): this;
  /** The guest has not wholly arrived here yet; the migration begins when its last page is there. */
  on(event: 'waiting', listener: (what: string) => void): this;
}

/**
 * Moves a guest to a destination that listens (`listen`, or `memferry receive`). Returns at once; everything
 * after the checks of the arguments comes by `done`.
 * @throws INVALID_ARGUMENT, PLAINTEXT_REQUIRED, REGION_CLOSED; GUEST_BUSY for a guest that has left
 */
export function migrate(guest: Guest, options: MigrateOptions): Migration {
  const resolved = resolveMigrateOptions(options);
  requireGuest(guest);
  checkAddressPolicy(resolved.to.host, { plaintext: resolved.plaintext });
  const secret = loadSecret(resolved, { loopback: isLoopback(resolved.to.host) });
  return new SourceMigration(guest, resolved, secret);
}
