/** What a page share, and page distribution (`sampleGuest`, `distribute`), may be told. */
import { z } from 'zod';
import { parseAddress } from './address.js';
import {
  bytes,
  type ConnectionOptions,
  connectionShape,
  type DedupOptions,
  dedupSchema,
  milliseconds,
  parse,
  type Same,
} from './fields.js';

/** What `Share.open` may be told. */
export interface ShareOptions {
  /** All that the share may take: its pages and their index, in bytes. */
  budgetBytes: number;
  /** The domain whose guests' pages these are, as a guest's (`MigrateOptions.dedup`). */
  dedup: DedupOptions;
  /**
   * The hosts' shared secret, from which a domain without a secret of its own has its key; at least 16 bytes. Without one
   * the secret file is read.
   */
  secret?: Uint8Array | string;
  /** A file that holds that secret, mode 0600; with neither, the one that is made automatically for each user. */
  secretFile?: string;
  /** The share's file; without one, the domain's in this user's directory on tmpfs. */
  file?: string;
}

const shareSchema = z.strictObject({
  budgetBytes: bytes,
  dedup: dedupSchema,
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  file: z.string().min(1).optional(),
});
true satisfies Same<z.input<typeof shareSchema>, ShareOptions>;

export type ResolvedShareOptions = z.output<typeof shareSchema>;

/** What `sampleGuest` and `distribute` have in common: how they reach the servers that count a domain's pages. */
export interface DirectoriesOptions extends Omit<ConnectionOptions, 'recoverTimeoutMs'> {
  /**
   * Of the VMD servers (`memferry stage`) that count the domain's pages: `host:port` each, 1 to 64, the same for all its
   * hosts.
   */
  via: readonly string[];
  /** Whose pages these are: guests and hosts of other domains learn nothing of them. */
  dedup: DedupOptions;
  /** For a server to answer, in ms; it is asked again later. Default 5000. */
  connectTimeoutMs?: number;
  /** Aborting it is `close`. */
  signal?: AbortSignal;
}

const directoriesShape = {
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  via: z.array(z.string().min(1)).min(1).max(64).readonly(),
  dedup: dedupSchema,
  connectTimeoutMs: milliseconds.default(5_000),
  signal: z.instanceof(AbortSignal).optional(),
};

/** What `sampleGuest` may be told. */
export interface SampleOptions extends DirectoriesOptions {
  /** How much of one core it takes at most, by CPU time, above 0 and up to 1. Default 0.01. */
  cpuShare?: number;
  /** From the start of a pass over the guest's memory to the next one's, at least, in ms. Default 10 000. */
  passIntervalMs?: number;
  /** Pages whose hashes are remembered, 8 bytes each; what is beyond is not sampled. From 512; default 4 Mi (16 GiB). */
  maxPages?: number;
}

const sampleSchema = z.strictObject({
  ...directoriesShape,
  cpuShare: z.number().positive().max(1).default(0.01),
  passIntervalMs: milliseconds.default(10_000),
  maxPages: z
    .number()
    .int()
    .min(512)
    .max(2 ** 31)
    .default(4 * 2 ** 20),
});
true satisfies Same<z.input<typeof sampleSchema>, SampleOptions>;

export type ResolvedSampleOptions = z.output<typeof sampleSchema>;

/** What `distribute` may be told. */
export interface DistributeOptions extends DirectoriesOptions {
  /** From the end of a round to the next one, in ms, up to a day. Default 30 000. */
  intervalMs?: number;
  /** Bytes a second that fetching pages takes; 0, the default, for no limit. */
  bandwidth?: number;
}

const distributeSchema = z.strictObject({
  ...directoriesShape,
  intervalMs: milliseconds.max(24 * 3600 * 1000).default(30_000),
  bandwidth: bytes.default(0),
});
true satisfies Same<z.input<typeof distributeSchema>, DistributeOptions>;

export type ResolvedDistributeOptions = z.output<typeof distributeSchema>;
/** What both have. */
export type ResolvedDirectoriesOptions = Pick<
  ResolvedSampleOptions,
  'secret' | 'secretFile' | 'plaintext' | 'peerTimeoutMs' | 'via' | 'dedup' | 'connectTimeoutMs'
>;

export function resolveShareOptions(options: ShareOptions): ResolvedShareOptions {
  return parse(shareSchema, options, 'share');
}

export function resolveSampleOptions(options: SampleOptions): ResolvedSampleOptions {
  const parsed = parse(sampleSchema, options, 'sampleGuest');
  for (const address of parsed.via) parseAddress(address);
  return parsed;
}

export function resolveDistributeOptions(options: DistributeOptions): ResolvedDistributeOptions {
  const parsed = parse(distributeSchema, options, 'distribute');
  for (const address of parsed.via) parseAddress(address);
  return parsed;
}
