/** What a source says about a worker guest before its first page: plain JSON, checked by the destination. */
import { z } from 'zod';

import { memferryError } from '../errors.js';
import type { WorkerShape } from './messages.js';

const count = z.number().int().min(0).max(4096);
const bytes = z.number().int().min(0).max(Number.MAX_SAFE_INTEGER);

const schema = z.strictObject({
  runtime: z.literal('memferry-worker'),
  version: z.literal(2),
  data: z.unknown(),
  sharedHeapBytes: bytes,
  /** The largest that the memory may become which all workers import, in WebAssembly pages. */
  sharedMemoryPages: z.number().int().min(1).max(65_536).nullable().default(null),
  workers: z
    .array(
      z.strictObject({
        /** Which memories and heaps have regions, in the order of the offer's regions. */
        regions: z.array(z.strictObject({ kind: z.enum(['memory', 'heap']), index: count })).max(4096),
        /** The first 16 digits of each instance's binary's SHA-256. */
        instances: z.array(z.string().regex(/^[0-9a-f]{16}$/)).max(4096),
        build: z
          .strictObject({
            functions: z.number().int().min(0),
            references: z.string().max(16),
            layout: z.array(z.string().max(256)).max(64),
            grown: z.array(count).max(4096).default([]),
          })
          .nullable()
          .default(null),
        hostFunctions: z.array(z.string().max(128)).max(256).default([]),
      }),
    )
    .min(1)
    .max(64),
});

export type GuestDescription = z.output<typeof schema>;

export function describeGuest(from: {
  data: unknown;
  sharedHeapBytes: number;
  sharedMemoryPages: number | null;
  links: WorkerShape[];
}): GuestDescription {
  return {
    runtime: 'memferry-worker',
    version: 2,
    data: from.data,
    sharedHeapBytes: from.sharedHeapBytes,
    sharedMemoryPages: from.sharedMemoryPages,
    workers: from.links.map(({ regions, instances, build, hostFunctions }) => ({
      regions: regions.map(({ kind, index }) => ({ kind, index })),
      instances,
      build,
      hostFunctions,
    })),
  };
}

export function parseDescription(value: unknown): GuestDescription {
  const result = schema.safeParse(value);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  throw memferryError(
    'PROTOCOL_ERROR',
    `no description of a worker guest: ${issue?.path.join('.')} ${issue?.message}`,
  );
}
