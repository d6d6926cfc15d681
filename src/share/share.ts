/**
 * A host's page share: pages that guests of one deduplication domain are likely to have, kept ahead of their arrival
 * within a budget. This process writes it; destinations on this host (`listen({ dedup, share })`) read it, and sources
 * of the same domain send references for what it holds.
 *
 * Who decides which pages are worth it puts them in by `native` (native/share/page_share.h), with a score: what has the
 * lowest leaves first.
 */
import { lstatSync, mkdirSync, rmSync } from 'node:fs';
import { loadAddon } from '../addon.js';
import { loadSecret } from '../control/secret.js';
import { MemferryError, native, nativeAsync } from '../errors.js';
import type { NativeShare, NativeShareFill, NativeShareStats } from '../native.js';
import { type ResolvedShareOptions, resolveShareOptions, type ShareOptions } from '../options.js';
import { domainKey } from '../source/dedup-domain.js';
import { shareDirectory, sharePath } from './share-path.js';

/** What a share holds, and what became of what it was given. */
export type ShareStats = NativeShareStats;
/** What became of the pages of a file. */
export type ShareFill = NativeShareFill;

/** Pages that were taken over are looked at in pieces of about 10 ms of a CPU; later all of them, a little at a time. */
const verifyEveryMs = 1000;
const verifyTakenOver = 4096;
const verifyAgain = 256;

/** A host's page share, open for writing; one process at a time. */
export class Share implements AsyncDisposable {
  readonly #verifying: NodeJS.Timeout;
  #closed = false;

  private constructor(
    /** Its file, for `listen({ share })`. */
    readonly path: string,
    /** The writer itself, for those who fill it. */
    readonly native: NativeShare,
  ) {
    let pages = verifyTakenOver;
    const verify = async () => {
      pages = (await this.native.verify(pages)) ? verifyTakenOver : verifyAgain;
    };
    // Closed meanwhile, or a file system that fails: the readers look for themselves.
    this.#verifying = setInterval(() => void verify().catch(() => {}), verifyEveryMs);
    this.#verifying.unref();
  }

  /**
   * Opens the domain's share for writing, and takes over what is there.
   * @throws INVALID_ARGUMENT (options; a file of something else), AUTH_FAILED (secret file), SYSTEM (somebody else
   * writes it; no such directory; no tmpfs)
   */
  static async open(options: ShareOptions): Promise<Share> {
    const resolved = resolveShareOptions(options);
    const key = await keyOf(resolved);
    const path = sharePath(resolved.file ?? null, key);
    if (resolved.file === undefined) makeDirectory();
    const opened = native(() => loadAddon().openShare({ path, key, budgetBytes: resolved.budgetBytes }));
    if (!opened) throw new MemferryError('SYSTEM', `${path}: another process writes this page share`);
    return new Share(path, opened);
  }

  /**
   * Puts in the pages of a file, all with one score; pages of zeros are left out. For base images (`saveBase` writes
   * them, a file a region) or any raw memory. Rejects with SYSTEM; INVALID_ARGUMENT, also of a share that is closed.
   */
  async fill(
    file: string,
    {
      score = 1,
      offsetBytes = 0,
      lengthBytes = 0,
    }: { score?: number; offsetBytes?: number; lengthBytes?: number } = {},
  ): Promise<ShareFill> {
    this.#mustBeOpen('fill');
    return nativeAsync(() => this.native.fill(file, offsetBytes, lengthBytes, score));
  }

  /** A smaller one takes effect at once: what is worth least leaves, and its memory is given back. */
  async setBudget(bytes: number): Promise<void> {
    if (!Number.isSafeInteger(bytes) || bytes < 0) {
      throw new MemferryError('INVALID_ARGUMENT', 'share.setBudget: not a number of bytes');
    }
    this.#mustBeOpen('setBudget');
    await nativeAsync(() => this.native.setBudget(bytes));
  }

  /** As they are now. @throws INVALID_ARGUMENT when it is closed */
  stats(): ShareStats {
    this.#mustBeOpen('stats');
    return native(() => this.native.stats());
  }

  get closed(): boolean {
    return this.#closed;
  }

  /** Lets the next writer in. The file stays for those who read it, unless `discard` takes it away. */
  async close({ discard = false }: { discard?: boolean } = {}): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    clearInterval(this.#verifying);
    if (discard) native(() => rmSync(this.path, { force: true }));
    this.native.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  #mustBeOpen(call: string): void {
    if (!this.#closed) return;
    throw new MemferryError('INVALID_ARGUMENT', `share.${call}: the share is closed; open it again`);
  }
}

async function keyOf({ dedup, secret, secretFile }: ResolvedShareOptions): Promise<Uint8Array> {
  const own = dedup.secret !== undefined || dedup.secretFile !== undefined;
  // Hosts of one domain have its own secret in common, or all of the hosts' one.
  const from = own
    ? await loadSecret({ secret: dedup.secret, secretFile: dedup.secretFile }, { loopback: false })
    : await loadSecret({ secret, secretFile }, { loopback: true });
  return domainKey(from, dedup.domain);
}

/** For this user alone: nobody else may say what lies there, or see how much. */
function makeDirectory(): void {
  const directory = shareDirectory();
  const found = native(() => {
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    return lstatSync(directory);
  });
  if (!found.isDirectory() || found.uid !== process.geteuid?.() || (found.mode & 0o077) !== 0) {
    throw new MemferryError('SYSTEM', `${directory}: not a directory of this user's alone (mode 0700)`);
  }
}
