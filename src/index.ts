/** memferry: moves live memory between processes and machines while its owner keeps running. */
export { type Arrival, type Listening, listen } from './destination/listen.js';
export { type BaseFiles, type BaseFilesOptions, readBase, saveBase } from './base-files.js';
export { type Doctor, doctor } from './doctor.js';
export * from './errors.js';
export type {
  ArrivingGuest,
  Guest,
  GuestModule,
  GuestOffer,
  GuestRegion,
  PausedGuest,
  RegionBase,
} from './guest.js';
export { type Unparked, unpark } from './destination/unpark.js';
export { diffPages, hash, hashImplementation, hashPages } from './hash.js';
export {
  type CompressChoice,
  type DistributeOptions,
  type ListenOptions,
  type MigrateOptions,
  type Mode,
  modes,
  type NonConvergence,
  type ParkOptions,
  type SampleOptions,
  type ShareOptions,
  type StageOptions,
  type UnparkOptions,
} from './options.js';
export { QemuDestination, type QemuArrivalOptions } from './qemu/arriving-guest.js';
export type { QemuSockets } from './qemu/attachment.js';
export { shimPath } from './qemu/shim.js';
export { QemuGuest, type QemuGuestOptions } from './qemu/source-guest.js';
export { type Adoptable, type AllocateOptions, Region, type WasmMemory } from './region.js';
export type {
  ArrivalReport,
  BaseReport,
  DedupReport,
  DowntimeParts,
  EncodingReport,
  EvictionReport,
  Intermediary,
  MigrationReport,
  MigrationState,
  Progress,
  RemoteFaults,
  RoundReport,
} from './report.js';
export { migrationStates } from './report.js';
export {
  type ConvergenceDecision,
  type ConvergenceInput,
  decideRound,
  type RoundSample,
} from './source/convergence.js';
export {
  type Gang,
  type GangEviction,
  type GangMember,
  type GangReport,
  migrateGang,
} from './source/gang.js';
export { type Migration, migrate } from './source/migrate.js';
export { park, type ParkReport, type ParkTicket } from './source/park.js';
export { type DiscoverOptions, discover, type HeardServer } from './staging/announce.js';
export { type Distribution, type DistributionStats, distribute } from './share/distribution.js';
export { type Sampling, type SamplingStats, sampleGuest } from './share/sampling.js';
export { Share, type ShareFill, type ShareStats } from './share/share.js';
export { stage, type Staging } from './staging/server.js';
export { rehearse } from './rehearse.js';
export { DirtyTracker, trackers } from './trackers.js';
