/**
 * What the control connection with a VMD server says, checked against these schemas on arrival, sizes and counts
 * bounded. The handshake, the frames and their MACs are those of every control connection.
 *
 * Every request carries a number that its answer repeats, so that several may be under way; `declined` answers any
 * of them. The commit's own messages (`prepare`, `grant`, `query`, `cancel` and their answers) are here as well and
 * carry none: at an image's home server they park it, with the server in the role of the destination. They are about
 * the image that the connection has created or asked to open last; so a claim's grant is called `grant-claim`.
 */
import { z } from 'zod';
import { leaseMilliseconds } from '../options/fields.js';
import { fromDestinationCommit, fromSourceCommit } from './commit-messages.js';
import { count, encodingNames, hex, label, offerSchema, regionIndex } from './messages.js';

/** Ordinals 0 .. 249, see wire::Holders. */
export const maxServers = 250;
export const imageKinds = ['migration', 'park'] as const;
/** `migration`: of a guest on its way. `park`: of a guest that stays until somebody claims it. */
export type ImageKind = (typeof imageKinds)[number];
export const imagePhases = [
  'migrating',
  'committed',
  'parking',
  'parked',
  'claimed',
  'resumed',
  'dissolved',
] as const;
export type ImagePhase = (typeof imagePhases)[number];
/** What an opener's stage connections may do. `control`: it has none. */
export const accesses = ['control', 'read', 'write'] as const;
export type ImageAccess = (typeof accesses)[number];

const number = z
  .number()
  .int()
  .nonnegative()
  .max(2 ** 31 - 1);
const request = number;
const image = hex(16);
const epoch = number;
const claimant = hex(16);
const host = z.string().min(1).max(255);
const port = z.number().int().min(1).max(65535);
const milliseconds = z.number().nonnegative().max(Number.MAX_SAFE_INTEGER);
/** Of a server's memory: another one after each start, the same for everyone. */
const identity = hex(8);
const session = z.number().int().min(1).max(0xfeff);

const servers = z
  .array(z.strictObject({ name: label, host, port }))
  .min(1)
  .max(maxServers);
/** At most 2^31 pages a region: the slab of a server has no more slots. */
const pages = z
  .number()
  .int()
  .min(0)
  .max(2 ** 31);
const regions = z
  .array(z.strictObject({ name: label, pages, capacityPages: pages.min(1) }))
  .min(1)
  .max(64);
const digests = z.array(hex(16)).max(64).nullable();
const guest = offerSchema.shape.guest;
/** What a parked guest is, beside its memory: as in an offer to a destination. */
export type ParkedGuest = z.infer<typeof guest>;

const ordinal = z
  .number()
  .int()
  .min(0)
  .max(maxServers - 1);

/** A domain's key under a connection's session key, see staging/image-secret.ts. */
const sealedDomain = hex(12 + 32 + 16);

const createImage = z.strictObject({
  type: z.literal('create'),
  request,
  image,
  /** The image's secret under this connection's session key, see staging/image-secret.ts. */
  sealedSecret: hex(12 + 32 + 16),
  /** The key of its deduplication domain, sealed likewise; null: it shares nothing. */
  sealedDomain: sealedDomain.nullable(),
  name: label,
  kind: z.enum(imageKinds),
  /** This server's place in `servers`; 0 is the home server. */
  ordinal,
  servers,
  /** With 2 the servers pass pages on to each other. */
  replicas: z.union([z.literal(1), z.literal(2)]),
  pageSize: z
    .number()
    .int()
    .min(4096)
    .max(2 ** 30),
  regions,
  /** How long an uncommitted image outlives the last connection that has it open. */
  leaseMs: leaseMilliseconds,
});
export type CreateImage = z.infer<typeof createImage>;

/** Client to server. */
export const stageRequest = z.discriminatedUnion('type', [
  createImage,
  z.strictObject({
    type: z.literal('open'),
    request,
    image,
    proof: hex(32),
    access: z.enum(accesses),
    /** A claim of the same client's from before its connection was cut. */
    claim: z.strictObject({ claimant, epoch }).nullable(),
  }),
  /** The guest runs elsewhere: the image stays until it is dissolved or dropped. */
  z.strictObject({ type: z.literal('commit'), request, image }),
  /** The same for a park, at every server but home and before GRANT: from here on no lease ends it. */
  z.strictObject({ type: z.literal('hold'), request, image }),
  z.strictObject({ type: z.literal('seal'), request, image, digests }),
  z.strictObject({ type: z.literal('grow'), request, image, region: regionIndex, pages }),
  /** `epoch`: of the claim by which the guest resumed; 0 when it was none. */
  z.strictObject({ type: z.literal('dissolve'), request, image, epoch }),
  /** `rollback`: the caller's word that the guest's owner (as `info` names it) is dead and stays so. */
  z.strictObject({ type: z.literal('claim'), request, image, claimant, rollback: epoch.nullable() }),
  z.strictObject({ type: z.literal('grant-claim'), request, image, claimant, epoch }),
  z.strictObject({ type: z.literal('release-claim'), request, image, claimant, epoch }),
  /** The execution state is the message's binary part. */
  z.strictObject({ type: z.literal('state'), request, image, guest }),
  z.strictObject({ type: z.literal('status'), request }),
  /**
   * Into a domain, to tell what a guest has or to learn what many have, for as long as this connection lasts. `member`:
   * of its own choice, as an image's id. `guest`: null for one that has none; it may not report.
   */
  z.strictObject({ type: z.literal('join'), request, member: image, sealedDomain, guest: image.nullable() }),
  z.strictObject({ type: z.literal('leave'), request, member: image }),
  /** An operator's: of any image, with the shared secret alone. */
  z.strictObject({ type: z.literal('drop'), request, image }),
  ...fromSourceCommit,
]);
export type StageRequest = z.infer<typeof stageRequest>;

