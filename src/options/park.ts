/** What `park` may be told: a migration's options, but for those that say where to. */
import { MemferryError } from '../errors.js';
import type { ParkTicket } from '../source/park.js';
import { parse } from './fields.js';
import {
  checkServers,
  checkStall,
  type MigrateOptions,
  migrateSchema,
  type ResolvedMigrateOptions,
} from './migrate.js';

/** Options that say where a guest goes, or how it is made ready there; and those of rounds. */
const ofMigrate = [
  'to',
  'mode',
  'channels',
  'downtimeLimitMs',
  'maxRounds',
  'onNonConvergence',
  'hybridRounds',
  'tracker',
  'writers',
  'splitHugePages',
  'verify',
  'base',
  'baseTimeoutMs',
  'replayLog',
  'holdSwitchover',
  'destinationRack',
  'onCapacity',
  'releaseAsEvicted',
  'gatherTimeoutMs',
  'progressIntervalMs',
  'deltaCacheBytes',
] as const satisfies readonly (keyof MigrateOptions)[];

/**
 * What `park` may be told. A park goes the way of a scatter without a destination; the mode and the rounds' options have
 * no meaning there.
 */
export interface ParkOptions extends Omit<MigrateOptions, (typeof ofMigrate)[number]> {
  /**
   * Called with the ticket before the commit, and awaited: a ticket that is kept then claims the guest whatever
   * becomes of this process. Rejecting ends the park, and so does taking longer than `prepareTimeoutMs` (the guest
   * stands meanwhile): it runs on here.
   */
  onTicket?: (ticket: ParkTicket) => Promise<void> | void;
  /**
   * The home server was granted the guest and has not answered for `inDoubtTimeoutMs`. With this, which is called once, it
   * is asked until it answers, or until `signal` aborts, which rejects with this error; without it, `park` rejects with it
   * at once. Until then the guest stands here, and its memory stays.
   */
  onInDoubt?: (error: MemferryError) => void;
}

export type ResolvedParkOptions = ResolvedMigrateOptions & Pick<ParkOptions, 'onTicket' | 'onInDoubt'>;

export function resolveParkOptions(given: ParkOptions): ResolvedParkOptions {
  const { onTicket, onInDoubt, ...options } = given ?? {};
  for (const [name, hook] of Object.entries({ onTicket, onInDoubt })) {
    if (hook !== undefined && typeof hook !== 'function') {
      throw new MemferryError('INVALID_ARGUMENT', `park.${name}: must be a function`);
    }
  }
  for (const name of ofMigrate) {
    if (name in options) {
      throw new MemferryError('INVALID_ARGUMENT', `park.${name}: a park has none`);
    }
  }
  const to = { host: '127.0.0.1', port: 1 };
  const parsed = parse(migrateSchema, { ...options, to, mode: 'scatter' }, 'park');
  checkStall(parsed, 'park');
  checkServers(parsed, 'park');
  return {
    ...parsed,
    to,
    ...(onTicket ? { onTicket } : {}),
    ...(onInDoubt ? { onInDoubt } : {}),
  };
}
