/**
 * Cuts the bytes of memferry's connections into the pieces that they consist of, without changing or keeping
 * any: enough for a proxy to stop at a named one. Layouts: docs/protocol.md.
 */

export type Direction = 'up' | 'down';

/** One indivisible piece of a direction. `name`: a hello, a proof, a control message's type or a frame's. */
export interface Piece {
  name: string;
  bytes: Buffer;
  /** The control message's other fields, where the piece is one. */
  message?: Record<string, unknown>;
  /** Data frames: how many pages it is about. */
  pages?: number;
}

export interface ConnectionKind {
  /** `stage`: with a VMD server; to one it may be `control` as well. */
  role: 'control' | 'data' | 'demand' | 'stage';
  /** Data connections: which. Stage connections: 0 scatter, 1 gather, 2 demand, 3 chain. Else 0. */
  channel: number;
  epoch: number;
}

const FRAME_NAMES: Record<number, string> = {
  1: 'pages',
  2: 'zero',
  3: 'discard',
  4: 'switch',
  5: 'switch-ack',
  6: 'barrier',
  7: 'barrier-ack',
  8: 'suspects',
  9: 'fault-request',
  10: 'bitmap',
  11: 'bitmap-end',
  12: 'goodbye',
  13: 'map',
  14: 'map-request',
  15: 'map-end',
  16: 'read',
  17: 'absent',
  18: 'refused',
  19: 'chain-broken',
  20: 'elsewhere',
  27: 'tree-request',
  28: 'tree',
  29: 'same',
  30: 'base-end',
  31: 'probe',
  32: 'known',
  33: 'reference',
  34: 'unresolved',
  35: 'taken',
};
const CONTROL_KINDS: Record<number, string> = { 2: 'chunk', 3: 'ping', 4: 'bye' };

const PREFACE_BYTES = 8;
const DATA_HELLO_BYTES = 64;

type Cut = { bytes: number; piece: Omit<Piece, 'bytes'> } | null;

/** One direction of one connection. `push` gives the pieces that are whole now. */
export class PieceReader {
  #kept: Buffer = Buffer.alloc(0);
  #index = 0;

  constructor(
    private readonly direction: Direction,
    /** Null until the up direction's first bytes were seen. */
    private readonly kind: () => ConnectionKind | null,
    private readonly setKind: (kind: ConnectionKind) => void,
  ) {}

  push(bytes: Buffer): Piece[] {
    this.#kept = this.#kept.length > 0 ? Buffer.concat([this.#kept, bytes]) : bytes;
    const pieces: Piece[] = [];
    for (let cut = this.#next(); cut; cut = this.#next()) {
      if (this.#kept.length < cut.bytes) break;
      pieces.push({ ...cut.piece, bytes: this.#kept.subarray(0, cut.bytes) });
      this.#kept = this.#kept.subarray(cut.bytes);
      this.#index++;
    }
    return pieces;
  }

  #next(): Cut {
    const kept = this.#kept;
    if (kept.length === 0) return null;
    if (this.direction === 'up' && this.#index === 0) return this.#first();
    const kind = this.kind();
    if (!kind) return null;
    return kind.role === 'control' ? this.#control() : this.#frame();
  }

  #first(): Cut {
    const kept = this.#kept;
    if (kept.length < PREFACE_BYTES) return null;
    const preface = kept.toString('latin1', 0, PREFACE_BYTES);
    if (preface === 'MFERRYC1') {
      this.setKind({ role: 'control', channel: 0, epoch: 0 });
      return { bytes: PREFACE_BYTES, piece: { name: 'preface' } };
    }
    const stage = preface === 'MFERRYS1';
    if (preface !== 'MFERRYD1' && !stage)
      throw new Error(`a connection that begins with ${JSON.stringify(preface)}`);
    if (kept.length < DATA_HELLO_BYTES) return null;
    const channel = kept.readUInt16LE(26);
    const demand = channel === 0xffff;
    this.setKind({
      role: stage ? 'stage' : demand ? 'demand' : 'data',
      channel: demand ? 0 : channel,
      epoch: kept.readUInt32LE(28),
    });
    return { bytes: DATA_HELLO_BYTES, piece: { name: 'hello' } };
  }

  #control(): Cut {
    const kept = this.#kept;
    const up = this.direction === 'up';
    const handshake = up ? [PREFACE_BYTES, 36, 32] : [40, 34];
    const fixed = handshake[this.#index];
    if (fixed !== undefined) {
      const names = up ? ['preface', 'control-hello', 'proof'] : ['control-hello', 'proof'];
      return { bytes: fixed, piece: { name: names[this.#index] as string } };
    }
    if (kept.length < 5) return null;
    const payload = kept.readUInt32LE(0);
    const kind = kept.readUInt8(4);
    const bytes = 5 + payload + 16;
    const name = CONTROL_KINDS[kind];
    if (name) return { bytes, piece: { name } };
    if (kept.length < bytes) return null;
    const text = kept.toString('utf8', kind === 5 ? 9 : 5, 5 + payload);
    const message = JSON.parse(text) as Record<string, unknown>;
    return { bytes, piece: { name: String(message['type']), message } };
  }

  #frame(): Cut {
    const kept = this.#kept;
    if (this.direction === 'down' && this.#index === 0) return { bytes: 8, piece: { name: 'hello-reply' } };
    if (kept.length < 48) return null;
    const type = kept.readUInt16LE(4);
    const pages = Number(kept.readBigUInt64LE(24));
    return { bytes: 48 + kept.readUInt32LE(12), piece: { name: FRAME_NAMES[type] ?? `type ${type}`, pages } };
  }
}
