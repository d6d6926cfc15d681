/**
 * The control channel: messages checked by a schema, some with a binary part, over an authenticated connection.
 * Owned by one migration (or one listener's arrival); JavaScript thread.
 *
 * Bounds: messages waiting to be received (then reading stops, and TCP holds the peer back), messages waiting
 * to be sent (then `send` rejects), a peer that says nothing, a peer that takes nothing. Both sides say PING
 * once a second without being asked. So a cut that sends no FIN is noticed from either side, and a side that
 * has stopped reading for a while, because its owner is busy, is still heard.
 */
import type { Duplex } from 'node:stream';
import { z } from 'zod';
import { MemferryError } from '../errors.js';
import {
  ArrivingPart,
  type BinarySink,
  type BinarySource,
  bytesAsSource,
  type Received,
} from './binary-part.js';
import {
  ANNOUNCEMENT_BYTES,
  FRAME_HEADER_BYTES,
  FRAME_MAC_BYTES,
  type FrameHeader,
  FrameKind,
  FrameOpener,
  FrameSealer,
  MAX_BYE_BYTES,
  MAX_CHUNK_BYTES,
  MAX_JSON_BYTES,
  parseFrameHeader,
} from './frame.js';
import { type AuthenticatedSession, directionKey } from './handshake.js';

export interface ControlChannelOptions<In> {
  /** Every message is checked against it on arrival; what does not fit ends the channel with PROTOCOL_ERROR. */
  incoming: z.ZodType<In>;
  /** Largest binary part, both ways. */
  maxBinaryBytes?: number;
  /** The most that this message's may have of those; null: none. Asked before any memory is taken. Default: all. */
  admits?: (message: In) => number | null;
  /** Where this message's binary part goes as it comes; null, and by default: it is kept whole, as `binary`. */
  sink?: (message: In, bytes: number) => BinarySink | null;
  pingIntervalMs?: number;
  /** Without a frame from the peer for this long it counts as lost. */
  peerTimeoutMs?: number;
  /** A peer that is alive and takes nothing of what is sent to it for this long counts as lost too. */
  stallTimeoutMs?: number;
  /** So does one of whose binary part nothing comes for this long, whatever else it says. Default 60 s at least. */
  chunkTimeoutMs?: number;
}

/** `error` is null when one side said goodbye and nothing was wrong. */
export interface CloseReason {
  readonly error: MemferryError | null;
}

interface Outgoing {
  first: Uint8Array[];
  kind: FrameKind;
  binary: BinarySource;
  /** How much of `binary` was written; -1: not even the first frame. */
  offset: number;
  settle: (error: MemferryError | null) => void;
}

/** Received and not yet taken: a migration has a handful of messages under way, so this is a stuck owner. */
const MAX_INBOX = 64;
const MAX_OUTBOX = 256;
/** How long the last bytes may take to leave after a goodbye. */
const FAREWELL_MS = 2000;
const DEFAULT_MAX_BINARY_BYTES = 64 * 2 ** 20;

const byeReason = z.strictObject({ code: z.string().max(64), message: z.string().max(MAX_BYE_BYTES) });

export class ControlChannel<In, Out> implements AsyncIterable<Received<In>> {
  /** Resolves once, when nothing more can be sent or received. Never rejects. */
  readonly closed: Promise<CloseReason>;
  readonly #duplex: Duplex;
  readonly #incoming: z.ZodType<In>;
  readonly #sealer: FrameSealer;
  readonly #opener: FrameOpener;
  readonly #maxBinaryBytes: number;
  readonly #admits: (message: In) => number | null;
  readonly #sink: (message: In, bytes: number) => BinarySink | null;
  readonly #peerTimeoutMs: number;
  readonly #stallTimeoutMs: number;
  readonly #chunkTimeoutMs: number;
  readonly #pingIntervalMs: number;
  readonly #ticker: NodeJS.Timeout;
  readonly #inbox: (Received<In> & { bytes: number })[] = [];
  readonly #outbox: Outgoing[] = [];
  #inboxBytes = 0;
  #waiting: { resolve: (received: Received<In> | null) => void; reject: (error: MemferryError) => void }[] =
    [];
  #header: { bytes: Buffer; parsed: FrameHeader } | null = null;
  #arriving: ArrivingPart<In> | null = null;
  #readingPaused = false;
  #blockedSinceMs: number | null = null;
  #lastTickMs = performance.now();
  #lastHeardMs = performance.now();
  #closing = false;
  #reason: CloseReason | null = null;
  #resolveClosed!: (reason: CloseReason) => void;
  #resolveGone!: () => void;
  readonly #gone: Promise<void>;

