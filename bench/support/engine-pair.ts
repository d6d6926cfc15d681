/** Two real processes, a source and a destination, with the engine between them and no control channel. */
import { randomBytes } from 'node:crypto';
import type { ReceiveParameters } from './engine-destination.js';
import { Peer } from './processes.js';

export interface PairOptions {
  channels: number;
  /** The destination's address as the source dials it. */
  host?: string;
  sourceNamespace?: string | null;
  destinationNamespace?: string | null;
}

/** Enough for a connection and some redials. */
const epochs = 8;
const tokenBytes = 32;

export class EnginePair {
  readonly source: Peer;
  readonly destination: Peer;
  readonly #options: PairOptions;

  constructor(options: PairOptions) {
    this.#options = options;
    this.source = Peer.start('support/engine-source', { namespace: options.sourceNamespace ?? null });
    this.destination = Peer.start('support/engine-destination', {
      namespace: options.destinationNamespace ?? null,
    });
  }

  /** Receiver, then sender, then every connection. The regions are allocated already. */
  async connect(
    receive: Pick<ReceiveParameters, 'pagingFromStart' | 'mayPage' | 'discardFirst'>,
  ): Promise<void> {
    const { channels } = this.#options;
    const host = this.#options.host ?? '127.0.0.1';
    const migration = new Uint8Array(randomBytes(16));
    const tokens = new Uint8Array(randomBytes(epochs * (channels + 1) * tokenBytes));
    const port = await this.destination.call<number>('listen', { host });
    await this.destination.call('receive', { ...receive, migration, channels, tokens });
    await this.source.call('connect', { host, port, migration, channels, tokens });
  }

  /** Rejects unless both sides hold the same bytes. */
  async compare(): Promise<void> {
    const hashes = await Promise.all([
      this.source.call<bigint>('hash'),
      this.destination.call<bigint>('hash'),
    ]);
    if (hashes[0] !== hashes[1]) throw new Error('the destination holds other bytes than the source');
  }

  async stop(): Promise<void> {
    await Promise.all([this.source.stop(), this.destination.stop()]);
  }
}
