/** What `unpark` may be told. */
import { z } from 'zod';
import { bytes, connectionShape, milliseconds, parse } from './fields.js';
import type { ListenOptions } from './listen.js';

const unparkSchema = z.strictObject({
  ...connectionShape,
  signal: z.instanceof(AbortSignal).optional(),
  /** The caller's word that whoever resumed the guest before is dead and stays so. */
  rollback: z.boolean().default(false),
  /** Compare digests with those of the guest as it was parked. */
  verify: z.boolean().default(true),
  /** Bytes a second fetched ahead of the guest; 0 for no limit. Faults are never held back. */
  gatherLimit: bytes.default(0),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  connectTimeoutMs: milliseconds.default(5_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  /** How long to ask whether the claim was granted, in ms. */
  inDoubtTimeoutMs: milliseconds.default(30_000),
});
export type UnparkOptions = z.input<typeof unparkSchema> & Pick<ListenOptions, 'accept'>;
export type ResolvedUnparkOptions = z.output<typeof unparkSchema> & Pick<ListenOptions, 'accept'>;

export function resolveUnparkOptions(options: UnparkOptions): ResolvedUnparkOptions {
  const { accept, ...rest } = options;
  return { ...parse(unparkSchema, rest, 'unpark'), ...(accept ? { accept } : {}) };
}
