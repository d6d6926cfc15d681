/**
 * One server of an image: how it is spoken to, and what is done by a connection that is made for it. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { ImageAccess, ImageInfo } from '../protocol/stage-messages.js';
import { StageClient, type StageClientConfig, type StageSession } from './client.js';

export interface ServerAddress {
  readonly host: string;
  readonly port: number;
  readonly name?: string;
}

/** How the servers are spoken to; the same for all. */
export type ImageSetConnection = Omit<StageClientConfig, 'host' | 'port' | 'name'>;

/** As the options of either end of a migration say. A server is as long away as the engine looks for it. */
export function imageConnection(
  secret: Uint8Array,
  options: {
    plaintext: boolean;
    connectTimeoutMs: number;
    peerTimeoutMs: number;
    recoverTimeoutMs: number;
    inDoubtTimeoutMs?: number;
    maxStateBytes?: number;
  },
  signal?: AbortSignal,
): ImageSetConnection {
  const { plaintext, connectTimeoutMs, peerTimeoutMs, maxStateBytes } = options;
  const recoverTimeoutMs = Math.max(options.recoverTimeoutMs, options.inDoubtTimeoutMs ?? 0);
  return {
    ...{ secret, plaintext, connectTimeoutMs, peerTimeoutMs, recoverTimeoutMs },
    ...(maxStateBytes === undefined ? {} : { maxStateBytes }),
    ...(signal ? { signal } : {}),
  };
}

export interface Member {
  address: { name: string; host: string; port: number };
  /** Null where it could not be reached or lost the image. */
  client: StageClient | null;
  session: StageSession | null;
  error: MemferryError | null;
}

/** Not opened there, or not heard of for too long. */
export function isAway(client: StageClient | null): boolean {
  return client === null || client.ended !== null;
}

/** Its error says why it is not open there. */
export async function openAt(
  server: ServerAddress,
  connection: ImageSetConnection,
  { image, secret, access }: { image: string; secret: Uint8Array; access: ImageAccess },
): Promise<Member & { info: ImageInfo | null }> {
  const { host, port } = server;
  const address = { name: server.name ?? `${host}:${port}`, host, port };
  let client: StageClient | null = null;
  try {
    client = await StageClient.dial({ ...connection, ...server });
    const { info, session } = await client.open(image, secret, access);
    const { name } = info.servers[info.ordinal] ?? address;
    return { address: { name, host: client.host, port }, client, session, error: null, info };
  } catch (error) {
    await client?.close();
    return { address, client: null, session: null, error: asError(error), info: null };
  }
}

export function asError(error: unknown): MemferryError {
  return error instanceof MemferryError
    ? error
    : new MemferryError('SYSTEM', String(error), { cause: error });
}

/** False: it is still away. */
export async function dissolveAt(
  { address }: Member,
  connection: ImageSetConnection,
  { image, secret }: { image: string; secret: Uint8Array },
  epoch: number,
): Promise<boolean> {
  let client: StageClient | null = null;
  try {
    client = await StageClient.dial({ ...connection, ...address });
    await client.open(image, secret, 'control');
    await client.dissolve(image, epoch);
    return true;
  } catch (error) {
    return ['VMD_LOST', 'VMD_REFUSED', 'AUTH_FAILED'].includes(asError(error).code);
  } finally {
    await client?.close();
  }
}
