/**
 * Unix sockets that carry descriptors: how another process on this machine hands over its memory. Waiting happens on
 * native threads (`native/os/fd_channel.h`), so a peer that says nothing costs nothing here, and everything has a bound.
 *
 * A received descriptor is the caller's: closed by `closeSync`, or `closeDescriptors`. None is left over when a call
 * fails.
 */
import { closeSync } from 'node:fs';
import { z } from 'zod';
import { loadAddon } from './addon.js';
import { fromNative, type MemferryError, memferryError, native, nativeAsync } from './errors.js';
import { callback, parse, type Same } from './options/fields.js';
import { callOut } from './tell-listeners.js';
import type { NativeFdConnection, NativeFdListener, NativeFdOutcome } from './native.js';

/** The most descriptors that the kernel puts into one message. */
export const MOST_DESCRIPTORS = 253;

/** Who was at the other end when it connected. */
export interface FdPeer {
  /** 0: in a pid namespace that this process does not see. */
  pid: number;
  /** Its effective user. */
  uid: number;
  /** Its effective group. */
  gid: number;
  /** The connection's own, closed with it; null: there is none to be had (not visible, or ended). */
  pidfd: number | null;
}

/** What one call of `receive` or `receiveWhole` takes at most. */
export interface ReceiveBounds {
  /** Bytes of a piece; what is beyond comes in the next. In `receiveWhole` of all pieces: LIMIT_EXCEEDED. */
  mostBytes: number;
  /** More in one message is LIMIT_EXCEEDED. */
  mostDescriptors: number;
  /** How long to wait, in ms: PEER_LOST. */
  timeoutMs: number;
}

/** What came in one piece. No bytes: the peer has closed its end. */
export interface FdPiece {
  /** Empty: the end. */
  bytes: Buffer;
  /** The caller closes them. */
  descriptors: number[];
}

/** What `FdListener` may be told. */
export interface FdListenerOptions {
  /** Permissions of the socket's file, at most: 0o600 unless told. */
  mode?: number;
  /** Open at once; one more is closed as it comes. 16 unless told. */
  mostConnections?: number;
  /**
   * Gets each connection, and closes it in the end. What it throws is a warning of the process, and closes the connection.
   */
  onConnection: (connection: FdConnection) => void;
  /** The listener has failed, and accepts no more. What it throws is a warning. */
  onError?: (error: MemferryError) => void;
}

const listenerSchema = z.strictObject({
  mode: z.int().min(0).max(0o777).default(0o600),
  mostConnections: z.int().min(1).max(65_536).default(16),
  onConnection: callback<[connection: FdConnection]>(),
  onError: callback<[error: MemferryError]>().optional(),
});
true satisfies Same<z.input<typeof listenerSchema>, FdListenerOptions>;

/** Closes what can be closed; for descriptors that nobody took. @throws INVALID_ARGUMENT: no list */
export function closeDescriptors(descriptors: readonly number[]): void {
  if (!Array.isArray(descriptors))
    throw memferryError('INVALID_ARGUMENT', 'closeDescriptors: expected a list of descriptors');
  for (const descriptor of descriptors) {
    try {
      closeSync(descriptor);
    } catch {
      // Nothing more can be done about it.
    }
  }
}

/** Accepts at a path until it is closed, and keeps the process alive meanwhile, as a server does. */
export class FdListener implements Disposable {
  readonly #native: NativeFdListener;
  readonly #keepAlive = setInterval(() => {}, 2 ** 30);