  constructor(session: AuthenticatedSession, options: ControlChannelOptions<In>) {
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    this.#gone = new Promise((resolve) => {
      this.#resolveGone = resolve;
    });
    const peer = session.role === 'dialler' ? 'acceptor' : 'dialler';
    this.#sealer = new FrameSealer(directionKey(session.sessionKey, session.role));
    this.#opener = new FrameOpener(directionKey(session.sessionKey, peer));
    this.#incoming = options.incoming;
    this.#maxBinaryBytes = Math.min(options.maxBinaryBytes ?? DEFAULT_MAX_BINARY_BYTES, 2 ** 32 - 1);
    this.#admits = options.admits ?? (() => this.#maxBinaryBytes);
    this.#sink = options.sink ?? (() => null);
    this.#pingIntervalMs = options.pingIntervalMs ?? 1000;
    this.#peerTimeoutMs = options.peerTimeoutMs ?? 10_000;
    this.#stallTimeoutMs = options.stallTimeoutMs ?? 30_000;
    this.#chunkTimeoutMs = options.chunkTimeoutMs ?? Math.max(60_000, this.#peerTimeoutMs);

    const duplex = session.duplex;
    this.#duplex = duplex;
    duplex.on('readable', this.#onReadable);
    duplex.on('drain', this.#onDrain);
    duplex.on('end', () => this.#cut('the peer closed the connection without a goodbye'));
    duplex.on('error', (cause: Error) => this.#cut(`the connection failed: ${cause.message}`, cause));
    duplex.on('close', () => {
      this.#cut('the connection was closed');
      this.#resolveGone();
    });
    this.#ticker = setInterval(() => this.#tick(), this.#pingIntervalMs);
    // The socket keeps the process alive, not its heartbeat.
    this.#ticker.unref();
    // Frames that came right behind the handshake are in the stream already: `readable` tells of them as well.
    if (duplex.destroyed) {
      this.#cut('the connection was closed');
      this.#resolveGone();
    }
  }

  /** Why nothing works any more; null while it does. */
  get reason(): CloseReason | null {
    return this.#reason;
  }

  /**
   * Sends in order; resolves when the peer's connection has taken the bytes, so awaiting it is the
   * backpressure. `binary` must not change until then. Rejects with LIMIT_EXCEEDED (the channel lives on), or
   * with the reason for which it ended; an ignored rejection is not reported as unhandled.
   */
  send(message: Out, binary: Uint8Array | BinarySource | null = null): Promise<void> {
    const source = binary instanceof Uint8Array ? bytesAsSource(binary) : binary;
    const sent = new Promise<void>((resolve, fail) => {
      const reject = (error: MemferryError): void => {
        source?.done();
        fail(error);
      };
      if (this.#reason || this.#closing) {
        reject(this.#reason?.error ?? new MemferryError('CHANNEL_LOST', 'the control channel is closed'));
        return;
      }
      const json = Buffer.from(JSON.stringify(message), 'utf8');
      const bytes = source?.length ?? 0;
      const limit =
        json.length > MAX_JSON_BYTES
          ? { what: `a message of ${json.length} bytes`, limit: MAX_JSON_BYTES }
          : bytes > this.#maxBinaryBytes
            ? { what: `a binary part of ${bytes} bytes`, limit: this.#maxBinaryBytes }
            : this.#outbox.length >= MAX_OUTBOX
              ? { what: 'one more message to a peer that takes none', limit: MAX_OUTBOX }
              : null;
      if (limit) {
        const text = `${limit.what} is more than the control channel takes (${limit.limit})`;
        reject(new MemferryError('LIMIT_EXCEEDED', text, { facts: { limit: limit.limit } }));
        return;
      }
      const announcement = Buffer.alloc(ANNOUNCEMENT_BYTES);
      announcement.writeUInt32LE(bytes, 0);
      this.#outbox.push({
        first: source ? [announcement, json] : [json],
        kind: source ? FrameKind.JsonWithBinary : FrameKind.Json,
        binary: source ?? nothing,
        offset: -1,
        settle: (error) => {
          if (error) return reject(error);
          source?.done();
          resolve();
        },
      });
      this.#flush();
    });
    sent.catch(() => {});
    return sent;
  }

  /** The next message; null after a goodbye. Rejects with the reason for which the channel ended. */
  receive(): Promise<Received<In> | null> {
    const waited = this.#inbox.shift();
    if (waited) {
      const { bytes, ...next } = waited;
      this.#inboxBytes -= bytes;
      if (this.#readingPaused) {
        this.#readingPaused = false;
        this.#lastHeardMs = performance.now();
        queueMicrotask(this.#onReadable);
      }
      return Promise.resolve(next);
    }
    if (this.#reason) return this.#reason.error ? Promise.reject(this.#reason.error) : Promise.resolve(null);
    if (this.#waiting.length >= MAX_INBOX) {
      return Promise.reject(
        new MemferryError('LIMIT_EXCEEDED', `${MAX_INBOX} calls of receive() wait already`),
      );
    }
    return new Promise((resolve, reject) => this.#waiting.push({ resolve, reject }));
  }

  async *[Symbol.asyncIterator](): AsyncIterator<Received<In>> {
    try {
      for (let next = await this.receive(); next; next = await this.receive()) yield next;
    } finally {
      for (const { sink } of this.#inbox.splice(0)) sink?.discard();
      this.#inboxBytes = 0;
    }
  }

  /**
   * Says goodbye after what was sent before, and resolves when the connection is gone, within seconds whatever
   * the peer does. Twice is fine.
   */
  async close(): Promise<void> {
    if (!this.#reason && !this.#closing) {
      this.#closing = true;
      this.#flush();
      const timer = setTimeout(() => this.destroy(), FAREWELL_MS);
      await this.#gone;
      clearTimeout(timer);
    }
    await this.#gone;
  }

  /** Ends it at once, goodbye or not. */
  destroy(error: MemferryError | null = null): void {
    this.#end({ error });
    this.#duplex.destroy();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  readonly #onReadable = (): void => {
    try {
      while (!this.#reason && !this.#isFull()) {
        if (!this.#header) {
          const bytes = this.#duplex.read(FRAME_HEADER_BYTES) as Buffer | null;
          if (bytes === null) return;
          // At its end a stream gives what it has; `end` follows and says that it was cut.
          if (bytes.length < FRAME_HEADER_BYTES) return;
          this.#header = { bytes, parsed: parseFrameHeader(bytes) };
        }
        const { bytes, parsed } = this.#header;
        const bodyBytes = parsed.payloadBytes + FRAME_MAC_BYTES;
        const body = this.#duplex.read(bodyBytes) as Buffer | null;
        if (body === null || body.length < bodyBytes) return;
        this.#header = null;
        const payload = this.#opener.open(bytes, body);
        this.#lastHeardMs = performance.now();
        this.#onFrame(parsed.kind, payload);
      }
      if (!this.#reason) this.#readingPaused = true;
    } catch (error) {
      this.#fail(
        error instanceof MemferryError
          ? error
          : new MemferryError('PROTOCOL_ERROR', `a control frame cannot be read: ${String(error)}`, {
              cause: error,
            }),
      );
    }
  };

  #isFull(): boolean {
    return this.#inbox.length >= MAX_INBOX || this.#inboxBytes > this.#maxBinaryBytes;
  }

  #onFrame(kind: FrameKind, payload: Buffer): void {
    switch (kind) {
      case FrameKind.Ping:
        break;
      case FrameKind.Bye:
        this.#onBye(payload);
        break;
      case FrameKind.Chunk:
        this.#onChunk(payload);
        break;
      case FrameKind.Json:
      case FrameKind.JsonWithBinary:
        if (this.#arriving)
          throw new MemferryError('PROTOCOL_ERROR', 'a message in the middle of a binary part');
        if (kind === FrameKind.Json)
          this.#deliver({ message: this.#parse(payload), binary: null, sink: null });
        else this.#onAnnouncement(this.#parse(payload.subarray(ANNOUNCEMENT_BYTES)), payload.readUInt32LE(0));
    }
  }

  #onAnnouncement(message: In, total: number): void {
    const admitted = this.#admits(message);
    if (admitted === null) throw new MemferryError('PROTOCOL_ERROR', 'a binary part where there is none');
    const limit = Math.min(admitted, this.#maxBinaryBytes);
    if (total > limit) {
      throw new MemferryError('LIMIT_EXCEEDED', `a binary part of ${total} bytes; ${limit} are allowed`, {
        facts: { bytes: total, limit },
      });
    }
    this.#arriving = new ArrivingPart(message, total, this.#sink(message, total));
    this.#deliverWhole(this.#arriving);
  }

  #onChunk(payload: Buffer): void {
    const part = this.#arriving;
    if (!part) throw new MemferryError('PROTOCOL_ERROR', 'bytes that were not announced');
    part.take(payload);
    this.#deliverWhole(part);
  }

  #deliverWhole(part: ArrivingPart<In>): void {
    if (!part.isWhole) return;
    this.#arriving = null;
    this.#deliver(part.received, part.total);
  }

  #onBye(payload: Buffer): void {
    if (payload.length > 0) {
      const { code, message } = byeReason.parse(JSON.parse(payload.toString('utf8')));
      // The peer's word for it, but never a code by which it could speak for the migration.
      const known = code === 'LIMIT_EXCEEDED' ? code : 'PROTOCOL_ERROR';
      this.#end({ error: new MemferryError(known, `the peer ended the connection (${code}): ${message}`) });
      this.#duplex.destroy();
      return;
    }
    if (this.#arriving) throw new MemferryError('PROTOCOL_ERROR', 'a goodbye in the middle of a binary part');
    this.#flush();
    this.#sayBye(null);
    this.#end({ error: null });
    this.#leave();
  }

  #parse(text: Buffer): In {
    let value: unknown;
    try {
      value = JSON.parse(text.toString('utf8'));
    } catch (cause) {
      throw new MemferryError('PROTOCOL_ERROR', 'a control message is not JSON', { cause });
    }
    const result = this.#incoming.safeParse(value);
    if (result.success) return result.data;
    const issue = result.error.issues[0];
    const where = issue?.path.length ? ` at ${issue.path.map(String).join('.')}` : '';
    throw new MemferryError(
      'PROTOCOL_ERROR',
      `a control message is not allowed${where}: ${issue?.message ?? ''}`,
    );
  }

  #deliver(received: Received<In>, bytes = 0): void {
    // After our own goodbye nobody asks any more; reading on only lets the peer's goodbye through.
    if (this.#closing) {
      received.sink?.discard();
      return;
    }
    const waiting = this.#waiting.shift();
    if (waiting) {
      waiting.resolve(received);
      return;
    }
    this.#inbox.push({ ...received, bytes });
    this.#inboxBytes += bytes;
  }

  readonly #onDrain = (): void => {
    this.#blockedSinceMs = null;
    this.#flush();
  };

  /** Writes until the connection takes no more; `drain` calls it again. */
  #flush(): void {
    if (this.#reason) return;
    while (this.#outbox.length > 0 && this.#blockedSinceMs === null) {
      const next = this.#outbox[0] as Outgoing;
      if (next.offset < 0) {
        next.offset = 0;
        this.#write(next.kind, ...next.first);
      } else if (next.offset < next.binary.length) {
        const left = next.binary.length - next.offset;
        const chunk = next.binary.read(next.offset, Math.min(left, MAX_CHUNK_BYTES));
        next.offset += chunk.length;
        this.#write(FrameKind.Chunk, chunk);
      } else {
        // Also the way out after a `drain`: only what the connection has taken counts as sent.
        this.#outbox.shift();
        next.settle(null);
      }
    }
    if (this.#closing && this.#outbox.length === 0) {
      this.#sayBye(null);
      this.#end({ error: null });
      this.#leave();
    }
  }

  #write(kind: FrameKind, ...payload: Uint8Array[]): void {
    this.#duplex.cork();
    let room = true;
    for (const part of this.#sealer.seal(kind, ...payload)) room = this.#duplex.write(part);
    // Uncorking in the same turn: one writev for a frame, and no wait for another.
    this.#duplex.uncork();
    if (!room && this.#duplex.writableNeedDrain) this.#blockedSinceMs ??= performance.now();
  }

  #sayBye(error: MemferryError | null): void {
    if (!this.#duplex.writable) return;
    const text = error && JSON.stringify({ code: error.code, message: error.message.slice(0, 1024) });
    this.#write(FrameKind.Bye, ...(text ? [Buffer.from(text, 'utf8')] : []));
  }

  #tick(): void {
    const nowMs = performance.now();
    // Time in which this thread did not run, or did not want to read, is not the peer's silence.
    const lateMs = Math.max(0, nowMs - this.#lastTickMs - this.#pingIntervalMs);
    this.#lastHeardMs = this.#readingPaused ? nowMs : Math.min(nowMs, this.#lastHeardMs + lateMs);
    if (this.#blockedSinceMs !== null) this.#blockedSinceMs += lateMs;
    const part = this.#arriving;
    if (part) part.grownMs = this.#readingPaused ? nowMs : Math.min(nowMs, part.grownMs + lateMs);
    this.#lastTickMs = nowMs;
    if (nowMs - this.#lastHeardMs > this.#peerTimeoutMs) {
      this.#cut(`the peer has said nothing for ${Math.round(nowMs - this.#lastHeardMs)} ms`);
    } else if (this.#blockedSinceMs !== null && nowMs - this.#blockedSinceMs > this.#stallTimeoutMs) {
      this.#cut(`the peer has taken nothing for ${Math.round(nowMs - this.#blockedSinceMs)} ms`);
    } else if (part && nowMs - part.grownMs > this.#chunkTimeoutMs) {
      this.#cut(`no more of a binary part has come for ${Math.round(nowMs - part.grownMs)} ms`);
    } else if (this.#blockedSinceMs === null && !this.#closing) {
      // With the buffer full there is something to hear as soon as the peer reads on.
      this.#write(FrameKind.Ping);
    }
  }

  /** The peer is gone. */
  #cut(message: string, cause?: Error): void {
    if (this.#reason) return;
    this.#end({ error: this.#closing ? null : new MemferryError('PEER_LOST', message, { cause }) });
    this.#duplex.destroy();
  }

  /** The peer broke the rules: it is told how, and heard no more. */
  #fail(error: MemferryError): void {
    if (this.#reason) return;
    this.#sayBye(error);
    this.#end({ error });
    this.#leave();
  }

  #end(reason: CloseReason): void {
    if (this.#reason) return;
    this.#reason = reason;
    clearInterval(this.#ticker);
    this.#duplex.off('readable', this.#onReadable);
    this.#arriving?.discard();
    this.#arriving = null;
    this.#header = null;
    const gone = reason.error ?? new MemferryError('CHANNEL_LOST', 'the control channel is closed');
    for (const outgoing of this.#outbox.splice(0)) outgoing.settle(gone);
    for (const waiting of this.#waiting.splice(0)) {
      if (reason.error) waiting.reject(reason.error);
      else waiting.resolve(null);
    }
    this.#resolveClosed(reason);
  }

  /**
   * Lets the last bytes leave. What the peer still sends is read and dropped: closing with unread bytes would
   * reset the connection, and the reset could overtake the goodbye.
   */
  #leave(): void {
    this.#duplex.end();
    this.#duplex.resume();
    const timer = setTimeout(() => this.#duplex.destroy(), FAREWELL_MS);
    this.#duplex.once('close', () => clearTimeout(timer));
  }
}

const nothing = bytesAsSource(new Uint8Array(0));
