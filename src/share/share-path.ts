/**
 * Where a domain's page share lies when no file is named: in this user's own directory on tmpfs, under a name that
 * follows from the domain's key and says nothing of it. Pure, but for the user's number.
 */
import { createHmac } from 'node:crypto';
import { join } from 'node:path';
import { MemferryError } from '../errors.js';

const tmpfs = '/dev/shm';

export function shareDirectory(): string {
  const uid = process.geteuid?.();
  if (uid === undefined) throw new MemferryError('SYSTEM', 'a user without a number');
  return join(tmpfs, `memferry-${uid}`);
}

/** `file`: a path that was named; null for the domain's. */
export function sharePath(file: string | null, domainKey: Uint8Array): string {
  if (file !== null) return file;
  const name = createHmac('sha256', domainKey).update('memferry page share name').digest('hex');
  return join(shareDirectory(), `share-${name.slice(0, 32)}`);
}
