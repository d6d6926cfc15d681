/** What `listen` may be told. */
import { z } from 'zod';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import { bytes, connectionShape, dedupSchema, milliseconds, parse } from './fields.js';
import { ticketSchema } from './ticket.js';

const listenSchema = z.strictObject({
  ...connectionShape,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  /** Memory that all arriving guests together may take, in bytes. */
  maxBytes: bytes.default(64 * 2 ** 30),
  /** Execution state of one guest, in bytes. */
  maxStateBytes: bytes.default(64 * 2 ** 20),
  /** Migrations at the same time. */
  maxMigrations: z.number().int().min(1).max(1024).default(16),
  prepareTimeoutMs: milliseconds.default(10_000),
  /** Bytes a second that this side takes from sources; 0 for no limit. Faults are never held back. */
  bandwidth: bytes.default(0),
  /** Scatter modes: for a VMD server to answer when a guest is offered, in ms. */
  connectTimeoutMs: milliseconds.default(5_000),
  /** Bytes a second that gathering from VMD servers may take; 0 for no limit. Faults are never held back. */
  gatherLimit: bytes.default(0),
  /** After READY: how long to wait for GRANT before this side refuses for good, in ms. */
  grantTimeoutMs: milliseconds.default(20_000),
  /**
   * A parked guest that arriving ones start from where `accept` gives them no `bases`, by its ticket: the same guest
   * (name, module, lineage), or with `anySource` every one of that name and module. It stays parked. While it is read it
   * takes as much memory again as the guest.
   */
  base: z.strictObject({ parked: ticketSchema, anySource: z.boolean().default(false) }).optional(),
  /**
   * Sources of the same domain are told which of their pages are here already, and refer to them: pages of the page
   * share, and pages that came for guests of that domain which are still arriving. True: only what a guest has several
   * times itself. What a source learns by this: docs/security.md.
   */
  dedup: z.union([z.boolean(), dedupSchema]).default(false),
  /** A page share's file (`memferry share`), or `auto` for the one of the domain; with a domain only. */
  share: z.string().min(1).optional(),
});

export type ListenOptions = z.input<typeof listenSchema> & {
  /**
   * Makes the destination's side of a guest, before its first page. Throwing refuses the migration with the
   * error's code. Without it, plain regions of the offered lengths are allocated and nothing is run.
   */
  accept?: (offer: GuestOffer, context: AcceptContext) => ArrivingGuest | Promise<ArrivingGuest>;
};
export interface AcceptContext {
  signal: AbortSignal;
  /** The execution state, where it is there before the memory: of a parked guest. */
  state?: Uint8Array;
}
export type ResolvedListenOptions = z.output<typeof listenSchema> & Pick<ListenOptions, 'accept'>;

export function resolveListenOptions(options: ListenOptions): ResolvedListenOptions {
  const { accept, ...rest } = options;
  if (accept !== undefined && typeof accept !== 'function') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.accept: must be a function');
  }
  const parsed = parse(listenSchema, rest, 'listen');
  if (parsed.share !== undefined && typeof parsed.dedup === 'boolean') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.share: a page share belongs to a domain (dedup)');
  }
  return { ...parsed, ...(accept ? { accept } : {}) };
}
