/**
 * That a QMP socket and a shim are of one QEMU. Were those of two QEMUs mixed up, one guest would be stopped and the
 * other's RAM moved, and nothing else would notice: they are often started alike.
 */
import { randomUUID } from 'node:crypto';
import { memferryError } from '../errors.js';
import { FdListener } from '../fd-channel.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import { withSocket } from './device-state.js';
import { Qmp } from './qmp.js';

/** The process that the shim is in; the kernel says so. */
export interface QemuProcess {
  pid: number;
  uid: number;
}

const answerMs = 5_000;

/**
 * A QMP connection to that process and no other.
 * @throws INVALID_ARGUMENT when another process answers there, or it cannot be shown that it is the same; as
 *   `Qmp.connect`
 */
export async function connectTo(
  path: string,
  { pid, uid }: QemuProcess,
  options: { signal?: AbortSignal | undefined } = {},
): Promise<Qmp> {
  const qmp = await Qmp.connect(path, options);
  try {
    // Its management may have made the socket and handed it over, as libvirt does; then QEMU itself has to show it.
    const speaks = qmp.peerPid === pid ? pid : await callerOf(qmp, uid, options.signal);
    if (speaks === pid) return qmp;
    throw memferryError(
      'INVALID_ARGUMENT',
      `${path} is the QMP socket of process ${speaks}, the shim is in process ${pid}: they are two QEMUs`,
      { facts: { expected: pid, got: speaks } },
    );
  } catch (error) {
    await qmp.close();
    throw error;
  }
}

/** Has QEMU connect to a socket of ours, for a moment: the kernel says who it is. */
async function callerOf(qmp: Qmp, uid: number, signal: AbortSignal | undefined): Promise<number> {
  const caller = deferred<number>();
  caller.promise.catch(() => {});
  try {
    return await withSocket(uid, async (path) => {
      // In a directory that only that user enters.
      using _ = new FdListener(path, {
        mode: 0o666,
        mostConnections: 1,
        onConnection: (connection) => {
          caller.resolve(connection.peer.pid);
          connection.close();
        },
        onError: (error) => caller.reject(error),
      });
      const id = `memferry-${randomUUID()}`;
      const addr = { type: 'unix', data: { path } };
      await qmp.execute(
        'chardev-add',
        { id, backend: { type: 'socket', data: { addr, server: false } } },
        { signal },
      );
      try {
        const late = 'QEMU did not connect to where it was told to';
        const coming = signal ? untilAborted(caller.promise, signal) : caller.promise;
        return await within(coming, answerMs, 'PEER_LOST', late);
      } finally {
        await qmp.execute('chardev-remove', { id }).catch(() => {}); // it has ended, or is about to be refused
      }
    });
  } catch (cause) {
    if (signal?.aborted) throw cause;
    throw memferryError(
      'INVALID_ARGUMENT',
      `it cannot be told whether ${qmp.path} and the shim are of one QEMU: ${(cause as Error).message}`,
      { cause },
    );
  }
}
