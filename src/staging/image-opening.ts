/**
 * How an image comes to be over all servers of its list: made at every one of them, opened where it is already, or found by
 * its home server alone. What it is from then on is an ImageSet. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import type { CreateImage, ImageAccess, ImageKind } from '../protocol/stage-messages.js';
import type { Intermediary } from '../report.js';
import { StageClient, type StageSession } from './client.js';
import { asError, type ImageSetConnection, type Member, openAt, type ServerAddress } from './image-member.js';
import { ImageSet } from './image-set.js';

export interface NewImage {
  /** 32 hex digits: the migration's id. */
  image: string;
  secret: Uint8Array;
  /** Of its deduplication domain; null: it shares nothing. */
  domainKey: Uint8Array | null;
  /** The guest's, for reports. */
  name: string;
  kind: ImageKind;
  regions: CreateImage['regions'];
  pageSize: number;
  replicas: 1 | 2;
  leaseMs: number;
}

/** A server that did not take an image, and why. */
export interface Refusal {
  readonly client: StageClient;
  readonly error: MemferryError;
}

/**
 * Makes the image at every server. All of them have it, or none: then gives those that refused, by errors with their
 * names, after the others have let go of theirs. The connections are the image's when it is made, else still the
 * caller's. `unanswered`: who could not be asked, for account().
 */
export async function createImage(
  clients: readonly StageClient[],
  unanswered: readonly Intermediary[],
  connection: ImageSetConnection,
  made: NewImage,
): Promise<ImageSet | Refusal[]> {
  const list = clients.map(({ host, port, name }) => ({ name, host, port }));
  const { secret, domainKey, ...rest } = made;
  const sessions = await Promise.allSettled(
    clients.map((client, ordinal) => client.create({ ...rest, ordinal, servers: list }, secret, domainKey)),
  );
  const refusals = clients.flatMap((client, at): Refusal[] => {
    const session = sessions[at];
    return session?.status === 'rejected' ? [{ client, error: asError(session.reason) }] : [];
  });
  if (refusals.length > 0) {
    await Promise.allSettled(
      clients.map((client, at) =>
        sessions[at]?.status === 'fulfilled' ? client.dissolve(made.image) : undefined,
      ),
    );
    return refusals;
  }
  return new ImageSet({
    ...made,
    connection,
    unanswered,
    info: null,
    members: clients.map((client, at) => ({
      address: list[at] as Member['address'],
      client,
      session: (sessions[at] as PromiseFulfilledResult<StageSession>).value,
      error: null,
    })),
  });
}

/**
 * Opens an image at every server of its list that answers and still has it. Rejects when none does, or when the
 * `required` ones do not. Whoever is missing is named by `failures`.
 */
export async function openImage(
  servers: readonly ServerAddress[],
  connection: ImageSetConnection,
  opened: { image: string; secret: Uint8Array; access: ImageAccess; required?: 'all' | 'home' | 'any' },
): Promise<ImageSet> {
  const { image, secret, required = 'any' } = opened;
  const outcomes = await Promise.all(servers.map((server) => openAt(server, connection, opened)));
  const home = outcomes[0];
  const failed = outcomes.find(({ error }) => error !== null);
  const needed =
    required === 'all' ? failed : required === 'home' ? (home?.error ? home : undefined) : undefined;
  const misplaced = outcomes.findIndex(({ info }, ordinal) => info !== null && info.ordinal !== ordinal);
  const error =
    needed?.error ??
    (outcomes.every(({ client }) => client === null) ? failed?.error : null) ??
    (misplaced >= 0
      ? new MemferryError('PROTOCOL_ERROR', `the servers are listed in another order than at ${misplaced}`)
      : null);
  if (error) {
    await Promise.all(outcomes.map(({ client }) => client?.close()));
    throw error;
  }
  const info = outcomes.find((outcome) => outcome.info !== null)?.info ?? null;
  const kind = info?.kind ?? 'migration';
  return new ImageSet({ image, secret, kind, info, members: outcomes, connection });
}

/** Opens a parked image by its home server alone, which knows the others. */
export async function openParkedImage(
  home: ServerAddress,
  connection: ImageSetConnection,
  opened: { image: string; secret: Uint8Array; access: ImageAccess },
): Promise<ImageSet> {
  const client = await StageClient.dial({ ...connection, ...home });
  let servers: ServerAddress[];
  try {
    const { info } = await client.open(opened.image, opened.secret, 'control');
    if (info.ordinal !== 0) {
      throw new MemferryError('VMD_REFUSED', `${client.name} is not the home server of the image`, {
        facts: { reason: 'not-home', server: client.name },
      });
    }
    // Home is where it was found, whatever its maker called it.
    servers = [home, ...info.servers.slice(1)];
  } finally {
    await client.close();
  }
  return openImage(servers, connection, { ...opened, required: 'home' });
}
