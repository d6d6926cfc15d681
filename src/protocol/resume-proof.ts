/** Shows that a new control connection belongs to a migration: knowledge of its first connection's session key. */
import { createHmac, timingSafeEqual } from 'node:crypto';

export function resumeProof(sessionKey: Uint8Array, migrationId: string): string {
  return createHmac('sha256', sessionKey).update('memferry resume session').update(migrationId).digest('hex');
}

export function provesResume(sessionKey: Uint8Array, migrationId: string, proof: string): boolean {
  const expected = Buffer.from(resumeProof(sessionKey, migrationId), 'hex');
  const got = Buffer.from(proof, 'hex');
  return got.length === expected.length && timingSafeEqual(got, expected);
}
