/** Unix sockets that carry descriptors. */

/** How a receive or a send of a unix socket ended. */
export type NativeFdOutcome =
  | 'ok'
  | 'timed-out'
  | 'cancelled'
  | 'too-many-descriptors'
  | 'truncated'
  | 'peer-gone';

/** A unix socket that carries descriptors. Closed by `close`, never by being collected. */
export interface NativeFdConnection {
  /** The pidfd is the connection's own, and closed with it; null: none to be had. `pid` 0: not visible from here. */
  peer(): { pid: number; uid: number; gid: number; pidfd: number | null };
  /** To be called once, before the first `receive`. Descriptors are the callback's from the call on. */
  onReceived(
    callback: (
      error: unknown,
      outcome: NativeFdOutcome | null,
      bytes: Buffer | null,
      descriptors: number[] | null,
    ) => void,
  ): void;
  /** What one recvmsg gives goes to the callback, no bytes at the end. One at a time. */
  receive(mostBytes: number, mostDescriptors: number, timeoutMs: number): void;
  /** The bytes are copied and the descriptors duplicated before it returns. One at a time. */
  send(bytes: Uint8Array, descriptors: number[], timeoutMs: number): Promise<NativeFdOutcome>;
  /** Twice is fine. A receive under way never reaches its callback. */
  close(): void;
}

export interface NativeFdListener {
  /** Lets the path go; connections stay. Twice is fine. */
  close(): void;
}
