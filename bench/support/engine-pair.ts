/**
 * Real processes, a source and a destination, with the engine between them and no control channel. For a scatter
 * VMD servers as well.
 */
import { randomBytes } from 'node:crypto';
import { allEncodings } from './encodings.js';
import type { ReceiveParameters } from './engine-destination.js';
import type { EngineServers, ServerLists } from './engine-servers.js';
import type { SendParameters } from './engine-source.js';
import { Peer } from './processes.js';

export interface PairOptions {
  channels: number;
  /** The destination's address as the source dials it. */
  host?: string;
  sourceNamespace?: string | null;
  destinationNamespace?: string | null;
  /** Of a scatter; whoever started them stops them. */
  servers?: EngineServers;
  /** What the destination takes in at first, in bytes a second; without it, as much as it can. */
  /** Of pages on the way; without it none. */
  compress?: SendParameters['compress'];
  /** For rounds; 0, the default: no deltas. */
  deltaCacheBytes?: number;
  /** There are later rounds. */
  tracked?: boolean;
  limits?: Pick<ReceiveParameters, 'bandwidth' | 'gatherLimit'>;
  /** Of the guest's deduplication domain at the servers. */
  domainKey?: Uint8Array | null;
  /** Whether the source makes use of it. */
  dedup?: boolean;
  /** Of the source, in bytes a second; without it, no limit. */
  bandwidth?: number;
}

/** Two that know each other: the image of a scatter has the migration's id. */
export type Credentials = Pick<SendParameters, 'migration' | 'channels' | 'tokens'>;

export function makeCredentials(channels: number): Credentials {
  return {
    migration: new Uint8Array(randomBytes(16)),
    channels,
    tokens: new Uint8Array(randomBytes(epochs * (channels + 1) * tokenBytes)),
  };
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
    const {
      channels,
      servers,
      host = '127.0.0.1',
      limits = { bandwidth: 0, gatherLimit: 0 },
      compress = 'off',
      deltaCacheBytes = 0,
      tracked = false,
      domainKey = null,
      dedup = false,
      bandwidth = 0,
    } = this.#options;
    const credentials = makeCredentials(channels);
    const lists: ServerLists | undefined = await servers?.makeImage(
      credentials.migration,
      await this.source.call<number>('pages'),
      domainKey,
    );
    const port = await this.destination.call<number>('listen', { host });
    const receiving: ReceiveParameters = {
      ...credentials,
      ...receive,
      ...limits,
      servers: lists?.destination ?? [],
      encodings: allEncodings,
    };
    await this.destination.call('receive', receiving);
    const sending: SendParameters = {
      ...credentials,
      host,
      port,
      servers: lists?.source ?? [],
      direct: true,
      compress,
      deltaCacheBytes,
      tracked,
      dedupKey: dedup ? domainKey : null,
      bandwidth,
    };
    await this.source.call('connect', sending);
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
