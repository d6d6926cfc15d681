/**
 * What a guest calls itself, checked where the guest is: a destination or a VMD server that does not take it ends the
 * connection, and all that the source would hear is that the peer is gone. Pure.
 */
import { z } from 'zod';
import { MemferryError } from '../errors.js';
import type { Guest } from '../guest.js';
import { parse } from '../options/fields.js';

const name = z
  .string('expected a name of 1 to 64 characters')
  .min(1, 'expected a name of 1 to 64 characters')
  .max(64, 'longer than 64 characters');

const identity = z.object({
  name,
  module: z
    .object(
      { name, sha256: z.string().regex(/^[0-9a-f]{64}$/, 'expected 64 hex digits, lower case') },
      'expected { name, sha256 }, or null for a guest that is memory alone',
    )
    .nullable(),
  regions: z
    .array(z.object({ name }), 'expected a list of { name, region }')
    .min(1, 'a guest has at least one region')
    .max(64, 'a guest has at most 64 regions'),
});

/** @throws INVALID_ARGUMENT, naming what cannot be told */
export function checkIdentity(guest: Pick<Guest, 'name' | 'module' | 'regions'>): void {
  const { regions } = parse(identity, guest, 'guest');
  if (new Set(regions.map((region) => region.name)).size < regions.length) {
    throw new MemferryError('INVALID_ARGUMENT', 'guest.regions: two have the same name');
  }
}
