/**
 * Opens an authenticated control connection: address policy, TCP, preface, TLS seam, handshake. One bound is over all
 * of it, and the signal ends any step.
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
  /** For all of it, the handshake included. */
  connectTimeoutMs: number;
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
  const { host, port, connectTimeoutMs } = options;
  const late = new AbortController();
  let step = 'did not answer';
  const timer = setTimeout(() => {
    const text = `${host}:${port} ${step} within ${connectTimeoutMs} ms`;
    late.abort(new MemferryError('CONNECT_FAILED', text, { facts: { host, port, connectTimeoutMs } }));
  }, connectTimeoutMs);
  const signal = options.signal ? AbortSignal.any([options.signal, late.signal]) : late.signal;
  try {
    const socket = await connectTcp(options, signal);
    step = 'took the connection, and did not finish the handshake';
    return await greet(socket, options, signal);
  } finally {
    clearTimeout(timer);
  }
}

async function greet(socket: Socket, options: DialOptions, signal: AbortSignal): Promise<DialledSession> {
  const encrypted = options.wrap !== undefined;
  try {
    const remoteAddress = socket.remoteAddress ?? options.host;
    // `localhost` is a name: what it was resolved to decides, not what it promises.
    if (isLoopback(options.host)) {
      checkAddressPolicy(remoteAddress, { plaintext: options.plaintext ?? false, encrypted });
    }
    socket.write(CONTROL_PREFACE);
    // The signal comes first: it has run for longer.
    const { secret, connectTimeoutMs: timeoutMs, versions } = options;
    const handshake = { secret, timeoutMs, signal, versions };
    let duplex: Duplex = socket;
    if (options.wrap) {
      socket.on('error', () => {});
      duplex = await withinHandshake(options.wrap(socket, signal), handshake);
    }
    return { ...(await handshakeAsDialler(duplex, handshake)), remoteAddress };
  } catch (error) {
    socket.on('error', () => {});
    socket.destroy();
    throw error;
  }
}

function connectTcp({ host, port }: DialOptions, signal: AbortSignal): Promise<Socket> {
  return new Promise((resolve, reject) => {
    if (signal.aborted) {
      reject(signal.reason);
      return;
    }
    const socket = connect({ host, port, noDelay: true });
    const settle = (act: () => void) => {
      signal.removeEventListener('abort', onAbort);
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
        new MemferryError('CONNECT_FAILED', `${host}:${port} cannot be reached: ${cause.message}`, {
          cause,
          facts: { host, port },
        }),
      );
    const onAbort = () => fail(signal.reason);
    socket.on('connect', onConnect);
    // Stays when the dial has failed: errors of a socket that is being destroyed are nobody's business.
    socket.on('error', onError);
    signal.addEventListener('abort', onAbort, { once: true });
  });
}
