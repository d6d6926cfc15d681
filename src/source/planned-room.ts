/**
 * What the guests of one gang have planned for at each server: a server's own word of its free memory tells nothing of
 * pages that are still to come, so each guest is placed against what the earlier ones leave. Owned by one gang;
 * JavaScript thread.
 */
import { defaultHeadroom, type PlaceableServer, type PlacedServer } from '../staging/placement.js';

interface Planned {
  /** As it was when the first guest was placed there. */
  readonly freeBytes: number;
  /** By guest. */
  readonly shares: Map<string, number>;
}

export class PlannedRoom {
  /** By the servers' identities. */
  readonly #servers = new Map<string, Planned>();

  /** The servers as `guest` may count on them. Its own plan, if there is one, is made again. */
  leftFor(guest: string, servers: readonly PlaceableServer[]): PlaceableServer[] {
    return servers.map((server) => {
      const planned = this.#servers.get(server.identity);
      if (!planned) return server;
      let others = 0;
      for (const [whose, share] of planned.shares) if (whose !== guest) others += share;
      // What all of them plan for stays within the headroom of one. Pages that are there already count in both.
      const left = Math.floor(planned.freeBytes - others / defaultHeadroom);
      return { ...server, freeBytes: Math.max(0, Math.min(server.freeBytes, left)) };
    });
  }

  /** In the same turn as `leftFor`. `servers`: as they have said themselves. */
  plan(guest: string, servers: readonly PlaceableServer[], placed: readonly PlacedServer[]): void {
    this.release(guest);
    const free = new Map(servers.map(({ identity, freeBytes }) => [identity, freeBytes]));
    for (const { identity, shareBytes } of placed) {
      const freeBytes = free.get(identity) ?? 0;
      const planned = this.#servers.get(identity) ?? { freeBytes, shares: new Map<string, number>() };
      planned.shares.set(guest, shareBytes);
      this.#servers.set(identity, planned);
    }
  }

  /** It does not go there, or its pages are gone from there. */
  release(guest: string): void {
    for (const [identity, { shares }] of this.#servers) {
      if (shares.delete(guest) && shares.size === 0) this.#servers.delete(identity);
    }
  }
}
