/**
 * The first phase of a migration: everything that it needs is taken hold of, and the destination asked whether it takes
 * the guest. Ends with the data connections. JavaScript thread.
 */
import type { Guest } from '../guest.js';
import type { ResolvedMigrateOptions } from '../options.js';
import { untilAborted } from '../protocol/bounded.js';
import { gathersFirst, traitsOf } from '../protocol/mode-traits.js';
import { checkGuest, mayHaveRounds } from './check-guest.js';
import { claimRegions } from './claim-regions.js';
import { type EngineListener, SourceEngine } from './engine.js';
import { engineConfig } from './engine-config.js';
import type { Holdings } from './holdings.js';
import { comparablePages, trackersForBase, trackersForRounds } from './migration-trackers.js';
import type { Peer } from './peer.js';
import type { PlannedRoom } from './planned-room.js';
import { SourceSession } from './session.js';
import { stageImage } from './stage-image.js';

export interface SetUpContext {
  guest: Guest;
  options: ResolvedMigrateOptions;
  /** The hosts'. */
  secret: Promise<Uint8Array>;
  /** 16 bytes. */
  migrationId: Buffer;
  peer: Peer;
  signal: AbortSignal;
  /** Of the gang that the guest leaves with. */
  room: PlannedRoom | null;
  engineListener: EngineListener;
}

/** Whoever owns `held` lets go of what is in it when this rejects. */
export async function setUp(context: SetUpContext, held: Holdings): Promise<void> {
  const { guest, options, migrationId, peer, signal, room } = context;
  const { negotiation } = peer;
  const traits = traitsOf(options.mode);
  const id = migrationId.toString('hex');
  await checkGuest(guest, signal, traits.rounds);
  const regions = guest.regions.map(({ region }) => region);
  held.releaseRegions = claimRegions(guest);
  const secret = await context.secret;
  const session = await SourceSession.dial({
    to: options.to,
    secret,
    plaintext: options.plaintext,
    migrationId: id,
    connectTimeoutMs: options.connectTimeoutMs,
    peerTimeoutMs: options.peerTimeoutMs,
    signal,
    onMessage: (message) => peer.onMessage(message),
    onLost: (error) => peer.onLost(error),
  });
  held.session = session;
  const lengths = regions.map((region) => region.refresh());
  held.lengths = [...lengths];
  if (traits.scatter) {
    const staged = { guest, lengths, options, secret, image: id, kind: 'migration', signal, room } as const;
    held.images = await stageImage(staged);
  }
  const encodings = await negotiation.offer({
    session,
    secret,
    migrationId,
    lengths,
    mayPage: traits.paging || options.onNonConvergence === 'post-copy',
    images: held.images,
  });
  const { base, references } = negotiation;
  if (traits.rounds) {
    trackersForRounds(guest, options, held.trackers);
  } else {
    // While a base is compared the guest writes, as in rounds.
    const tracked = base && (await mayHaveRounds(guest, signal));
    held.trackers = tracked ? trackersForBase(guest, options, base) : regions.map(() => null);
  }
  held.engine = new SourceEngine(
    engineConfig({
      guest,
      options,
      session,
      migrationId,
      lengths,
      trackers: held.trackers,
      images: held.images,
      references,
      encodings,
      basePages: comparablePages(base, held.trackers),
      // In rounds before gathering nobody could wait for what went as references.
      dedupInVmd: !gathersFirst(traits) || negotiation.tellsMissing,
    }),
    context.engineListener,
  );
  await untilAborted(held.engine.connect(), signal);
}
