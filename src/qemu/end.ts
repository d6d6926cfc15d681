/** The end of a QEMU whose guest must never run there any more. */
import { setTimeout as sleep } from 'node:timers/promises';
import { memferryError } from '../errors.js';
import type { QemuAttachment } from './attachment.js';

const killTimeoutMs = 5_000;

/**
 * By `quit`, over another connection where the first one has ended; by SIGKILL when QEMU cannot be told, or has not ended
 * within `quitTimeoutMs`.
 * @throws SYSTEM: not even so
 */
export async function endQemu(attachment: QemuAttachment, quitTimeoutMs: number): Promise<void> {
  const { process: owner } = attachment;
  const deadline = performance.now() + quitTimeoutMs;
  if (await tellToQuit(attachment, quitTimeoutMs)) await gone(owner, deadline);
  if (owner.alive()) owner.end();
  if (await gone(owner, performance.now() + killTimeoutMs)) return;
  throw memferryError('SYSTEM', `QEMU (process ${owner.pid}) does not end; its guest must never run`);
}

/** False: it has not heard of it. An answer is no matter: QEMU may be gone before, or for long. */
async function tellToQuit(attachment: QemuAttachment, timeoutMs: number): Promise<boolean> {
  const { qmp, process: owner } = attachment;
  const heard = !qmp.isClosed;
  await qmp.execute('quit', {}, { timeoutMs }).catch(() => {});
  if (!qmp.isClosed || !owner.alive()) return true;
  const anew = await attachment.reconnect().catch(() => null);
  await anew?.execute('quit', {}, { timeoutMs }).catch(() => {});
  await anew?.close();
  return heard || anew !== null;
}

async function gone(owner: QemuAttachment['process'], deadline: number): Promise<boolean> {
  while (owner.alive()) {
    if (performance.now() >= deadline) return false;
    await sleep(10);
  }
  return true;
}
