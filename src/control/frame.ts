/**
 * Frames of an authenticated control connection, as bytes. Pure but for the counters: one sealer and one opener
 * a connection.
 *
 *     u32 payload length | u8 kind | payload | 16 bytes of HMAC-SHA256(direction key; u64 number, all before)
 *
 * Integers are little-endian. The number counts the frames of one direction and is not sent: a frame that is
 * repeated, dropped, moved or reflected fits no other place. The length is bounded by the kind before anything
 * is allocated.
 */
import { createHmac, timingSafeEqual } from 'node:crypto';
import { MemferryError } from '../errors.js';

export const FRAME_HEADER_BYTES = 5;
export const FRAME_MAC_BYTES = 16;
export const MAX_JSON_BYTES = 256 * 1024;
export const MAX_CHUNK_BYTES = 64 * 1024;
/** A message with a binary part: the part's length in front of the JSON text. */
export const ANNOUNCEMENT_BYTES = 4;
/** The room for a reason in BYE. */
export const MAX_BYE_BYTES = 8 * 1024;

export enum FrameKind {
  /** A message: JSON text in UTF-8. */
  Json = 1,
  /** The next bytes of the binary part that was announced. */
  Chunk = 2,
  /** "I am alive." Empty; may stand between any two frames. */
  Ping = 3,
  /** The last frame of a direction: empty when all is well, else JSON `{ code, message }`. */
  Bye = 4,
  /** A message whose binary part follows in chunks: u32 length of that part, then the JSON text. */
  JsonWithBinary = 5,
}

const LENGTHS: ReadonlyMap<number, { min: number; max: number }> = new Map([
  [FrameKind.Json, { min: 1, max: MAX_JSON_BYTES }],
  [FrameKind.Chunk, { min: 1, max: MAX_CHUNK_BYTES }],
  [FrameKind.Ping, { min: 0, max: 0 }],
  [FrameKind.Bye, { min: 0, max: MAX_BYE_BYTES }],
  [FrameKind.JsonWithBinary, { min: ANNOUNCEMENT_BYTES + 1, max: ANNOUNCEMENT_BYTES + MAX_JSON_BYTES }],
]);

export interface FrameHeader {
  kind: FrameKind;
  payloadBytes: number;
}

/** Throws PROTOCOL_ERROR: an unknown kind, or a length that its kind does not allow. */
export function parseFrameHeader(bytes: Buffer): FrameHeader {
  const payloadBytes = bytes.readUInt32LE(0);
  const kind = bytes.readUInt8(4);
  const bounds = LENGTHS.get(kind);
  if (!bounds)
    throw new MemferryError('PROTOCOL_ERROR', `a control frame of unknown kind ${kind}`, { facts: { kind } });
  if (payloadBytes < bounds.min || payloadBytes > bounds.max) {
    throw new MemferryError('PROTOCOL_ERROR', `a control frame of kind ${kind} with ${payloadBytes} bytes`, {
      facts: { kind, payloadBytes, ...bounds },
    });
  }
  return { kind, payloadBytes };
}

/** Numbers and authenticates the frames of one direction. */
class FrameAuthenticator {
  #number = 0n;

  constructor(private readonly key: Uint8Array) {}

  next(header: Uint8Array, payload: readonly Uint8Array[]): Buffer {
    const number = Buffer.alloc(8);
    number.writeBigUInt64LE(this.#number++);
    const mac = createHmac('sha256', this.key).update(number).update(header);
    for (const part of payload) mac.update(part);
    return mac.digest().subarray(0, FRAME_MAC_BYTES);
  }
}

export class FrameSealer {
  readonly #authenticator: FrameAuthenticator;

  constructor(key: Uint8Array) {
    this.#authenticator = new FrameAuthenticator(key);
  }

  /** The frame in the parts to be written, in order; the payload's are not copied. */
  seal(kind: FrameKind, ...payload: Uint8Array[]): Uint8Array[] {
    const header = Buffer.alloc(FRAME_HEADER_BYTES);
    header.writeUInt32LE(
      payload.reduce((sum, part) => sum + part.length, 0),
      0,
    );
    header.writeUInt8(kind, 4);
    // Our own frames obey the bounds that we hold others to.
    parseFrameHeader(header);
    return [header, ...payload, this.#authenticator.next(header, payload)];
  }
}

export class FrameOpener {
  readonly #authenticator: FrameAuthenticator;

  constructor(key: Uint8Array) {
    this.#authenticator = new FrameAuthenticator(key);
  }

  /** The payload of the next frame. `body` is payload and MAC. Throws PROTOCOL_ERROR for anything but that frame. */
  open(header: Buffer, body: Buffer): Buffer {
    const payload = body.subarray(0, body.length - FRAME_MAC_BYTES);
    const expected = this.#authenticator.next(header, [payload]);
    if (!timingSafeEqual(body.subarray(payload.length), expected)) {
      throw new MemferryError(
        'PROTOCOL_ERROR',
        'a control frame does not authenticate: it was changed, repeated, or left out on the way',
      );
    }
    return payload;
  }
}
