/** memferry: moves live memory between processes and machines while its owner keeps running. */
export { type Arrival, type Listening, listen } from './destination/listen.js';
export {
  type BaseFiles,
  type BaseFilesOptions,
  readBase,
  type SaveBaseOptions,
  saveBase,
} from './base-files.js';
export { type Doctor, doctor } from './doctor.js';
export type { NativeFeature, NativeRestoreStats, NativeRun } from './native.js';
export {
  ArgumentError,
  ChannelError,
  ERROR_CODES,
  type ErrorCode,
  type ErrorFacts,
  type ErrorOptionsWithFacts,
  GuestError,
  GuestMovedError,
  GuestRequestError,
  isErrorCode,
  LossError,
  MemferryError,
  MigrationError,
  memferryError,
  type PageRunFact,
  PlatformError,
  RegionError,
  StagingError,
  SystemCallError,
} from './errors.js';
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
export {
  closeDescriptors,
  FdConnection,
  FdListener,
  type FdListenerOptions,
  type FdPeer,
  type FdPiece,
  type ReceiveBounds,
} from './fd-channel.js';
export { diffPages, hash, hashImplementation, hashPages } from './hash.js';
export { type KvmLog, type KvmSlot, WriteMarks } from './kvm-log.js';
export {
  type AcceptContext,
  type CompressChoice,
  type ConnectionOptions,
  type DedupOptions,
  type DirectoriesOptions,
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
export type { QemuDescription } from './qemu/state.js';
export { QemuGuest, type QemuGuestOptions } from './qemu/source-guest.js';
export type { AttachedMapping, AttachOptions } from './attach.js';
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
export { FirecrackerApi } from './firecracker/api.js';
export { type FirecrackerHost, microVmArrivals } from './firecracker/arriving.js';
export {
  firecrackerControl,
  type MicroVmControl,
  microVmGuest,
  snapshotGuest,
} from './firecracker/leaving.js';
export type { Handshake } from './firecracker/handshake.js';
export type { GuestMapping, GuestMemory } from './firecracker/mappings.js';
export { MicroVm, type PrePaging, type RestoreReport } from './firecracker/micro-vm.js';
export { type ServeSnapshotOptions, type SnapshotServer, serveSnapshot } from './firecracker/serve.js';
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
export type { DirectoryStatus } from './share/directories.js';
export { type Distribution, type DistributionStats, distribute } from './share/distribution.js';
export { type Sampling, type SamplingStats, sampleGuest } from './share/sampling.js';
export { Share, type ShareFill, type ShareStats } from './share/share.js';
export { openPidfd, takeDescriptor } from './pidfd.js';
export { type PagerStats, type PageService, servePages, type ServePagesOptions } from './serve-pages.js';
export type { Announcement, StageStatus } from './protocol/stage-messages.js';
export { stage, type Staging } from './staging/server.js';
export { rehearse } from './rehearse.js';
export {
  DirtyTracker,
  type PageRun,
  type TrackerName,
  type TrackerOptions,
  type TrackerProbe,
  trackers,
  type Writers,
} from './trackers.js';
export {
  superviseGuest,
  type SuperviseOptions,
  type Supervision,
  type SupervisionReport,
} from './supervise.js';
