/**
 * What the control connection says, checked against these schemas on arrival. The commit's own messages come
 * from commit.ts. Sizes and counts are bounded here; a destination's own limits are applied after that.
 */
import { z } from 'zod';
import { modes } from '../options.js';
import { fromDestinationCommit, fromSourceCommit } from './commit-messages.js';

export const hex = (bytes: number) => z.string().regex(new RegExp(`^[0-9a-f]{${bytes * 2}}$`));
export const label = z.string().min(1).max(64);
export const count = z.number().int().nonnegative().max(Number.MAX_SAFE_INTEGER);
const finite = z.number().nonnegative().finite();
export const regionIndex = z.number().int().min(0).max(63);

/** Names that are not known yet are passed over; a peer that names none knows none. */
export const encodingNames = z.array(label).max(16).default([]);

export const offerSchema = z.strictObject({
  type: z.literal('offer'),
  migrationId: hex(16),
  mode: z.enum(modes),
  /** The mode may end in post-copy. */
  mayPage: z.boolean(),
  verify: z.boolean(),
  channels: z.number().int().min(1).max(16),
  /** How the source may want to encode pages; see encodings.ts. */
  encodings: encodingNames,
  /** The source compares with a base, should the destination have one. */
  base: z.boolean().default(false),
  /** A log of operations since the base is the message's binary part. */
  replay: z.boolean().default(false),
  /** The guest's lineage, sealed for this session: without it no stored base is laid out. */
  lineage: z
    .string()
    .regex(/^[0-9a-f]{120}$/)
    .nullable()
    .default(null),
  /** Other modes, with `dedup`: see references.ts. */
  references: z
    .strictObject({ proof: hex(32), sealedKey: hex(60).nullable() })
    .nullable()
    .default(null),
  /** Scatter modes: the servers, in the order of their ordinals, and the image's secret, sealed for this session. */
  scatter: z
    .strictObject({
      servers: z
        .array(
          z.strictObject({
            name: label,
            host: z.string().min(1).max(255),
            port: z.number().int().min(1).max(65535),
          }),
        )
        .min(1)
        .max(250),
      sealedSecret: z.string().regex(/^(?:[0-9a-f]{2}){1,256}$/),
      gatherTimeoutMs: z.number().positive().finite(),
    })
    .nullable()
    .default(null),
  guest: z.strictObject({
    name: label,
    module: z.strictObject({ name: label, sha256: hex(32) }).nullable(),
    description: z.unknown(),
    regions: z
      .array(
        z.strictObject({
          name: label,
          lengthBytes: count,
          capacityBytes: count,
          pageSize: z
            .number()
            .int()
            .min(4096)
            .max(2 ** 30),
        }),
      )
      .min(1)
      .max(64),
  }),
});
export type OfferMessage = z.infer<typeof offerSchema>;

const runs = z.array(z.strictObject({ region: regionIndex, first: count, count: count.min(1) })).max(4096);

const faults = z.strictObject({ count, p50Us: finite, p99Us: finite, maxUs: finite });

/** Source to destination. */
export const sourceMessage = z.discriminatedUnion('type', [
  offerSchema,
  /** A control connection that replaces a cut one; `proof` shows knowledge of the first one's session key. */
  z.strictObject({ type: z.literal('resume-session'), migrationId: hex(16), proof: hex(32) }),
  /** The source does not wait for the base any more; `base-ready` is still to come. */
  z.strictObject({ type: z.literal('base-cancel') }),
  /** Nor for the log to be applied to it: the base is to do as it is. `base-ready` is still to come. */
  z.strictObject({ type: z.literal('base-skip-replay') }),
  z.strictObject({ type: z.literal('grow'), region: regionIndex, lengthBytes: count }),
  /** After a round: how much of what servers hold is still to be gathered? */
  z.strictObject({ type: z.literal('ask-missing'), question: count }),
  /**
   * The guest is paused; its execution state is the message's binary part. PREPARE follows. `paging`: the switch
   * to post-copy is on its way over the data channels, and comes before `prepare`.
   */
  z.strictObject({ type: z.literal('state'), paging: z.boolean() }),
  /** Every page was acknowledged; digests of the regions as they left, or null when not asked for. */
  z.strictObject({ type: z.literal('evicted'), digests: z.array(hex(16)).max(64).nullable() }),
  z.strictObject({ type: z.literal('goodbye') }),
  ...fromSourceCommit,
]);
export type SourceMessage = z.infer<typeof sourceMessage>;

/** Destination to source. */
export const destinationMessage = z.discriminatedUnion('type', [
  /**
   * `encodings`: those of the offer that this side decodes. `basePages`: how many pages of each region start from a base;
   * `base-ready` follows, and no page may come before.
   */
  z.strictObject({
    type: z.literal('accepted'),
    encodings: encodingNames,
    basePages: z.array(count).max(64).nullable().default(null),
    /** It answers `ask-missing`. */
    tellsMissing: z.boolean().default(false),
    /** Of the same domain, and names of what is here follow on the data channels. */
    references: hex(32).nullable().default(null),
  }),
  /**
   * How much of the base is there, and what the rest will take besides (null: nobody knows). `sampled`: the nodes of the
   * sample (base-sample.ts) are there. `replays`: a log is applied to the base next, or is being applied when all of it is
   * there; so the sample may only be asked about. Otherwise it may be compared.
   */
  z.strictObject({
    type: z.literal('base-progress'),
    sampled: z.boolean(),
    replays: z.boolean().default(false),
    fraction: z.number().min(0).max(1),
    expectedMs: finite.nullable(),
  }),
  /** Nobody here writes the regions any more. `ready`: there is something to compare with. */
  z.strictObject({
    type: z.literal('base-ready'),
    ready: z.boolean(),
    problem: z.string().max(1024).nullable(),
    fillMs: finite,
    replayMs: finite,
  }),
  z.strictObject({
    type: z.literal('declined'),
    code: z.string().max(64),
    message: z.string().max(4096),
    names: z.array(z.string().max(256)).max(256),
  }),
  z.strictObject({ type: z.literal('session-resumed'), known: z.boolean() }),
  z.strictObject({ type: z.literal('grown'), region: regionIndex }),
  /** The answer to `ask-missing`. */
  z.strictObject({ type: z.literal('missing'), pages: count, question: count }),
  /** How long `prepare` took; sent just after READY. */
  z.strictObject({ type: z.literal('prepared'), prepareMs: finite }),
  /** Every page is in the destination's memory. */
  z.strictObject({ type: z.literal('complete') }),
  /** The answer to `evicted`: the destination's figures, and the regions whose digests differ. */
  z.strictObject({
    type: z.literal('summary'),
    remoteFaults: faults,
    extraMemoryBytes: count,
    mismatched: z.array(regionIndex).max(64),
  }),
  /** Pages that the destination lacks for good; none are named where it can take in nothing more at all. */
  z.strictObject({ type: z.literal('lost'), runs }),
  /** The answer to `evicted` where there is nothing of the migration (any more): no account of it will come. */
  z.strictObject({ type: z.literal('over') }),
  ...fromDestinationCommit,
]);
export type DestinationMessage = z.infer<typeof destinationMessage>;
