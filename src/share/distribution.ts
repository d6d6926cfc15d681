/**
 * `distribute`: brings what many guests of a domain have into this host's share, ahead of those that come. JavaScript
 * thread; asking, fetching and keeping are a native one's.
 */
import { loadAddon } from '../addon.js';
import { MemferryError, native } from '../errors.js';
import type { NativeShare, NativeSpreader } from '../native.js';
import { type DistributeOptions, resolveDistributeOptions } from '../options.js';
import { throwIfCancelled } from '../protocol/bounded.js';
import { Directories, type DirectoryStatus, directoryKeys } from './directories.js';

/** What a distribution has done so far. */
export interface DistributionStats {
  /** Each asks all servers once. */
  rounds: number;
  /** In the last round: the most popular pages of all servers, as many as the share's budget is for. */
  pagesPopular: number;
  /** Of these, in the share. */
  pagesHeld: number;
  /** So far. */
  pagesFetched: number;
  /** That the share had no room for after all. */
  pagesRefused: number;
  /** To and from the servers. */
  bytesOnWire: number;
  /** Each server of `via`. */
  directories: DirectoryStatus[];
}

/** A share that is being filled. */
export interface Distribution extends AsyncDisposable {
  /** As they are now. */
  stats(): DistributionStats;
  /** Ends it; the share keeps what it has. Twice is fine. */
  close(): Promise<void>;
}

/**
 * Fills a share until it is closed. What is popular no longer leaves first, as does what is least popular when the
 * share's budget shrinks. Servers that do not answer are no error; they are asked again, and one that was restarted is
 * asked afresh.
 * @throws INVALID_ARGUMENT, AUTH_FAILED (secret files)
 */
export async function distribute(
  share: { readonly native: NativeShare; readonly closed?: boolean },
  options: DistributeOptions,
): Promise<Distribution> {
  if (!share?.native || share.closed)
    throw new MemferryError(
      'INVALID_ARGUMENT',
      'distribute: no share, or the share is closed; open one first',
    );
  const resolved = resolveDistributeOptions(options);
  const keys = await directoryKeys(resolved);
  throwIfCancelled(resolved.signal);
  const { intervalMs, bandwidth, signal } = resolved;
  const spreader = native(() =>
    loadAddon().createSpreader({ share: share.native, intervalMs: Math.ceil(intervalMs), bandwidth }),
  );
  return new ShareDistribution(spreader, new Directories(resolved, keys, null, spreader), signal);
}

class ShareDistribution implements Distribution {
  constructor(
    private readonly spreader: NativeSpreader,
    private readonly directories: Directories,
    private readonly signal: AbortSignal | undefined,
  ) {
    signal?.addEventListener('abort', this.#onAbort, { once: true });
  }

  stats(): DistributionStats {
    const { lost: _lost, ...figures } = this.spreader.stats();
    return { ...figures, directories: this.directories.status };
  }

  async close(): Promise<void> {
    this.signal?.removeEventListener('abort', this.#onAbort);
    this.spreader.close();
    await this.directories.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  readonly #onAbort = (): void => void this.close();
}
