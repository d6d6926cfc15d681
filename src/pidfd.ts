/**
 * Descriptors of other processes, for whoever has no socket over which their owner could hand them over.
 */
import { loadAddon } from './addon.js';
import { memferryError, native } from './errors.js';

/**
 * A pidfd of the process that has this pid now. Close it by `fs.closeSync`. The caller must know that the pid is still
 * the process that is meant: a child that was not waited for, say.
 * @throws SYSTEM: there is none
 */
export function openPidfd(pid: number): number {
  if (!Number.isInteger(pid) || pid < 1 || pid > 0x7fffffff)
    throw memferryError('INVALID_ARGUMENT', `${pid} is no pid`);
  return native(() => loadAddon().openPidfd(pid));
}

/**
 * A duplicate of a descriptor of another process (`pidfd_getfd`): root, or CAP_SYS_PTRACE over it. Close it by
 * `fs.closeSync`.
 * @throws SYSTEM
 */
export function takeDescriptor(pidfd: number, descriptor: number): number {
  for (const fd of [pidfd, descriptor]) {
    if (!Number.isInteger(fd) || fd < 0 || fd > 0x7fffffff)
      throw memferryError('INVALID_ARGUMENT', `${fd} is no descriptor`);
  }
  return native(() => loadAddon().takeDescriptor(pidfd, descriptor));
}
