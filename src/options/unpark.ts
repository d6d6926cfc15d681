/** What `unpark` may be told. */
import { z } from 'zod';
import {
  bytes,
  type ConnectionOptions,
  connectionShape,
  label,
  milliseconds,
  parse,
  type Same,
} from './fields.js';
import { checkAccept, type ListenOptions } from './listen.js';

/** What `unpark` may be told. Times are in ms, above 0 and up to 7 days; sizes and rates are whole numbers of bytes. */
export interface UnparkOptions extends ConnectionOptions, Pick<ListenOptions, 'accept'> {
  /** Aborting it gives the claim back, until the home server is asked to grant it: from then on it ends nothing. */
  signal?: AbortSignal;
  /** The caller's word that whoever resumed the guest before is dead and stays so. Default false. */
  rollback?: boolean;
  /**
   * Resume it although servers are away, or have lost it, that hold pages of which there is no other copy. These pages are
   * lost if they do not come back. Without it such a guest stays parked. Default false.
   */
  withLosses?: boolean;
  /** Compare digests with those of the guest as it was parked: VERIFICATION_FAILED. Default true. */
  verify?: boolean;
  /** Bytes a second fetched ahead of the guest; 0, the default, for no limit. Faults are never held back. */
  gatherLimit?: number;
  /**
   * What this host has of the guest, where `accept` gives it no `bases` in files: a directory of bases in files (what
   * `keepStaleCopy` or `saveBase` wrote there of the same guest, or with `anySource`, default false, of one of that name
   * and module), or image files: of each region by its name a raw one, from its beginning or from `offsetBytes` on. Pages
   * that are the same are not fetched. None of it needs to be right, or readable.
   */
  base?:
    | { directory: string; anySource?: boolean }
    | { images: Record<string, string | { path: string; offsetBytes?: number }> };
  /** The longest execution state that is taken, in bytes. Default 64 MiB. */
  maxStateBytes?: number;
  /** For each server to answer, in ms: CONNECT_FAILED. Default 5000. */
  connectTimeoutMs?: number;
  /** For `accept`, in ms: PREPARE_TIMEOUT, the guest stays parked, and what `accept` comes to later is abandoned. Default 120 000. */
  acceptTimeoutMs?: number;
  /**
   * For `prepare`, in ms: PREPARE_TIMEOUT, and the guest stays parked. After so long an `abandon` counts as failed. Default
   * 10 000.
   */
  prepareTimeoutMs?: number;
  /** How long to ask whether the claim was granted before MIGRATION_IN_DOUBT, in ms. Default 30 000. */
  inDoubtTimeoutMs?: number;
}

const path = z.string().min(1);
const baseImages = z
  .record(label, z.union([path, z.strictObject({ path, offsetBytes: bytes.default(0) })]))
  .refine((images) => Object.keys(images).length > 0, 'names no region');

const unparkSchema = z.strictObject({
  ...connectionShape,
  signal: z.instanceof(AbortSignal).optional(),
  rollback: z.boolean().default(false),
  withLosses: z.boolean().default(false),
  verify: z.boolean().default(true),
  gatherLimit: bytes.default(0),
  base: z
    .union(
      [
        z.strictObject({ directory: path, anySource: z.boolean().default(false) }),
        z.strictObject({ images: baseImages }),
      ],
      'expected { directory } of bases in files, or { images } with at least one region',
    )
    .optional(),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  connectTimeoutMs: milliseconds.default(5_000),
  acceptTimeoutMs: milliseconds.default(120_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  inDoubtTimeoutMs: milliseconds.default(30_000),
});
true satisfies Same<z.input<typeof unparkSchema>, Omit<UnparkOptions, 'accept'>>;

export type ResolvedUnparkOptions = z.output<typeof unparkSchema> & Pick<ListenOptions, 'accept'>;

export function resolveUnparkOptions(options: UnparkOptions): ResolvedUnparkOptions {
  const { accept, ...rest } = options ?? {};
  checkAccept(accept, 'unpark');
  return { ...parse(unparkSchema, rest, 'unpark'), ...(accept ? { accept } : {}) };
}
