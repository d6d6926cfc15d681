/** What `unpark` may be told. */
import { z } from 'zod';
import { bytes, connectionShape, label, milliseconds, parse } from './fields.js';
import type { ListenOptions } from './listen.js';

const path = z.string().min(1);
/** Of each region by its name: a raw image file, from its beginning or from `offsetBytes` on. */
const baseImages = z
  .record(label, z.union([path, z.strictObject({ path, offsetBytes: bytes.default(0) })]))
  .refine((images) => Object.keys(images).length > 0, 'names no region');

const unparkSchema = z.strictObject({
  ...connectionShape,
  signal: z.instanceof(AbortSignal).optional(),
  /** The caller's word that whoever resumed the guest before is dead and stays so. */
  rollback: z.boolean().default(false),
  /**
   * Resume it although servers are away, or have lost it, that hold pages of which there is no other copy. These pages are
   * lost if they do not come back. Without it such a guest stays parked.
   */
  withLosses: z.boolean().default(false),
  /** Compare digests with those of the guest as it was parked. */
  verify: z.boolean().default(true),
  /** Bytes a second fetched ahead of the guest; 0 for no limit. Faults are never held back. */
  gatherLimit: bytes.default(0),
  /**
   * What this host has of the guest, where `accept` gives it no `bases` in files: a directory of bases in files (what
   * `keepStaleCopy` or `saveBase` wrote there of the same guest, or with `anySource` of one of that name and module), or
   * image files. Pages that are the same are not fetched. None of it needs to be right, or readable.
   */
  base: z
    .union([
      z.strictObject({ directory: path, anySource: z.boolean().default(false) }),
      z.strictObject({ images: baseImages }),
    ])
    .optional(),
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
