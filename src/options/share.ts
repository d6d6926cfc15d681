/** What a page share, and page distribution (`sampleGuest`, `distribute`), may be told. */
import { z } from 'zod';
import { parseAddress } from './address.js';
import { bytes, connectionShape, dedupSchema, milliseconds, parse } from './fields.js';

const shareSchema = z.strictObject({
  /** All that the share may take: its pages and their index, in bytes. */
  budgetBytes: bytes,
  /** As a guest's. */
  dedup: dedupSchema,
  /** The hosts' shared secret, from which a domain without a secret of its own has its key; else the secret file. */
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  /** Its file; without one, the domain's in this user's directory on tmpfs. */
  file: z.string().min(1).optional(),
});

export type ShareOptions = z.input<typeof shareSchema>;
export type ResolvedShareOptions = z.output<typeof shareSchema>;

const directoriesShape = {
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  /** Of the VMD servers (`memferry stage`) that count the domain's pages: `host:port` each, the same for all its hosts. */
  via: z.array(z.string().min(1)).min(1).max(64),
  /** Whose pages these are: guests and hosts of other domains learn nothing of them. */
  dedup: dedupSchema,
  connectTimeoutMs: milliseconds.default(5_000),
  signal: z.instanceof(AbortSignal).optional(),
};

const sampleSchema = z.strictObject({
  ...directoriesShape,
  /** How much of one core it takes at most, by CPU time. */
  cpuShare: z.number().positive().max(1).default(0.01),
  /** From the start of a pass over the guest's memory to the next one's, at least, in ms. */
  passIntervalMs: milliseconds.default(10_000),
  /** Pages whose hashes are remembered, 8 bytes each; what is beyond is not sampled. */
  maxPages: z
    .number()
    .int()
    .min(512)
    .max(2 ** 31)
    .default(4 * 2 ** 20),
});
export type SampleOptions = z.input<typeof sampleSchema>;
export type ResolvedSampleOptions = z.output<typeof sampleSchema>;

const distributeSchema = z.strictObject({
  ...directoriesShape,
  /** From the end of a round to the next one, in ms. */
  intervalMs: milliseconds.max(24 * 3600 * 1000).default(30_000),
  /** Bytes a second that fetching pages takes; 0 for no limit. */
  bandwidth: bytes.default(0),
});
export type DistributeOptions = z.input<typeof distributeSchema>;
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