const imageInfo = z.strictObject({
  name: label,
  kind: z.enum(imageKinds),
  phase: z.enum(imagePhases),
  ordinal,
  servers,
  replicas: z.union([z.literal(1), z.literal(2)]),
  pageSize: count,
  regions,
  sealed: z.boolean(),
  digests,
  /** The newest claim's, 0 when there was none. */
  epoch,
  /** Who has the guest: 0 a migration's destination, else the epoch of the claim that was granted; null nobody. */
  owner: epoch.nullable(),
});
export type ImageInfo = z.infer<typeof imageInfo>;

const announced = {
  name: label,
  /** The same by whatever address it is reached. */
  identity,
  rack: label.nullable(),
  memoryBytes: count,
  freeBytes: count,
  /** Bytes a second in each direction, 0 for no limit. */
  bandwidth: count,
  images: count,
};
export const announcementSchema = z.strictObject(announced);
/** What a server says of itself, each second on every connection. */
export type Announcement = z.infer<typeof announcementSchema>;

const stageStatus = z.strictObject({
  ...announced,
  maxImages: count,
  connections: count,
  bytesIn: count,
  bytesOut: count,
  /** Pages of all images that share their content with others, by references. */
  sharedPages: count,
  /** Of the memory: what is known of contents by their hashes. */
  hintBytes: count,
  /** Of domains: who tells what a guest has, or learns what many have. */
  members: count,
  /** Contents that are counted, and those whose page is held; these give way to images, so they count as free. */
  popularNames: count,
  popularPages: count,
  uptimeMs: milliseconds,
  held: z
    .array(
      z.strictObject({
        id: image,
        name: label,
        kind: z.enum(imageKinds),
        phase: z.enum(imagePhases),
        ordinal,
        servers: count,
        epoch,
        /** Of the guest, in all. */
        pages: count,
        pagesHeld: count,
        /** Of these: taken over by a reference instead of being sent. */
        pagesShared: count,
        pagesZero: count,
        pagesKnown: count,
        bytes: count,
        bytesIn: count,
        bytesOut: count,
        sealed: z.boolean(),
        ageMs: milliseconds,
      }),
    )
    .max(256),
});
export type StageStatus = z.infer<typeof stageStatus>;

/** Server to client. */
export const stageAnswer = z.discriminatedUnion('type', [
  /** `encodings`: of pages, which this server decodes. */
  z.strictObject({ type: z.literal('created'), request, session, encodings: encodingNames, identity }),
  z.strictObject({ type: z.literal('opened'), request, session: session.nullable(), info: imageInfo }),
  z.strictObject({ type: z.literal('committed'), request }),
  z.strictObject({ type: z.literal('held'), request }),
  z.strictObject({ type: z.literal('sealed'), request }),
  z.strictObject({ type: z.literal('grown'), request }),
  z.strictObject({ type: z.literal('dissolved'), request, known: z.boolean() }),
  /** The execution state is the message's binary part. */
  z.strictObject({ type: z.literal('claimed'), request, epoch, guest }),
  z.strictObject({ type: z.literal('granted'), request }),
  z.strictObject({ type: z.literal('released'), request }),
  z.strictObject({ type: z.literal('stored'), request }),
  z.strictObject({ type: z.literal('status'), request, status: stageStatus }),
  z.strictObject({ type: z.literal('dropped'), request, known: z.boolean() }),
  z.strictObject({ type: z.literal('joined'), request, session, identity }),
  z.strictObject({ type: z.literal('left'), request, known: z.boolean() }),
  z.strictObject({
    type: z.literal('declined'),
    request,
    code: z.string().min(1).max(64),
    message: z.string().max(4096),
    /** Which rule it goes back to, for programs. */
    reason: z.string().max(64).nullable(),
  }),
  z.strictObject({ type: z.literal('announce'), ...announced }),
  ...fromDestinationCommit,
]);
export type StageAnswer = z.infer<typeof stageAnswer>;
