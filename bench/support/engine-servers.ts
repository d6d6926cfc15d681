/** The VMD servers of a scatter, each a process of its own, and what its source and its destination are told of them. */
import { randomBytes } from 'node:crypto';
import type { NativeStageServer } from '../../lib/native.js';
import type { ImageParameters, StageFigures, StageSession } from './engine-stage.js';
import { Peer } from './processes.js';

/** Where a server is: its address as the others dial it. */
export interface ServerPlace {
  host: string;
  namespace: string | null;
}

export const serversOnLoopback = (count: number): ServerPlace[] =>
  Array.from({ length: count }, () => ({ host: '127.0.0.1', namespace: null }));

/** docs/protocol.md, "The VMD": scatter is role 0, gather 1, demand 2, probe 4, popular 5. */
const sourceRoles = 0b10001;
const destinationRoles = 0b00110;
const roleCount = 6;
/** Enough for a connection and some redials. */
const attempts = 8;
const tokenBytes = 32;

/** In the servers' order, as the engines want them. */
export interface ServerLists {
  source: NativeStageServer[];
  destination: NativeStageServer[];
}

interface RunningServer {
  place: ServerPlace;
  peer: Peer;
  port: number;
}

export class EngineServers {
  readonly #servers: readonly RunningServer[];

  private constructor(servers: readonly RunningServer[]) {
    this.#servers = servers;
  }

  /** With `preallocate` there is memory behind all that they may hold before the first page comes. */
  static async start(
    places: readonly ServerPlace[],
    memoryBytes: number,
    { preallocate }: { preallocate: boolean } = { preallocate: false },
  ): Promise<EngineServers> {
    const servers = new EngineServers(
      places.map((place) => ({
        place,
        peer: Peer.start('support/engine-stage', { namespace: place.namespace }),
        port: 0,
      })),
    );
    try {
      for (const server of servers.#servers) {
        server.port = await server.peer.call<number>('listen', {
          host: server.place.host,
          memoryBytes,
          preallocate,
        });
      }
      return servers;
    } catch (error) {
      await servers.stop();
      throw error;
    }
  }

  /** Every server makes the image, for one region of `pages`; each of the two may connect to all. */
  async makeImage(
    image: Uint8Array,
    pages: number,
    domainKey: Uint8Array | null = null,
  ): Promise<ServerLists> {
    const lists: ServerLists = { source: [], destination: [] };
    for (const [ordinal, server] of this.#servers.entries()) {
      const source = session(1, sourceRoles);
      const destination = session(2, destinationRoles);
      const parameters: ImageParameters = {
        image,
        pages,
        ordinal,
        domainKey,
        sessions: [source, destination],
      };
      const identity = await server.peer.call<string>('createImage', parameters);
      lists.source.push(addressed(server, ordinal, source, identity));
      lists.destination.push(addressed(server, ordinal, destination, identity));
    }
    return lists;
  }

  figures(): Promise<StageFigures[]> {
    return Promise.all(this.#servers.map(({ peer }) => peer.call<StageFigures>('figures')));
  }

  async stop(): Promise<void> {
    await Promise.all(this.#servers.map(({ peer }) => peer.stop()));
  }
}

function session(number: number, roles: number): StageSession {
  return { session: number, roles, tokens: new Uint8Array(randomBytes(attempts * roleCount * tokenBytes)) };
}

function addressed(
  { place, port }: RunningServer,
  ordinal: number,
  { session, tokens }: StageSession,
  identity: string,
): NativeStageServer {
  return { name: `server ${ordinal}`, host: place.host, port, session, tokens, identity };
}
