/** What `stage` may be told. */
import { z } from 'zod';
import { parseGroup } from './address.js';
import {
  bytes,
  type ConnectionOptions,
  connectionShape,
  label,
  milliseconds,
  parse,
  type Same,
} from './fields.js';

/** `group:port` of the VMD's announcements where none is named. */
export const defaultAnnounceGroup = '239.255.77.77:7077';

/** What `stage` may be told. Times are in ms, above 0 and up to 7 days; sizes and rates are whole numbers of bytes. */
export interface StageOptions extends Omit<ConnectionOptions, 'recoverTimeoutMs'> {
  /**
   * An address of this host, or a name that has one; `0.0.0.0` and `::` are all of its addresses. Names other than
   * `localhost` count as an open network, which needs `plaintext` and a secret. Default `127.0.0.1`.
   */
  host?: string;
  /** 0, the default: any that is free; `Staging.port` says which. */
  port?: number;
  /** Aborting it closes the server. */
  signal?: AbortSignal;
  /**
   * All that the server may hold, in bytes, from 16 MiB: pages, their index, execution states. Less, where the machine or
   * the control group has less to spare when pages come: they are refused then, as by a full server.
   */
  memoryBytes: number;
  /**
   * Take all of it from the system at the start and keep it: it is there when a migration needs it, and receiving is
   * not slowed down by taking it then. Default false.
   */
  preallocate?: boolean;
  /** Bytes a second in each direction over all images; 0, the default, for no limit. */
  bandwidth?: number;
  /** How it is called in reports and errors, 1 to 64 characters; `host:port` without one. */
  name?: string;
  /** Where it stands, for the placement; any word that hosts of one rack have in common. Default null: not known. */
  rack?: string | null;
  /** The multicast `group:port` to which it is announced each second. Default null: none. */
  announce?: string | null;
  /**
   * How long a parked image stays that nobody opens or claims, in ms, up to 24 days. Default null: until it is dissolved
   * or dropped.
   */
  parkTtlMs?: number | null;
  /** Images at the same time, 1 to 256; one more is refused with VMD_CAPACITY. Default 256. */
  maxImages?: number;
  /**
   * Page distribution: how much of the memory may hold pages that many guests have, 0 to 0.5. Images get that room when
   * they need it. Default 0.125.
   */
  popularShare?: number;
  /**
   * Page distribution: what a guest has not reported for so long no longer counts after as long again, in ms, from 100.
   * Default 600 000.
   */
  popularHalfLifeMs?: number;
  /** Execution state of one parked guest, in bytes. Default 64 MiB. */
  maxStateBytes?: number;
  /** A park that is READY: how long to wait for GRANT before it is refused for good, in ms. Default 20 000. */
  grantTimeoutMs?: number;
  /** How long a claim that was not granted outlives its claimant's connection, in ms. Default 10 000. */
  claimLeaseMs?: number;
}

const stageSchema = z.strictObject({
  secret: connectionShape.secret,
  secretFile: connectionShape.secretFile,
  plaintext: connectionShape.plaintext,
  peerTimeoutMs: connectionShape.peerTimeoutMs,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  memoryBytes: bytes.min(16 * 2 ** 20),
  preallocate: z.boolean().default(false),
  bandwidth: bytes.default(0),
  name: label.optional(),
  rack: label.nullable().default(null),
  announce: z.string().min(1).nullable().default(null),
  parkTtlMs: z
    .number()
    .positive()
    // Timers of the platform end at 2^31 ms.
    .max(24 * 24 * 3600 * 1000)
    .nullable()
    .default(null),
  maxImages: z.number().int().min(1).max(256).default(256),
  popularShare: z.number().min(0).max(0.5).default(0.125),
  popularHalfLifeMs: milliseconds.min(100).default(600_000),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  grantTimeoutMs: milliseconds.default(20_000),
  claimLeaseMs: milliseconds.default(10_000),
});
true satisfies Same<z.input<typeof stageSchema>, StageOptions>;

export type ResolvedStageOptions = z.output<typeof stageSchema>;

export function resolveStageOptions(options: StageOptions): ResolvedStageOptions {
  const parsed = parse(stageSchema, options, 'stage');
  if (parsed.announce !== null) parseGroup(parsed.announce);
  return parsed;
}
