/** What `listen` may be told. */
import { z } from 'zod';
import { MemferryError } from '../errors.js';
import type { ArrivingGuest, GuestOffer } from '../guest.js';
import type { ParkTicket } from '../source/park.js';
import {
  bytes,
  type ConnectionOptions,
  connectionShape,
  type DedupOptions,
  dedupChoice,
  milliseconds,
  parse,
  type Same,
} from './fields.js';
import { ticketSchema } from './ticket.js';

/** What `listen` may be told. Times are in ms, above 0 and up to 7 days; sizes and rates are whole numbers of bytes. */
export interface ListenOptions extends ConnectionOptions {
  /**
   * An address of this host, or a name that has one; `0.0.0.0` and `::` are all of its addresses. Names other than
   * `localhost` count as an open network, which needs `plaintext` and a secret. Default `127.0.0.1`.
   */
  host?: string;
  /** 0, the default: any that is free; `Listening.port` says which. */
  port?: number;
  /** Aborting it closes the listener. */
  signal?: AbortSignal;
  /** Memory that all arriving guests together may take, in bytes; more is declined with NO_MEMORY. Default 64 GiB. */
  maxBytes?: number;
  /** Execution state of one guest, in bytes. Default 64 MiB. */
  maxStateBytes?: number;
  /** Migrations at the same time, 1 to 1024; one more is declined with LIMIT_EXCEEDED. Default 16. */
  maxMigrations?: number;
  /**
   * For `accept`, in ms: the migration is declined with PREPARE_TIMEOUT, and what `accept` comes to later is abandoned.
   * Until it settles it counts against `maxMigrations` and `maxBytes`. Default 120 000.
   */
  acceptTimeoutMs?: number;
  /**
   * For `prepare`, in ms: PREPARE_TIMEOUT, and the guest runs on at the source. `abandon` is not waited for any longer
   * either. Default 10 000.
   */
  prepareTimeoutMs?: number;
  /** Bytes a second that this side takes from sources; 0, the default, for no limit. Faults are never held back. */
  bandwidth?: number;
  /** Scatter modes: for a VMD server to answer when a guest is offered, in ms. Default 5000. */
  connectTimeoutMs?: number;
  /**
   * Bytes a second that gathering from VMD servers may take; 0, the default, for no limit. Faults are never held back.
   */
  gatherLimit?: number;
  /** After READY: how long to wait for GRANT before this side refuses for good, in ms. Default 20 000. */
  grantTimeoutMs?: number;
  /**
   * A parked guest that arriving ones start from where `accept` gives them no `bases`, by its ticket: the same guest
   * (name, module, lineage), or with `anySource` (default false) every one of that name and module. It stays parked.
   * While it is read it takes as much memory again as the guest.
   */
  base?: { parked: ParkTicket; anySource?: boolean };
  /**
   * Sources of the same domain are told which of their pages are here already, and refer to them: pages of the page
   * share, and pages that came for guests of that domain which are still arriving. True: only what a guest has several
   * times itself. Default false. What a source learns by this: docs/security.md.
   */
  dedup?: boolean | DedupOptions;
  /** A page share's file (`memferry share`), or `auto` for the one of the domain; with a domain only. */
  share?: string;
  /**
   * Makes the destination's side of a guest, before its first page. Throwing refuses the migration with the
   * error's code. Without it, plain regions of the offered lengths are allocated and nothing is run.
   */
  accept?: (offer: GuestOffer, context: AcceptContext) => ArrivingGuest | Promise<ArrivingGuest>;
}

/** What `accept` is given beside the offer. */
export interface AcceptContext {
  /** Aborts when nobody waits for the guest any more: the listener closes, `unpark` was cancelled. */
  signal: AbortSignal;
  /** The execution state, where it is there before the memory: of a parked guest. */
  state?: Uint8Array;
}

const listenSchema = z.strictObject({
  ...connectionShape,
  host: z.string().min(1).default('127.0.0.1'),
  port: z.number().int().min(0).max(65535).default(0),
  signal: z.instanceof(AbortSignal).optional(),
  maxBytes: bytes.default(64 * 2 ** 30),
  maxStateBytes: bytes.default(64 * 2 ** 20),
  maxMigrations: z.number().int().min(1).max(1024).default(16),
  acceptTimeoutMs: milliseconds.default(120_000),
  prepareTimeoutMs: milliseconds.default(10_000),
  bandwidth: bytes.default(0),
  connectTimeoutMs: milliseconds.default(5_000),
  gatherLimit: bytes.default(0),
  grantTimeoutMs: milliseconds.default(20_000),
  base: z.strictObject({ parked: ticketSchema, anySource: z.boolean().default(false) }).optional(),
  dedup: dedupChoice.default(false),
  share: z.string().min(1).optional(),
});
true satisfies Same<z.input<typeof listenSchema>, Omit<ListenOptions, 'accept'>>;

export type ResolvedListenOptions = z.output<typeof listenSchema> & Pick<ListenOptions, 'accept'>;

export function checkAccept(accept: unknown, what: string): void {
  if (accept === undefined || typeof accept === 'function') return;
  throw new MemferryError('INVALID_ARGUMENT', `${what}.accept: must be a function`);
}

export function resolveListenOptions(options: ListenOptions): ResolvedListenOptions {
  const { accept, ...rest } = options ?? {};
  checkAccept(accept, 'listen');
  const parsed = parse(listenSchema, rest, 'listen');
  if (parsed.share !== undefined && typeof parsed.dedup === 'boolean') {
    throw new MemferryError('INVALID_ARGUMENT', 'listen.share: a page share belongs to a domain (dedup)');
  }
  return { ...parsed, ...(accept ? { accept } : {}) };
}
