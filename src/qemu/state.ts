/** A QEMU guest's execution state as it goes over the wire: a line of JSON, then QEMU's own stream. Pure. */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import { memferryError } from '../errors.js';
import type { GuestModule } from '../guest.js';

/** Who receives a QEMU guest must be a QEMU: a listener that takes plain memory refuses the name. */
export const qemuModule: GuestModule = {
  name: 'qemu',
  sha256: createHash('sha256').update('memferry QEMU guest 1').digest('hex'),
};

const headerSchema = z.strictObject({
  version: z.literal(1),
  /** It ran when it was stopped for the migration, and is to run on. */
  running: z.boolean(),
});
const maxHeaderBytes = 1024;

export const descriptionSchema = z.strictObject({
  version: z.literal(1),
  qemu: z.string().max(64),
  machine: z.string().min(1).max(256),
  cpus: z.number().int().positive().max(65536),
});
export type QemuDescription = z.output<typeof descriptionSchema>;

/** `stream`: in pieces, so that they are copied once only while the guest stands. */
export function encodeState(running: boolean, stream: readonly Uint8Array[]): Uint8Array {
  return Buffer.concat([Buffer.from(`${JSON.stringify({ version: 1, running })}\n`), ...stream]);
}

export function decodeState(state: Uint8Array): { running: boolean; stream: Uint8Array } {
  const bytes = Buffer.from(state.buffer, state.byteOffset, state.byteLength);
  const end = bytes.subarray(0, maxHeaderBytes).indexOf(10);
  let header: unknown;
  try {
    header = end < 0 ? null : JSON.parse(bytes.subarray(0, end).toString('utf8'));
  } catch {
    header = null;
  }
  const parsed = headerSchema.safeParse(header);
  // QEMU's own magic number: what does not begin with it would only be refused later, with less said.
  if (!parsed.success || bytes.subarray(end + 1, end + 5).toString('latin1') !== 'QEVM') {
    throw memferryError('PROTOCOL_ERROR', 'this is no state of a QEMU guest');
  }
  return { running: parsed.data.running, stream: bytes.subarray(end + 1) };
}
