/** What `stage` may be told. */
import { z } from 'zod';
import { parseGroup } from './address.js';
import { bytes, connectionShape, label, milliseconds, parse } from './fields.js';

/** `group:port` of the VMD's announcements where none is named. */
export const defaultAnnounceGroup = '239.255.77.77:7077';

const stageSchema = z.strictObject({
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  /** All that the server may hold: pages, their index, execution states. */
  memoryBytes: bytes.min(16 * 2 ** 20),
  /**
   * Take all of it from the system at the start and keep it: it is there when a migration needs it, and receiving is
   * not slowed down by taking it then.
   */
  preallocate: z.boolean().default(false),
  /** Bytes a second in each direction over all images; 0 for no limit. */
  bandwidth: bytes.default(0),
  /** How it is called in reports and errors; `host:port` without one. */
  name: label.optional(),
  /** Where it stands, for the placement; any word that hosts of one rack have in common. */
  rack: label.nullable().default(null),
  /** The multicast `group:port` to which it is announced each second; null for none. */
  announce: z.string().min(1).nullable().default(null),
  /** How long a parked image stays that nobody opens or claims, in ms; null: until it is dissolved or dropped. */
  parkTtlMs: z
    .number()
    .positive()
    // Timers of the platform end at 2^31 ms.
    .max(24 * 24 * 3600 * 1000)
    .nullable()
    .default(null),
  maxImages: z.number().int().min(1).max(256).default(256),
  /**
   * Page distribution: how much of the memory may hold pages that many guests have, 0 to 0.5. Images get that room when
   * they need it.
   */
  popularShare: z.number().min(0).max(0.5).default(0.125),
  /** Page distribution: what a guest has not reported for so long no longer counts after as long again, in ms. */
  popularHalfLifeMs: milliseconds.min(100).default(600_000),
  /** Execution state of one parked guest, in bytes. */
  maxStateBytes: bytes.default(64 * 2 ** 20),
  /** A park that is READY: how long to wait for GRANT before it is refused for good, in ms. */
  grantTimeoutMs: milliseconds.default(20_000),
  /** How long a claim that was not granted outlives its claimant's connection, in ms. */
  claimLeaseMs: milliseconds.default(10_000),
});

export type StageOptions = z.input<typeof stageSchema>;
export type ResolvedStageOptions = z.output<typeof stageSchema>;

export function resolveStageOptions(options: StageOptions): ResolvedStageOptions {
  const parsed = parse(stageSchema, options, 'stage');
  if (parsed.announce !== null) parseGroup(parsed.announce);
  return parsed;
}
