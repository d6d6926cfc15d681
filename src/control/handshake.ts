/**
 * Who speaks: mutual challenge and response over a shared secret, on a fresh control connection, after its
 * 8-byte preface. Everything has a fixed size, so nothing is allocated for a peer that has not proved itself.
 *
 *     dialler                                          acceptor
 *     HELLO  lowest, highest version, nonce  ----->
 *                                            <-----    HELLO  status, version, range, nonce
 *     PROOF  HMAC(secret, "dialler", both HELLOs) ->
 *                                            <-----    PROOF  status, HMAC(secret, "acceptor", both HELLOs)
 *
 * The labels make a proof useless in the other direction (no reflection), the nonces make it useless on any
 * other connection (no replay), and both HELLOs under it make a forced older version show (no downgrade).
 * The acceptor proves itself only to a dialler that has: a stranger gets nothing to try secrets against.
 */
import { createHmac, randomBytes, timingSafeEqual } from 'node:crypto';
import type { Duplex } from 'node:stream';
import { MemferryError } from '../errors.js';
import { readExactly } from './exact-read.js';

/** Sent raw by the dialling side, before TLS if there is any; the accepting side's listener consumes it. */
export const CONTROL_PREFACE: Buffer = Buffer.from('MFERRYC1', 'latin1');
export const HANDSHAKE_TIMEOUT_MS = 5000;

const NONCE_BYTES = 32;
const MAC_BYTES = 32;
/** u16 lowest version, u16 highest version, nonce. */
export const DIALLER_HELLO_BYTES = 4 + NONCE_BYTES;
/** u16 status, u16 version, u16 lowest, u16 highest, nonce. */
export const ACCEPTOR_HELLO_BYTES = 8 + NONCE_BYTES;
/** u16 status, then the MAC, zeros when refused. */
export const ACCEPTOR_PROOF_BYTES = 2 + MAC_BYTES;

const OK = 1;
const WRONG_VERSION = 2;
const REFUSED = 3;

export interface VersionRange {
  lowest: number;
  highest: number;
}
export const PROTOCOL_VERSIONS: VersionRange = { lowest: 1, highest: 1 };

export type Role = 'dialler' | 'acceptor';

/** A connection whose other end has proved that it knows the secret. */
export interface AuthenticatedSession {
  readonly duplex: Duplex;
  readonly role: Role;
  readonly version: number;
  /** 32 bytes that only the two ends of this very connection know. Data tokens derive from it. */
  readonly sessionKey: Uint8Array;
}

export interface HandshakeOptions {
  secret: Uint8Array;
  timeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
  versions?: VersionRange | undefined;
}

/** The dialling side. Rejects with AUTH_FAILED, VERSION_MISMATCH, PEER_LOST or the signal's reason; destroys the stream then. */
export function handshakeAsDialler(duplex: Duplex, options: HandshakeOptions): Promise<AuthenticatedSession> {
  return bounded(duplex, options, async (signal) => {
    const versions = options.versions ?? PROTOCOL_VERSIONS;
    const hello = Buffer.alloc(DIALLER_HELLO_BYTES);
    hello.writeUInt16LE(versions.lowest, 0);
    hello.writeUInt16LE(versions.highest, 2);
    randomBytes(NONCE_BYTES).copy(hello, 4);
    duplex.write(hello);

    const answer = await readExactly(duplex, ACCEPTOR_HELLO_BYTES, signal);
    const status = answer.readUInt16LE(0);
    const version = answer.readUInt16LE(2);
    const theirs = { lowest: answer.readUInt16LE(4), highest: answer.readUInt16LE(6) };
    if (status === WRONG_VERSION) throw versionMismatch(versions, theirs);
    if (status !== OK) throw notOurs(`an answer of kind ${status}`);
    if (version < versions.lowest || version > versions.highest) throw versionMismatch(versions, theirs);

    const transcript = Buffer.concat([hello, answer]);
    duplex.write(proof(options.secret, 'dialler', transcript));
    const reply = await readExactly(duplex, ACCEPTOR_PROOF_BYTES, signal);
    if (reply.readUInt16LE(0) === REFUSED) {
      throw new MemferryError('AUTH_FAILED', 'the peer refused the shared secret: it was given another one');
    }
    const expected = proof(options.secret, 'acceptor', transcript);
    if (reply.readUInt16LE(0) !== OK || !timingSafeEqual(reply.subarray(2), expected)) {
      throw new MemferryError(
        'AUTH_FAILED',
        'the destination could not prove that it knows the shared secret',
      );
    }
    return { duplex, role: 'dialler', version, sessionKey: keyOf(options.secret, transcript) };
  });
}

