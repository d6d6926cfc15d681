/**
 * What callers may set, with every default; one file a command. Options are checked here, before anything is
 * opened or allocated; C++ asserts what is promised here.
 */
export { formatAddress, parseAddress, parseGroup } from './options/address.js';
export type { ConnectionOptions, DedupOptions } from './options/fields.js';
export {
  type AcceptContext,
  type ListenOptions,
  type ResolvedListenOptions,
  resolveListenOptions,
} from './options/listen.js';
export {
  type CompressChoice,
  compressChoices,
  type MigrateOptions,
  type Mode,
  modes,
  mostReplayBytes,
  type NonConvergence,
  nonConvergenceChoices,
  type ResolvedMigrateOptions,
  resolveMigrateOptions,
} from './options/migrate.js';
export { type ParkOptions, type ResolvedParkOptions, resolveParkOptions } from './options/park.js';
export {
  type DirectoriesOptions,
  type DistributeOptions,
  type ResolvedDirectoriesOptions,
  type ResolvedDistributeOptions,
  type ResolvedSampleOptions,
  type ResolvedShareOptions,
  resolveDistributeOptions,
  resolveSampleOptions,
  resolveShareOptions,
  type SampleOptions,
  type ShareOptions,
} from './options/share.js';
export {
  defaultAnnounceGroup,
  type ResolvedStageOptions,
  resolveStageOptions,
  type StageOptions,
} from './options/stage.js';
export { parseTicket } from './options/ticket.js';
export { type ResolvedUnparkOptions, resolveUnparkOptions, type UnparkOptions } from './options/unpark.js';
