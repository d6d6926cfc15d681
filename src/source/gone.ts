/**
 * From what failed to what is said of it: whose end it was, and what became of the guest. Pure but for asking regions,
 * and for waiting for a destination's own words.
 */
import { fromNative, MemferryError, memferryError } from '../errors.js';
import type { Guest } from '../guest.js';

/** How long a cut data connection waits for the destination's own words; they are on their way, or never come. */
const refusalGraceMs = 500;

/** Memory of another process that has ended: whatever failed, failed for that. */
export function ownerGone(guest: Guest): MemferryError | null {
  const gone = guest.regions.find(
    ({ region }) => !region.closed && region.native.attached()?.alive === false,
  );
  return gone
    ? memferryError('OWNER_GONE', `the process that owns region '${gone.name}' is gone`, {
        facts: { region: gone.name },
      })
    : null;
}

/** The engine cuts its connections when a region goes; the destination's complaint may be here before its own. */
export function regionGone(guest: Guest): MemferryError | null {
  const owner = ownerGone(guest);
  if (owner) return owner;
  const gone = guest.regions.find(({ region }) => region.native.retired());
  return gone
    ? memferryError('REGION_GONE', `region '${gone.name}' went away while it moved`, {
        facts: { region: gone.name },
      })
    : null;
}

/**
 * A destination that gives up ends its data connections and says why over the control connection: whichever
 * comes first. The guest runs here again already; only the error waits for the better account.
 */
export async function reasonOfCut(
  cut: MemferryError,
  refusal: Promise<MemferryError>,
): Promise<MemferryError> {
  // Timers that are due run before sockets are read: what came while this thread stood still counts first.
  const late = new Promise<null>((resolve) => {
    setTimeout(() => setImmediate(resolve, null), refusalGraceMs);
  });
  const refused = await Promise.race([refusal, late]);
  // What only repeats our own cancel says nothing new.
  return refused && !['CHANNEL_LOST', 'CANCELLED'].includes(refused.code) ? refused : cut;
}

/**
 * After the commit: the destination has the guest, and something went wrong with its pages or its account.
 * @param pending pages that nobody has acknowledged; null when the guest was evicted
 * @param atServers pages that VMD servers took
 */
export function afterCommit(cause: unknown, pending: number | null, atServers: number): MemferryError {
  const inner = fromNative(cause);
  if (inner.code !== 'PEER_LOST') return inner;
  if (pending === null) {
    if (atServers === 0) return inner;
    return new MemferryError(
      'GUEST_LOST',
      `the guest was committed to the destination, and the source does not run it: ${inner.message}; ` +
        `${atServers} pages had gone to VMD servers, where they stay unless it has gathered them`,
      { cause: inner, facts: { pages: atServers } },
    );
  }
  return new MemferryError(
    'GUEST_LOST',
    `the guest was committed to the destination, which cannot be reached any more; ${pending} pages ` +
      'never arrived, and the source does not run it',
    { cause: inner, facts: { pages: pending } },
  );
}
