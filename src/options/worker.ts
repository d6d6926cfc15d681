/** What the host's side of worker guests may be told. */
import type { ResourceLimits } from 'node:worker_threads';
import { z } from 'zod';
import { memferryError } from '../errors.js';
import type { WorkerGuest } from '../worker/worker-guest.js';
import type { WorkerGuestsOptions } from '../worker/worker-arrival.js';
import type { WorkerGuestOptions } from '../worker/worker-guest.js';
import { bytes, callback, milliseconds, parse, type Same } from './fields.js';

const megabytes = z
  .number()
  .positive()
  .max(2 ** 20)
  .optional();
const resourceLimits: z.ZodType<ResourceLimits, ResourceLimits> = z.strictObject({
  maxYoungGenerationSizeMb: megabytes,
  maxOldGenerationSizeMb: megabytes,
  codeRangeSizeMb: megabytes,
  stackSizeMb: megabytes,
});

const named = (whose: string) =>
  z
    .string(`${whose} has a name of 1 to 64 characters`)
    .min(1, `${whose} has a name of 1 to 64 characters`)
    .max(64, `${whose} has a name of 1 to 64 characters`);
const url = z.union([z.instanceof<new (url: string) => URL>(URL), z.string()], 'expected a file: URL');
const pages = z.number();

const startSchema = z.strictObject({
  name: named('a guest').optional(),
  module: z.strictObject({ name: named("a guest's module"), url }, 'expected { name, url }'),
  data: z.unknown().optional(),
  workers: z
    .number('a guest has 1 to 64 workers')
    .int('a guest has 1 to 64 workers')
    .min(1, 'a guest has 1 to 64 workers')
    .max(64, 'a guest has 1 to 64 workers')
    .default(1),
  sharedHeapBytes: bytes.default(0),
  sharedMemory: z.strictObject({ initialPages: pages, maximumPages: pages }).optional(),
  pauseTimeoutMs: milliseconds.default(5000),
  resourceLimits: resourceLimits.optional(),
});
true satisfies Same<z.input<typeof startSchema>, WorkerGuestOptions>;

type Replay = NonNullable<NonNullable<WorkerGuestsOptions['base']>['replay']>;

const arrivalsSchema = z.strictObject({
  modules: z.record(z.string(), url, 'expected { name: a file: URL, ... }'),
  onGuest: callback<[guest: WorkerGuest]>().optional(),
  base: z
    .strictObject({
      directory: z.string().min(1),
      anySource: z.boolean().optional(),
      replay: z.custom<Replay>((value) => typeof value === 'function', 'must be a function').optional(),
      replayMs: milliseconds.optional(),
    })
    .optional(),
  pauseTimeoutMs: milliseconds.optional(),
  resourceLimits: resourceLimits.optional(),
});
true satisfies Same<z.input<typeof arrivalsSchema>['onGuest'], WorkerGuestsOptions['onGuest']>;

export type ResolvedWorkerGuestOptions = z.output<typeof startSchema>;

export function resolveWorkerGuestOptions(options: WorkerGuestOptions): ResolvedWorkerGuestOptions {
  return parse(startSchema, options, 'WorkerGuest.start');
}

/** Each module's URL too. Whether the files are there shows when a guest comes: a host may list what it gets later. */
export function checkWorkerGuestsOptions(options: WorkerGuestsOptions): void {
  parse(arrivalsSchema, options, 'workerGuests');
  for (const [name, listed] of Object.entries(options.modules)) {
    moduleUrl(listed, `workerGuests: modules['${name}']`);
  }
}

/** Only files have a content that can be checked before it runs. @throws INVALID_ARGUMENT */
export function moduleUrl(given: URL | string, what: string): URL {
  let parsed: URL;
  try {
    parsed = new URL(given);
  } catch (cause) {
    throw memferryError(
      'INVALID_ARGUMENT',
      `${what} is no URL: ${String(given)} (of a path, url.pathToFileURL makes one)`,
      { cause },
    );
  }
  if (parsed.protocol === 'file:') return parsed;
  throw memferryError('INVALID_ARGUMENT', `${what}: a guest's module is a file: URL, not ${parsed.protocol}`);
}
