/** What a host makes of a guest that is offered to it, be it by a source or by a parked image. JavaScript thread. */
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { AcceptContext, ListenOptions } from '../options.js';
import { untilAborted, within } from '../protocol/bounded.js';
import { abandonGuest } from './arrived.js';
import { allocateGuest } from './plain-guest.js';

interface Bounds {
  acceptTimeoutMs: number;
  /** For what is let go of again. */
  prepareTimeoutMs: number;
}

/** Still in the owner's hands when nobody waits for it any more: what it comes to is let go of. */
export interface Making {
  /** The guest, or why there is none that the offered one can become. */
  guest: Promise<ArrivingGuest>;
  /** Resolves when nothing of the owner's goes on: until then its memory is taken. */
  over: Promise<void>;
}

/**
 * By the owner's `accept`, or as plain regions. Rejects with the error of `accept`, PREPARE_TIMEOUT, the reason of
 * `context.signal`; NO_MEMORY or PREPARE_FAILED for a guest that is none, or no match: what the owner made is let go of
 * then.
 */
export function makeArriving(
  accept: ListenOptions['accept'],
  offer: GuestOffer,
  context: AcceptContext,
  { acceptTimeoutMs, prepareTimeoutMs }: Bounds,
): Making {
  if (!accept) return { guest: Promise.resolve(allocateGuest(offer)), over: Promise.resolve() };
  const made = (async () => {
    const guest = await accept(offer, context);
    const problem = mismatch(guest, offer);
    if (problem === null) return guest;
    if (typeof Object(guest).abandon === 'function') await abandonGuest(guest, offer.name, prepareTimeoutMs);
    throw problem;
  })();
  const guest = within(
    untilAborted(made, context.signal),
    acceptTimeoutMs,
    'PREPARE_TIMEOUT',
    `accept did not end within ${acceptTimeoutMs} ms`,
  );
  // By what its caller has got, and by nothing else: one that came at the same moment is nobody's otherwise.
  const given = guest.then(
    () => true,
    () => false,
  );
  const over = made.then(
    async (late) => {
      if (!(await given)) await abandonGuest(late, offer.name, prepareTimeoutMs);
    },
    () => {},
  );
  return { guest, over };
}

/** Every page of the offer has one place here, and whoever lets it run can; or why not. */
function mismatch(guest: ArrivingGuest, { regions }: GuestOffer): MemferryError | null {
  const failed = (message: string, facts = {}) => new MemferryError('PREPARE_FAILED', message, { facts });
  if (!Array.isArray(guest?.regions) || guest.regions.some((region) => !region?.native)) {
    return failed('accept() gave no guest with regions');
  }
  for (const hook of ['prepare', 'resume', 'abandon'] as const) {
    if (typeof guest[hook] !== 'function') return failed(`accept() gave a guest without ${hook}()`);
  }
  if (guest.regions.length !== regions.length) {
    return failed('accept() gave a guest with another number of regions than it is offered with', {
      expected: regions.length,
      got: guest.regions.length,
    });
  }
  for (const [index, { name, lengthBytes }] of regions.entries()) {
    const here = guest.regions[index]?.lengthBytes ?? 0;
    const facts = { expected: lengthBytes, got: here };
    if (here < lengthBytes) {
      return new MemferryError('NO_MEMORY', `region '${name}' is too short here`, { facts });
    }
    // What is beyond is nobody's to send, and would be waited for.
    if (here > lengthBytes) return failed(`region '${name}' is longer here than it is offered`, facts);
  }
  return null;
}
