/**
 * Opens an authenticated control connection: address policy, TCP, preface, TLS seam, handshake. Each step has
 * its own bound, and the signal ends any of them.
 */
import { connect, type Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { MemferryError } from '../errors.js';
import { checkAddressPolicy, isLoopback } from './address.js';
import { withinHandshake, type Wrap } from './gate.js';
import {
  type AuthenticatedSession,
  CONTROL_PREFACE,
  handshakeAsDialler,
  type HandshakeOptions,
} from './handshake.js';

export interface DialOptions {
  host: string;
  port: number;
  secret: Uint8Array;
  connectTimeoutMs: number;
  handshakeTimeoutMs?: number | undefined;
  /** Allow an address other than loopback without encryption. */
  plaintext?: boolean | undefined;
  signal?: AbortSignal | undefined;
  /** Encryption; with it no `plaintext` is needed. Gets the raw socket after the preface was written. */
  wrap?: Wrap | undefined;
  versions?: HandshakeOptions['versions'];
}

export interface DialledSession extends AuthenticatedSession {
  /** The address that answered, numeric: what the data connections must dial too. */
  readonly remoteAddress: string;
}

/** Rejects with PLAINTEXT_REQUIRED, CONNECT_FAILED, AUTH_FAILED, VERSION_MISMATCH, PEER_LOST or the signal's reason. */
export async function dial(options: DialOptions): Promise<DialledSession> {
  const encrypted = options.wrap !== undefined;
  checkAddressPolicy(options.host, { plaintext: options.plaintext ?? false, encrypted });
  const socket = await connectTcp(options);
  try {
    const remoteAddress = socket.remoteAddress ?? options.host;
    // `localhost` is a name: what it was resolved to decides, not what it promises.
    if (isLoopback(options.host)) {
      checkAddressPolicy(remoteAddress, { plaintext: options.plaintext ?? false, encrypted });
    }
    socket.write(CONTROL_PREFACE);
    const handshake = {
      secret: options.secret,
      timeoutMs: options.handshakeTimeoutMs,
      signal: options.signal,
      versions: options.versions,
    };
    let duplex: Duplex = socket;
    if (options.wrap) {
      socket.on('error', () => {});
      const signal = options.signal ?? new AbortController().signal;
      duplex = await withinHandshake(options.wrap(socket, signal), handshake);
    }
    return { ...(await handshakeAsDialler(duplex, handshake)), remoteAddress };
  } catch (error) {
    socket.on('error', () => {});
    socket.destroy();
    throw error;
  }
}

function connectTcp({ host, port, connectTimeoutMs, signal }: DialOptions): Promise<Socket> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(signal.reason);
      return;
    }
    const where = `${host}:${port}`;
    const socket = connect({ host, port, noDelay: true });
    const settle = (act: () => void) => {
      clearTimeout(timer);
      signal?.removeEventListener('abort', onAbort);
      socket.off('connect', onConnect);
      act();
    };
    const fail = (error: unknown) =>
      settle(() => {
        socket.destroy();
        reject(error);
      });
    const onConnect = () =>
      settle(() => {
        socket.off('error', onError);
        resolve(socket);
      });
    const onError = (cause: Error) =>
      fail(
        new MemferryError('CONNECT_FAILED', `${where} cannot be reached: ${cause.message}`, {
          cause,
          facts: { host, port },
        }),
      );
    const onAbort = () => fail(signal?.reason);
    const timer = setTimeout(() => {
      const text = `${where} did not answer within ${connectTimeoutMs} ms`;
      fail(new MemferryError('CONNECT_FAILED', text, { facts: { host, port, connectTimeoutMs } }));
    }, connectTimeoutMs);
    socket.on('connect', onConnect);
    // Stays when the dial has failed: errors of a socket that is being destroyed are nobody's business.
    socket.on('error', onError);
    signal?.addEventListener('abort', onAbort, { once: true });
  });
}
