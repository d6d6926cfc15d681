/** `memferry/worker`: live worker_threads guests. A guest module imports `defineGuest`, a host the rest. */
export {
  defineGuest,
  type GuestContext,
  type GuestDefinition,
} from './define-guest.js';
export { GuestMovedError, GuestRequestError } from '../errors.js';
export type { HostFunctions } from './host-functions.js';
export type { SharedMemoryOptions } from './shared-memory.js';
export {
  ArrivingWorkerGuest,
  type WorkerGuestsOptions,
  workerGuests,
} from './worker-arrival.js';
export type { WorkerBaseOptions } from './worker-base.js';
export {
  WorkerGuest,
  type WorkerGuestEvents,
  type WorkerGuestOptions,
  type WorkerGuestStatus,
} from './worker-guest.js';
