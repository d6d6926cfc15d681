/**
 * The source's control connection over a migration's life: the first one, and the ones that replace it after a
 * cut. Which cuts are survived is the commit's business; this file only dials. JavaScript thread.
 */
import { ControlChannel } from '../control/channel.js';
import { type DialledSession, dial } from '../control/dial.js';
import { MemferryError } from '../errors.js';
import { within } from '../protocol/bounded.js';
import { type Deferred, deferred } from '../protocol/deferred.js';
import { type DestinationMessage, destinationMessage, type SourceMessage } from '../protocol/messages.js';
import { resumeProof } from '../protocol/resume-proof.js';

export interface SessionConfig {
  to: { host: string; port: number };
  secret: Uint8Array;
  plaintext: boolean;
  migrationId: string;
  connectTimeoutMs: number;
  peerTimeoutMs: number;
  signal: AbortSignal;
  onMessage(message: DestinationMessage): void;
  /** The newest connection is gone, not by our own close. */
  onLost(error: MemferryError): void;
}

type Channel = ControlChannel<DestinationMessage, SourceMessage>;

/** Between two attempts to be heard again. */
const retryMs = 250;
/** A connection that lasted longer was one. */
const stayedMs = 2000;

export class SourceSession {
  /** Of the first connection: the data tokens derive from it. */
  readonly sessionKey: Uint8Array;
  /** Numeric: what answered, and where the data connections go. */
  readonly remoteAddress: string;
  #channel: Channel | null = null;
  /** Ends when everything of the newest connection has been handed on, and it is over. */
  #reading: Promise<void> = Promise.resolve();
  #resumed: Deferred<void> | null = null;
  #closed = false;

  private constructor(
    private readonly config: SessionConfig,
    first: DialledSession,
  ) {
    this.sessionKey = first.sessionKey;
    this.remoteAddress = first.remoteAddress;
    this.#adopt(first);
  }

  static async dial(config: SessionConfig): Promise<SourceSession> {
    return new SourceSession(config, await dial({ ...config, ...config.to }));
  }

  /** Throws when there is no connection; a connection's end is told by `onLost`. */
  send(message: SourceMessage, binary: Uint8Array | null = null): void {
    const channel = this.#channel;
    if (!channel) throw new MemferryError('CHANNEL_LOST', 'there is no control connection');
    // One that cannot go ends the connection, with that as the reason: what comes behind it would make no sense.
    channel.send(message, binary).catch((error) => {
      if (!channel.reason) channel.destroy(error);
    });
  }

  /** Drops the connection, if any, and dials a new one; resolves when the destination has taken it up. */
  async redial(): Promise<void> {
    if (this.#closed) throw new MemferryError('CANCELLED', 'the session is closed');
    const old = this.#channel;
    this.#channel = null;
    old?.destroy();
    const { to, secret, plaintext, migrationId, connectTimeoutMs } = this.config;
    const session = await dial({ ...to, host: this.remoteAddress, secret, plaintext, connectTimeoutMs });
    if (this.#closed) {
      session.duplex.destroy();
      throw new MemferryError('CANCELLED', 'the session is closed');
    }
    const resumed = deferred<void>();
    this.#resumed = resumed;
    this.#adopt(session);
    this.send({ type: 'resume-session', migrationId, proof: resumeProof(this.sessionKey, migrationId) });
    await within(
      resumed.promise,
      connectTimeoutMs,
      'PEER_LOST',
      'the destination did not take the connection up',
    );
  }

  /**
   * Says something until it is answered: again on every new connection, which it dials itself. Rejects with
   * PEER_LOST when `answered` has not settled within the bound after a cut.
   */
  async keepTelling(message: SourceMessage, answered: Promise<unknown>, boundMs: number): Promise<void> {
    let over = false;
    const settled = answered.finally(() => {
      over = true;
    });
    settled.catch(() => {});
    let deadline: number | null = null;
    while (!over) {
      const channel = this.#channel;
      if (channel && !channel.reason) {
        const since = performance.now();
        void channel.send(message);
        // Until its last message has been read, not only until it is closed: the answer and the goodbye may come in
        // one piece, and dialling anew would drop what nobody has looked at.
        await Promise.race([this.#reading, settled.catch(() => {})]);
        // A peer that takes connections only to drop them is no nearer to answering.
        if (performance.now() - since > stayedMs) deadline = null;
        continue;
      }
      deadline ??= performance.now() + boundMs;
      if (performance.now() > deadline) {
        throw new MemferryError(
          'PEER_LOST',
          'every page had left, but the destination was not heard of again',
        );
      }
      await this.redial().catch(() => new Promise((resolve) => setTimeout(resolve, retryMs)));
    }
  }

  /** With `goodbye` the destination is told that this is the end, not a cut. */
  async close(goodbye: boolean): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const channel = this.#channel;
    this.#channel = null;
    this.#resumed?.reject(new MemferryError('CANCELLED', 'the session is closed'));
    if (!channel) return;
    if (goodbye && !channel.reason) void channel.send({ type: 'goodbye' });
    await channel.close();
  }

  #adopt(session: DialledSession): void {
    const channel: Channel = new ControlChannel(session, {
      incoming: destinationMessage,
      peerTimeoutMs: this.config.peerTimeoutMs,
      maxBinaryBytes: 2 ** 32 - 1,
      admits: () => null,
    });
    this.#channel = channel;
    this.#reading = this.#read(channel);
  }

  async #read(channel: Channel): Promise<void> {
    try {
      for await (const { message } of channel) {
        if (this.#channel !== channel) return;
        if (message.type === 'session-resumed') this.#resumed?.resolve();
        else this.config.onMessage(message);
      }
    } catch {
      // `closed` below has the same reason.
    }
    const { error } = await channel.closed;
    if (this.#closed || this.#channel !== channel) return;
    this.config.onLost(
      error ?? new MemferryError('PEER_LOST', 'the destination ended the control connection'),
    );
  }
}
