/**
 * The commit's messages as they arrive from a peer: the schemas of what commit.ts has as types. The arrays are
 * spread into the control channel's unions, next to the messages of the rest of a migration.
 */
import { z } from 'zod';
import type { DestinationMessage, SourceMessage } from './commit.js';

/** A source redials for seconds to minutes, at most some times a second: far below this. */
const epoch = z
  .number()
  .int()
  .nonnegative()
  .max(2 ** 31 - 1);
const cause = { code: z.string().min(1).max(64), message: z.string().max(4096) };

export const fromSourceCommit = [
  z.strictObject({ type: z.literal('prepare'), epoch }),
  z.strictObject({ type: z.literal('grant'), epoch }),
  z.strictObject({ type: z.literal('query'), epoch }),
  z.strictObject({ type: z.literal('cancel'), epoch, ...cause }),
] as const;

export const fromDestinationCommit = [
  z.strictObject({ type: z.literal('ready'), epoch }),
  z.strictObject({ type: z.literal('resumed'), epoch }),
  z.strictObject({ type: z.literal('refused'), epoch, ...cause }),
  z.strictObject({ type: z.literal('unknown-migration'), epoch }),
] as const;

// Types and schemas must not drift apart: each must be assignable to the other.
type Same<A, B> = [A] extends [B] ? ([B] extends [A] ? true : never) : never;
export type SchemasMatchTypes = [
  Same<z.infer<(typeof fromSourceCommit)[number]>, SourceMessage>,
  Same<z.infer<(typeof fromDestinationCommit)[number]>, DestinationMessage>,
];
const schemasMatchTypes: SchemasMatchTypes = [true, true];
void schemasMatchTypes;