/** The accepting side, after the preface. Rejects like the other one; destroys the stream then. */
export function handshakeAsAcceptor(
  duplex: Duplex,
  options: HandshakeOptions,
): Promise<AuthenticatedSession> {
  return bounded(duplex, options, async (signal) => {
    const versions = options.versions ?? PROTOCOL_VERSIONS;
    const hello = await readExactly(duplex, DIALLER_HELLO_BYTES, signal);
    const theirs = { lowest: hello.readUInt16LE(0), highest: hello.readUInt16LE(2) };
    if (theirs.lowest > theirs.highest) throw notOurs('a range of versions that is empty');
    const version = Math.min(versions.highest, theirs.highest);
    const spoken = version >= versions.lowest && version >= theirs.lowest;

    const answer = Buffer.alloc(ACCEPTOR_HELLO_BYTES);
    answer.writeUInt16LE(spoken ? OK : WRONG_VERSION, 0);
    answer.writeUInt16LE(spoken ? version : 0, 2);
    answer.writeUInt16LE(versions.lowest, 4);
    answer.writeUInt16LE(versions.highest, 6);
    if (!spoken) {
      await farewell(duplex, answer, signal);
      throw versionMismatch(versions, theirs);
    }
    randomBytes(NONCE_BYTES).copy(answer, 8);
    duplex.write(answer);

    const transcript = Buffer.concat([hello, answer]);
    const claimed = await readExactly(duplex, MAC_BYTES, signal);
    const reply = Buffer.alloc(ACCEPTOR_PROOF_BYTES);
    if (!timingSafeEqual(claimed, proof(options.secret, 'dialler', transcript))) {
      reply.writeUInt16LE(REFUSED, 0);
      await farewell(duplex, reply, signal);
      throw new MemferryError('AUTH_FAILED', 'a peer could not prove that it knows the shared secret');
    }
    reply.writeUInt16LE(OK, 0);
    proof(options.secret, 'acceptor', transcript).copy(reply, 2);
    duplex.write(reply);
    return { duplex, role: 'acceptor', version, sessionKey: keyOf(options.secret, transcript) };
  });
}

/** The key under which the frames that `sender` sends are authenticated. */
export function directionKey(sessionKey: Uint8Array, sender: Role): Buffer {
  return createHmac('sha256', sessionKey).update(`memferry control frames from ${sender}`).digest();
}

/** One deadline over the whole handshake: a peer that trickles bytes gets no more time than a silent one. */
async function bounded<T>(
  duplex: Duplex,
  { timeoutMs = HANDSHAKE_TIMEOUT_MS, signal: outer }: HandshakeOptions,
  run: (signal: AbortSignal) => Promise<T>,
): Promise<T> {
  const abort = new AbortController();
  const onAbort = () => abort.abort(outer?.reason);
  const timer = setTimeout(() => {
    abort.abort(
      new MemferryError('PEER_LOST', `the peer did not finish the handshake within ${timeoutMs} ms`),
    );
  }, timeoutMs);
  // Between two reads, and until a channel takes over, nobody else listens; an error event without a listener
  // would end the process. So this one stays.
  duplex.on('error', () => {});
  try {
    if (outer?.aborted) onAbort();
    else outer?.addEventListener('abort', onAbort, { once: true });
    return await run(abort.signal);
  } catch (error) {
    duplex.destroy();
    throw error;
  } finally {
    clearTimeout(timer);
    outer?.removeEventListener('abort', onAbort);
  }
}

/** Says no and lets it arrive: destroying at once could discard the answer that explains the refusal. */
function farewell(duplex: Duplex, bytes: Buffer, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = () => {
      signal.removeEventListener('abort', done);
      resolve();
    };
    signal.addEventListener('abort', done);
    duplex.once('close', done);
    duplex.end(bytes, done);
  });
}

function proof(secret: Uint8Array, role: Role, transcript: Buffer): Buffer {
  return createHmac('sha256', secret)
    .update(`memferry control proof of the ${role}`)
    .update(transcript)
    .digest();
}

function keyOf(secret: Uint8Array, transcript: Buffer): Uint8Array {
  return Uint8Array.from(
    createHmac('sha256', secret).update('memferry control session').update(transcript).digest(),
  );
}

function versionMismatch(ours: VersionRange, theirs: VersionRange): MemferryError {
  return new MemferryError(
    'VERSION_MISMATCH',
    `the peer speaks protocol versions ${theirs.lowest} to ${theirs.highest}, this side ${ours.lowest} to ${ours.highest}`,
    { facts: { ours, theirs } },
  );
}

function notOurs(what: string): MemferryError {
  return new MemferryError(
    'PROTOCOL_ERROR',
    `the peer does not speak memferry's control protocol: it sent ${what}`,
  );
}