  /**
   * A socket's file that a dead listener left is replaced.
   * @throws SYSTEM (EADDRINUSE: something else is there, or somebody listens; EACCES, ENOENT), INVALID_ARGUMENT
   */
  constructor(
    /** The path of its socket. */
    readonly path: string,
    options: FdListenerOptions,
  ) {
    const { mode, mostConnections, onConnection, onError } = parse(listenerSchema, options, 'FdListener');
    const code = 'MEMFERRY_LISTENER';
    const accepted = (error: unknown, connection: NativeFdConnection | null) => {
      if (!connection) {
        callOut({ what: 'onError', code }, onError, fromNative(error));
        return;
      }
      // Whoever did not get through with it closes nothing any more.
      const failed = () => connection.close();
      callOut({ what: 'onConnection', code, failed }, () => onConnection(new FdConnection(connection)));
    };
    try {
      this.#native = native(() => loadAddon().createFdListener(path, mode, mostConnections, accepted));
    } catch (error) {
      clearInterval(this.#keepAlive);
      throw error;
    }
  }

  /** Removes the file and accepts no more; connections stay. Twice is fine. */
  close(): void {
    clearInterval(this.#keepAlive);
    this.#native.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

/**
 * A connection over a Unix socket that carries bytes and descriptors; accepted by an `FdListener`, or made by
 * `connect`. Whoever has it closes it.
 */
export class FdConnection implements Disposable {
  /** Who is at the other end. */
  readonly peer: FdPeer;
  readonly #native: NativeFdConnection;
  #receiving: { resolve(piece: FdPiece): void; reject(error: unknown): void } | null = null;
  /** While somebody waits: the native thread that does is none that Node waits for, and would end instead. */
  #keepAlive: NodeJS.Timeout | undefined;
  #sending: Promise<unknown> = Promise.resolve();
  #closed = false;

  /** For the listener and `connect`. */
  constructor(connection: NativeFdConnection) {
    this.#native = connection;
    this.peer = native(() => connection.peer());
    connection.onReceived((error, outcome, bytes, descriptors) => {
      const waiting = this.#receiving;
      this.#receiving = null;
      clearInterval(this.#keepAlive);
      if (error || outcome === null || bytes === null || descriptors === null)
        waiting?.reject(fromNative(error));
      else if (outcome !== 'ok') waiting?.reject(outcomeError(outcome));
      else if (waiting) waiting.resolve({ bytes, descriptors });
      else closeDescriptors(descriptors);
    });
  }

  /** To the socket at `path`. @throws SYSTEM (ENOENT, ECONNREFUSED, EACCES, ETIMEDOUT), INVALID_ARGUMENT */
  static async connect(path: string, timeoutMs = 5000): Promise<FdConnection> {
    return new FdConnection(await nativeAsync(() => loadAddon().connectFdChannel(path, timeoutMs)));
  }

  /**
   * The next piece: of a message sent in one, and smaller than the socket's buffer, the whole. One call at a time.
   * @throws PEER_LOST (nothing came in time), LIMIT_EXCEEDED (descriptors), PROTOCOL_ERROR (control data cut off by
   * the kernel: this process is out of descriptors), CANCELLED (closed meanwhile), SYSTEM
   */
  receive(bounds: ReceiveBounds): Promise<FdPiece> {
    return new Promise((resolve, reject) => {
      if (this.#closed) throw memferryError('CANCELLED', 'the connection is closed');
      if (this.#receiving) throw memferryError('INVALID_ARGUMENT', 'one receive at a time');
      native(() => this.#native.receive(bounds.mostBytes, bounds.mostDescriptors, bounds.timeoutMs));
      this.#receiving = { resolve, reject };
      this.#keepAlive = setInterval(() => {}, 2 ** 30);
    });
  }

  /**
   * Pieces until `whole` says so, all within the bounds together. A peer that closes first gives what there is, perhaps
   * nothing. The descriptors of all pieces, in their order.
   * @throws as `receive`; LIMIT_EXCEEDED also for the bytes
   */
  async receiveWhole(bounds: ReceiveBounds, whole: (bytes: Buffer) => boolean): Promise<FdPiece> {
    const deadline = performance.now() + bounds.timeoutMs;
    const descriptors: number[] = [];
    let bytes: Buffer = Buffer.alloc(0);
    try {
      for (;;) {
        const piece = await this.receive({
          // One more than may come, to see that there is more.
          mostBytes: bounds.mostBytes - bytes.length + 1,
          mostDescriptors: bounds.mostDescriptors - descriptors.length,
          timeoutMs: Math.max(0, Math.ceil(deadline - performance.now())),
        });
        descriptors.push(...piece.descriptors);
        if (piece.bytes.length === 0) return { bytes, descriptors };
        bytes = bytes.length === 0 ? piece.bytes : Buffer.concat([bytes, piece.bytes]);
        if (bytes.length > bounds.mostBytes) {
          throw memferryError('LIMIT_EXCEEDED', `a message of more than ${bounds.mostBytes} bytes`, {
            facts: { mostBytes: bounds.mostBytes },
          });
        }
        if (whole(bytes)) return { bytes, descriptors };
      }
    } catch (error) {
      closeDescriptors(descriptors);
      throw error;
    }
  }

  /**
   * The descriptors go with the first byte, so there must be one. The caller keeps and closes his, once this has
   * settled. Sends go out in the order of their calls.
   * @throws PEER_LOST (closed at the other end, or it does not read), CANCELLED (closed here), INVALID_ARGUMENT, SYSTEM
   */
  async send(bytes: Uint8Array, descriptors: readonly number[] = [], timeoutMs = 5000): Promise<void> {
    const before = this.#sending;
    let done = () => {};
    this.#sending = new Promise<void>((resolve) => {
      done = resolve;
    });
    try {
      await before;
      if (this.#closed) throw memferryError('CANCELLED', 'the connection is closed');
      const outcome = await nativeAsync(() => this.#native.send(bytes, [...descriptors], timeoutMs));
      if (outcome !== 'ok') throw outcomeError(outcome);
    } finally {
      done();
    }
  }

  /** Twice is fine. The peer reads the end. */
  close(): void {
    this.#closed = true;
    this.#native.close();
    this.#receiving?.reject(memferryError('CANCELLED', 'the connection was closed'));
    this.#receiving = null;
    clearInterval(this.#keepAlive);
  }

  [Symbol.dispose](): void {
    this.close();
  }
}

function outcomeError(outcome: Exclude<NativeFdOutcome, 'ok'>): MemferryError {
  switch (outcome) {
    case 'timed-out':
      return memferryError('PEER_LOST', 'the peer said nothing in time');
    case 'peer-gone':
      return memferryError('PEER_LOST', 'the peer has closed its end');
    case 'cancelled':
      return memferryError('CANCELLED', 'the connection was closed');
    case 'too-many-descriptors':
      return memferryError('LIMIT_EXCEEDED', 'the peer sent more descriptors than may come; all are closed');
    case 'truncated':
      return memferryError(
        'PROTOCOL_ERROR',
        'descriptors were cut off by the kernel: this process is out of them (see "ulimit -n"), or may not have them',
      );
  }
}
