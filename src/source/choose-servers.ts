/**
 * The intermediaries of a scatter: those that were named, those that announce themselves, or both, as far as they
 * answer; which of them, and in which order, is placement's pure decision. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import { parseAddress, type ResolvedMigrateOptions } from '../options.js';
import type { Intermediary } from '../report.js';
import { discover } from '../staging/announce.js';
import { StageClient } from '../staging/client.js';
import type { ServerAddress } from '../staging/image-set.js';
import { type PlaceableServer, place } from '../staging/placement.js';

export interface GuestNeed {
  bytes: number;
  /** Of its whole capacity. */
  capacityPages: number;
}

/** Announcements come each second; two of them, in case one is lost. */
const listenMs = 2200;

export interface ChosenServers {
  servers: ServerAddress[];
  /** Of those that were named: who did not answer, for the report. */
  unanswered: Intermediary[];
}

/**
 * No servers when they cannot hold the guest and the caller chose to go on directly.
 * @throws VMD_CAPACITY, CONNECT_FAILED (none answers), INVALID_ARGUMENT
 */
export async function chooseServers(
  options: ResolvedMigrateOptions,
  secret: Uint8Array,
  need: GuestNeed,
  signal: AbortSignal,
): Promise<ChosenServers> {
  const { via, discover: announced } = options;
  if (via.length === 0 && announced === false) {
    if (options.onCapacity === 'direct') return { servers: [], unanswered: [] };
    throw new MemferryError(
      'INVALID_ARGUMENT',
      `mode '${options.mode}' needs VMD servers: name some with via, or have them discovered`,
    );
  }
  const [{ named, unanswered }, heard] = await Promise.all([
    answering(options, secret, signal),
    announced === false
      ? []
      : discover({
          secret,
          timeoutMs: listenMs,
          signal,
          ...(announced === true ? {} : { group: announced }),
        }),
  ]);
  const servers: PlaceableServer[] = [...named];
  for (const server of heard) {
    if (!servers.some(({ host, port }) => host === server.host && port === server.port)) servers.push(server);
  }
  try {
    const chosen = place({
      need: {
        bytes: need.bytes,
        pages: need.capacityPages,
        linkBytesPerSecond: options.linkBytesPerSecond,
        replicas: options.replicas,
      },
      servers,
      // A fixed list is taken as it is; the placement chooses among what is heard.
      via: announced === false ? named.map(({ host, port }) => `${host}:${port}`) : null,
      source: { rack: options.rack },
      destination: { rack: options.destinationRack },
    });
    return { servers: chosen, unanswered };
  } catch (error) {
    const short = error instanceof MemferryError && error.code === 'VMD_CAPACITY';
    if (!short || options.onCapacity === 'fail') throw error;
    return { servers: [], unanswered };
  }
}

/** Those of `via` that answer, with what they say of themselves. Rejects when there are some and none does. */
async function answering(
  options: ResolvedMigrateOptions,
  secret: Uint8Array,
  signal: AbortSignal,
): Promise<{ named: PlaceableServer[]; unanswered: Intermediary[] }> {
  const outcomes = await Promise.allSettled(
    options.via.map(async (address): Promise<PlaceableServer> => {
      const { host, port } = parseAddress(address);
      const { plaintext, connectTimeoutMs, peerTimeoutMs } = options;
      const client = await StageClient.dial({
        host,
        port,
        secret,
        plaintext,
        connectTimeoutMs,
        peerTimeoutMs,
        signal,
      });
      try {
        return { ...(await client.firstAnnouncement()), host: client.host, port };
      } finally {
        await client.close();
      }
    }),
  );
  const named = outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []));
  const failed = outcomes.find((outcome) => outcome.status === 'rejected');
  if (named.length === 0 && failed) throw failed.reason;
  const unanswered = outcomes.flatMap((outcome, at): Intermediary[] =>
    outcome.status === 'fulfilled'
      ? []
      : [{ name: String(options.via[at]), pages: 0, bytes: 0, failed: messageOf(outcome.reason) }],
  );
  return { named, unanswered };
}

function messageOf(reason: unknown): string {
  return reason instanceof Error ? reason.message : String(reason);
}
