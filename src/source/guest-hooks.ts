/**
 * What a guest's owner is told after the commit. The destination has the guest, whatever the owner's own code makes of
 * that: what it throws, or that it takes too long, is a warning. JavaScript thread.
 */
import type { Guest } from '../guest.js';
import { within } from '../protocol/bounded.js';
import { warn } from '../tell-listeners.js';

const departedTimeoutMs = 10_000;
/** It may end a process, which flushes its disks first. */
const releaseTimeoutMs = 120_000;

/** Never rejects. */
export function tellDeparted(guest: Guest): Promise<void> {
  return hear(guest, 'departed', departedTimeoutMs, 'MEMFERRY_DEPARTED_FAILED');
}

/** Never rejects. */
export function releaseGuest(guest: Guest): Promise<void> {
  return hear(guest, 'release', releaseTimeoutMs, 'MEMFERRY_RELEASE_FAILED');
}

async function hear(
  guest: Guest,
  hook: 'departed' | 'release',
  boundMs: number,
  code: string,
): Promise<void> {
  try {
    const heard = Promise.resolve(guest[hook]?.());
    await within(heard, boundMs, 'SYSTEM', `no end within ${boundMs} ms, which is not waited for any longer`);
  } catch (error) {
    warn(`${hook}() of guest '${guest.name}' failed`, error, code);
  }
}
