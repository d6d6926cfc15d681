/**
 * The intermediaries of a scatter: those that were named, those that announce themselves, or both, as far as they
 * answer; which of them, and in which order, is placement's pure decision. JavaScript thread.
 */
import { MemferryError } from '../errors.js';
import { parseAddress, type ResolvedMigrateOptions } from '../options.js';
import type { Intermediary } from '../report.js';
import { abortError } from '../protocol/bounded.js';
import { discover } from '../staging/announce.js';
import { StageClient } from '../staging/client.js';
import type { ImageSetConnection, ServerAddress } from '../staging/image-member.js';
import { type PlaceableServer, type PlacedServer, place } from '../staging/placement.js';

export interface GuestNeed {
  bytes: number;
  /** Of its whole capacity, see `indexPages`. */
  indexPages: number;
}

/** Announcements come each second; two of them, in case one is lost. */
const listenMs = 2200;

export interface ChosenServers {
  /** Those that were asked with the connections on which they have answered. */
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
  connection: ImageSetConnection,
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
  const asked: StageClient[] = [];
  const kept = new Set<StageClient>();
  const answers = answering(via, connection, asked);
  try {
    const [{ named, unanswered }, heard] = await Promise.all([
      answers,
      announced === false
        ? []
        : discover({
            secret: connection.secret,
            timeoutMs: listenMs,
            signal,
            ...(announced === true ? {} : { group: announced }),
          }),
    ]);
    const servers: PlaceableServer[] = [...named];
    for (const server of heard) {
      if (!servers.some((each) => isAt(each, server))) servers.push(server);
    }
    const chosen = placed(options, need, servers, named);
    if (signal.aborted) throw abortError(signal);
    const addresses = chosen.map((server): ServerAddress => {
      const client = asked.find((each) => isAt(each, server));
      if (client) kept.add(client);
      return { ...server, client };
    });
    return { servers: addresses, unanswered };
  } finally {
    await answers.catch(() => {}); // nobody is asked any more
    await Promise.all(asked.filter((client) => !kept.has(client)).map((client) => client.close()));
  }
}

interface At {
  host: string;
  port: number;
}
const isAt = (one: At, other: At) => one.host === other.host && one.port === other.port;

/** None when they cannot hold the guest and the caller chose to go on directly. */
function placed(
  options: ResolvedMigrateOptions,
  need: GuestNeed,
  servers: PlaceableServer[],
  named: readonly PlaceableServer[],
): PlacedServer[] {
  try {
    return place({
      need: {
        bytes: need.bytes,
        pages: need.indexPages,
        linkBytesPerSecond: options.linkBytesPerSecond,
        replicas: options.replicas,
      },
      servers,
      // A fixed list is taken as it is; the placement chooses among what is heard.
      via: options.discover === false ? named.map(({ host, port }) => `${host}:${port}`) : null,
      source: { rack: options.rack },
      destination: { rack: options.destinationRack },
    });
  } catch (error) {
    const short = error instanceof MemferryError && error.code === 'VMD_CAPACITY';
    if (!short || options.onCapacity === 'fail') throw error;
    return [];
  }
}

/** Those of `via` that answer, with what they say of themselves. Rejects when there are some and none does. */
async function answering(
  via: readonly string[],
  connection: ImageSetConnection,
  asked: StageClient[],
): Promise<{ named: PlaceableServer[]; unanswered: Intermediary[] }> {
  const outcomes = await Promise.allSettled(
    via.map(async (address): Promise<PlaceableServer> => {
      const { host, port } = parseAddress(address);
      const client = await StageClient.dial({ ...connection, host, port });
      asked.push(client);
      return { ...(await client.firstAnnouncement()), host: client.host, port };
    }),
  );
  const named = outcomes.flatMap((outcome) => (outcome.status === 'fulfilled' ? [outcome.value] : []));
  const failed = outcomes.find((outcome) => outcome.status === 'rejected');
  if (named.length === 0 && failed) throw failed.reason;
  const unanswered = outcomes.flatMap((outcome, at): Intermediary[] =>
    outcome.status === 'fulfilled'
      ? []
      : [{ name: String(via[at]), pages: 0, bytes: 0, failed: messageOf(outcome.reason) }],
  );
  return { named, unanswered };
}

function messageOf(reason: unknown): string {
  return reason instanceof Error ? reason.message : String(reason);
}
