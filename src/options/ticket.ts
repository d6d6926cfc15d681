/** A ticket, as `park` gives it and files keep it; see ParkTicket. */
import { z } from 'zod';
import type { ParkTicket } from '../source/park.js';
import { parse } from './fields.js';

const digits = (bytes: number) => z.string().regex(new RegExp(`^[0-9a-f]{${2 * bytes}}$`));

export const ticketSchema = z.strictObject({
  image: digits(16),
  secret: digits(32),
  home: z.string().min(1),
  guest: z
    .strictObject({
      name: z.string().min(1).max(64),
      module: z
        .strictObject({ name: z.string().min(1), sha256: z.string().regex(/^[0-9a-fA-F]{64}$/) })
        .nullable(),
      lineage: digits(32),
    })
    .optional(),
});

/** What a ticket's file has, checked; throws INVALID_ARGUMENT. */
export function parseTicket(value: unknown): ParkTicket {
  return parse(ticketSchema, value, 'ticket');
}
