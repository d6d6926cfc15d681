/**
 * The VMD servers that a guest may leave through: those that were named, as far as they answer, and those that announce
 * themselves, which are asked only where the placement wants them. An announcement is a hint: who is gone, full or at
 * another address since is left out, and the placement made again. Owned by one migration until its image is made;
 * JavaScript thread.
 */
import { parseAddress, type ResolvedMigrateOptions } from '../options.js';
import { abortError } from '../protocol/bounded.js';
import type { Announcement } from '../protocol/stage-messages.js';
import type { Intermediary } from '../report.js';
import { discover } from '../staging/announce.js';
import { StageClient } from '../staging/client.js';
import { asError, type ImageSetConnection } from '../staging/image-member.js';
import type { PlaceableServer } from '../staging/placement.js';

/** Announcements come each second; two of them, in case one is lost. */
const listenMs = 2200;

interface Candidate {
  readonly host: string;
  readonly port: number;
  /** By `via`. */
  readonly named: boolean;
  /** What it said of itself before there was a connection to it. */
  readonly heard: Announcement;
  client: StageClient | null;
}

export class Candidates implements AsyncDisposable {
  readonly #clients = new Set<StageClient>();
  readonly #signal: AbortSignal;
  #all: Candidate[] = [];
  readonly #unanswered: Intermediary[] = [];

  private constructor(
    private readonly connection: ImageSetConnection,
    signal: AbortSignal,
  ) {
    this.#signal = signal;
  }

  /** Rejects with CONNECT_FAILED and the like when servers were named and none of them answers. */
  static async find(
    { via, discover: announced }: Pick<ResolvedMigrateOptions, 'via' | 'discover'>,
    connection: ImageSetConnection,
    signal: AbortSignal,
  ): Promise<Candidates> {
    const candidates = new Candidates(connection, signal);
    const asked = candidates.#ask(via);
    const group = typeof announced === 'string' ? { group: announced } : {};
    try {
      const [, heard] = await Promise.all([
        asked,
        announced === false
          ? []
          : discover({ secret: connection.secret, timeoutMs: listenMs, signal, ...group }),
      ]);
      if (signal.aborted) throw abortError(signal);
      const isNamed = (one: { host: string; port: number }) =>
        [...candidates.#all, ...via.map(parseAddress)].some((each) => isAt(each, one));
      for (const { host, port, ...said } of heard) {
        if (isNamed({ host, port })) continue;
        candidates.#all.push({ host, port, named: false, heard: said, client: null });
      }
      return candidates;
    } catch (error) {
      await asked.catch(() => {}); // nobody is asked any more
      await candidates[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** By their newest words. Each once, whatever addresses it has: the one where it was named, or has answered. */
  get servers(): PlaceableServer[] {
    const known = new Map<string, PlaceableServer>();
    const rank = ({ named, client }: Candidate) => (named ? 0 : client ? 1 : 2);
    for (const candidate of [...this.#all].sort((a, b) => rank(a) - rank(b))) {
      const server = placeable(candidate);
      if (!known.has(server.identity)) known.set(server.identity, server);
    }
    return [...known.values()];
  }

  /** Those of `via` that answer, in its order, twice where one was named twice. */
  get named(): PlaceableServer[] {
    return this.#all.filter(({ named }) => named).map(placeable);
  }

  /** Who was named or chosen and does not take part, and why; for the report. */
  get unanswered(): readonly Intermediary[] {
    return this.#unanswered;
  }

  /**
   * False when some of them had not been asked: by now they have said how they are, or are left out, and the placement
   * has to be made again.
   */
  async reach(placed: readonly PlaceableServer[]): Promise<boolean> {
    const away = placed.map((server) => this.#of(server)).filter(({ client }) => client === null);
    const outcomes = await Promise.allSettled(
      away.map(async (candidate) => {
        candidate.client = await this.#dial(candidate, candidate.heard.name);
      }),
    );
    if (this.#signal.aborted) throw abortError(this.#signal);
    for (const [at, outcome] of outcomes.entries()) {
      if (outcome.status === 'rejected') this.#leaveOut(away[at] as Candidate, outcome.reason);
    }
    return away.length === 0;
  }

  /** The connections to servers that were reached. */
  clientsOf(placed: readonly PlaceableServer[]): StageClient[] {
    return placed.map((server) => this.#of(server).client as StageClient);
  }

  /** It does not take the guest. False for one that was named: that is its caller's to decide. */
  mayDoWithout(client: StageClient, error: unknown): boolean {
    if (this.#signal.aborted) throw abortError(this.#signal);
    const candidate = this.#all.find((each) => each.client === client);
    if (!candidate || candidate.named) return false;
    this.#leaveOut(candidate, error);
    return true;
  }

  /** These connections are somebody else's from here on. */
  handOver(clients: readonly StageClient[]): void {
    for (const client of clients) this.#clients.delete(client);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all([...this.#clients].map((client) => client.close()));
  }

  async #ask(via: readonly string[]): Promise<void> {
    const outcomes = await Promise.allSettled(
      via.map(async (address): Promise<Candidate> => {
        const client = await this.#dial(parseAddress(address));
        const heard = client.announcement as Announcement;
        return { host: client.host, port: client.port, named: true, heard, client };
      }),
    );
    let first: unknown = null;
    for (const [at, outcome] of outcomes.entries()) {
      if (outcome.status === 'fulfilled') {
        this.#all.push(outcome.value);
      } else {
        first ??= outcome.reason;
        this.#notTakingPart(String(via[at]), outcome.reason);
      }
    }
    if (via.length > 0 && this.#all.length === 0) throw first;
  }

  /** It has announced itself when this resolves. */
  async #dial(at: { host: string; port: number }, name?: string): Promise<StageClient> {
    const { host, port } = at;
    const client = await StageClient.dial({ ...this.connection, host, port, ...(name ? { name } : {}) });
    this.#clients.add(client);
    await client.firstAnnouncement();
    return client;
  }

  #of({ host, port }: PlaceableServer): Candidate {
    return this.#all.find((each) => isAt(placeable(each), { host, port })) as Candidate;
  }

  #leaveOut(candidate: Candidate, reason: unknown): void {
    this.#all = this.#all.filter((each) => each !== candidate);
    this.#notTakingPart(candidate.client?.name ?? candidate.heard.name, reason);
  }

  #notTakingPart(name: string, reason: unknown): void {
    this.#unanswered.push({ name, pages: 0, bytes: 0, failed: asError(reason).message });
  }
}

function placeable({ host, port, heard, client }: Candidate): PlaceableServer {
  return { ...(client?.announcement ?? heard), host: client?.host ?? host, port };
}

function isAt(one: { host: string; port: number }, other: { host: string; port: number }): boolean {
  return one.host === other.host && one.port === other.port;
}
