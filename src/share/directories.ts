/**
 * The memberships that a sampler or a share has at its domain's directory servers: joined when they answer, left when
 * they do not any more, joined again after a while. A server that was restarted is another one, and is told afresh.
 * Nobody waits for any of it. Owned by what it is for; JavaScript thread.
 */
import { lastingAbort } from '../protocol/bounded.js';
import { randomBytes } from 'node:crypto';
import { isLoopback } from '../control/address.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError } from '../errors.js';
import type { NativeDirectory } from '../native.js';
import { parseAddress, type ResolvedDirectoriesOptions } from '../options.js';
import { dedupDomainKey } from '../source/dedup-domain.js';
import { StageClient } from '../staging/client.js';

/** One of them, for people. */
export interface DirectoryStatus {
  /** As it was named: `host:port`. */
  address: string;
  /** It counts, now. */
  connected: boolean;
  /** Why it is not connected; null while it is, and before the first attempt has failed. */
  problem: string | null;
}

/** The native part that uses them. */
export interface DirectoryUser {
  setDirectories(directories: NativeDirectory[]): void;
  stats(): { lost: boolean[] };
}

interface Place {
  readonly address: string;
  client: StageClient | null;
  directory: NativeDirectory | null;
  joining: boolean;
  problem: string | null;
  retryAtMs: number;
  retryMs: number;
}

const lookMs = 500;
const firstRetryMs = 500;
const longestRetryMs = 15_000;

export class Directories {
  readonly #places: Place[];
  readonly #timer: NodeJS.Timeout;
  readonly #abort = lastingAbort();
  /** In the order in which the native part was told. */
  #told: Place[] = [];

  /** `guest`: 32 hex digits, or null for a host that has nothing to report. */
  constructor(
    private readonly options: ResolvedDirectoriesOptions,
    private readonly keys: { secret: Uint8Array; domainKey: Uint8Array },
    private readonly guest: string | null,
    private readonly user: DirectoryUser,
  ) {
    this.#places = options.via.map((address) => ({
      address,
      client: null,
      directory: null,
      joining: false,
      problem: null,
      retryAtMs: 0,
      retryMs: firstRetryMs,
    }));
    this.#timer = setInterval(() => this.#look(), lookMs).unref();
    this.#look();
  }

  get status(): DirectoryStatus[] {
    return this.#places.map(({ address, directory, problem }) => ({
      address,
      connected: directory !== null,
      problem,
    }));
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    this.#abort.abort(new MemferryError('CANCELLED', 'closed'));
    await Promise.all(this.#places.map(({ client }) => client?.close()));
  }

  #look(): void {
    let changed = false;
    for (const [at, lost] of this.user.stats().lost.entries()) {
      const place = this.#told[at];
      if (!lost || !place?.directory) continue;
      this.#lose(place, 'the connection was lost');
      changed = true;
    }
    if (changed) this.#tell();
    for (const place of this.#places) {
      if (place.directory || place.joining || performance.now() < place.retryAtMs) continue;
      place.joining = true;
      void this.#join(place);
    }
  }

  async #join(place: Place): Promise<void> {
    const { plaintext, connectTimeoutMs, peerTimeoutMs } = this.options;
    const { secret, domainKey } = this.keys;
    const member = randomBytes(16);
    try {
      const client = await StageClient.dial({
        ...parseAddress(place.address),
        secret,
        plaintext,
        connectTimeoutMs,
        peerTimeoutMs,
        signal: this.#abort.signal,
      });
      place.client = client;
      const { session, tokens, identity } = await client.join(member.toString('hex'), domainKey, this.guest);
      if (this.#abort.signal.aborted) return;
      const { name, host, port } = client;
      place.directory = { name, host, port, session, tokens, identity, member };
      place.problem = null;
      place.retryMs = firstRetryMs;
      this.#tell();
    } catch (error) {
      if (this.#abort.signal.aborted) return;
      this.#lose(place, error instanceof Error ? error.message : String(error));
    } finally {
      place.joining = false;
    }
  }

  #lose(place: Place, problem: string): void {
    void place.client?.close();
    place.client = null;
    place.directory = null;
    place.problem = problem;
    place.retryAtMs = performance.now() + place.retryMs;
    place.retryMs = Math.min(longestRetryMs, 2 * place.retryMs);
  }

  #tell(): void {
    if (this.#abort.signal.aborted) return;
    this.#told = this.#places.filter(({ directory }) => directory !== null);
    this.user.setDirectories(this.#told.map(({ directory }) => directory as NativeDirectory));
  }
}

/** Throws AUTH_FAILED (secret files), INVALID_ARGUMENT (a secret that is too short). */
export async function directoryKeys(
  options: ResolvedDirectoriesOptions,
): Promise<{ secret: Uint8Array; domainKey: Uint8Array }> {
  const loopback = options.via.every((address) => isLoopback(parseAddress(address).host));
  const secret = await loadSecret(options, { loopback });
  return { secret, domainKey: (await dedupDomainKey(options.dedup, secret)) as Uint8Array };
}
