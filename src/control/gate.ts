/**
 * Bounds what strangers can hold: so many control connections may be in the handshake at once. When all places
 * are taken the oldest makes room, so a thousand silent peers cannot keep out the one that speaks.
 * Owned by one listener; JavaScript thread.
 */
import type { Duplex } from 'node:stream';
import { MemferryError } from '../errors.js';
import { type AuthenticatedSession, handshakeAsAcceptor, type HandshakeOptions } from './handshake.js';

/** The TLS seam: gives the stream that is spoken over, from the one that was connected or accepted. */
export type Wrap = (raw: Duplex, signal: AbortSignal) => Promise<Duplex>;

/** Enough for a burst of honest peers (each needs two round trips), and 64 sockets are nothing to a process. */
export const MAX_PENDING_HANDSHAKES = 64;

export interface AcceptOptions extends HandshakeOptions {
  wrap?: Wrap | undefined;
}

export class HandshakeGate {
  readonly #pending = new Map<Duplex, AbortController>();
  readonly #limit: number;

  constructor(limit = MAX_PENDING_HANDSHAKES) {
    this.#limit = limit;
  }

  /** Connections in the handshake now. */
  get pending(): number {
    return this.#pending.size;
  }

  /** Authenticates an accepted connection whose preface was read. Rejects with LIMIT_EXCEEDED when it had to make room. */
  async accept(raw: Duplex, options: AcceptOptions): Promise<AuthenticatedSession> {
    if (this.#pending.size >= this.#limit) {
      const oldest = this.#pending.keys().next();
      if (!oldest.done) {
        const full = `${this.#limit} connections are in the handshake already; the oldest one was dropped`;
        this.#drop(
          oldest.value,
          new MemferryError('LIMIT_EXCEEDED', full, { facts: { limit: this.#limit } }),
        );
      }
    }
    const abort = new AbortController();
    const onAbort = () => abort.abort(options.signal?.reason);
    options.signal?.addEventListener('abort', onAbort, { once: true });
    if (options.signal?.aborted) onAbort();
    this.#pending.set(raw, abort);
    try {
      return await acceptOn(raw, { ...options, signal: abort.signal });
    } finally {
      options.signal?.removeEventListener('abort', onAbort);
      this.#pending.delete(raw);
    }
  }

  /** Drops every connection that has not proved itself. */
  close(): void {
    for (const raw of [...this.#pending.keys()]) {
      this.#drop(raw, new MemferryError('CANCELLED', 'the listener was closed'));
    }
  }

  #drop(raw: Duplex, reason: MemferryError): void {
    const abort = this.#pending.get(raw);
    this.#pending.delete(raw);
    abort?.abort(reason);
    raw.destroy();
  }
}

async function acceptOn(
  raw: Duplex,
  options: AcceptOptions & { signal: AbortSignal },
): Promise<AuthenticatedSession> {
  if (!options.wrap) return handshakeAsAcceptor(raw, options);
  raw.on('error', () => {});
  let wrapped: Duplex;
  try {
    wrapped = await withinHandshake(options.wrap(raw, options.signal), options);
  } catch (error) {
    raw.destroy();
    throw error;
  }
  try {
    return await handshakeAsAcceptor(wrapped, options);
  } catch (error) {
    raw.destroy();
    throw error;
  }
}

/** A wrap is a handshake of its own and gets no more time than ours. */
export function withinHandshake<T>(
  work: Promise<T>,
  { timeoutMs = 5000, signal }: HandshakeOptions,
): Promise<T> {
  return new Promise<T>((resolve, reject) => {
    const settle = (act: () => void) => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
      act();
    };
    const onAbort = () => settle(() => reject(signal?.reason));
    const timer = setTimeout(
      () =>
        settle(() =>
          reject(new MemferryError('PEER_LOST', `the peer did not finish within ${timeoutMs} ms`)),
        ),
      timeoutMs,
    );
    signal?.addEventListener('abort', onAbort, { once: true });
    if (signal?.aborted) onAbort();
    work.then(
      (value) => settle(() => resolve(value)),
      (error: unknown) => settle(() => reject(error)),
    );
  });
}
