/**
 * A microVM whose memory is served: its connection stays open for as long as it lives, its missing pages come from a
 * file, or from a region of this process that a migration fills.
 */
import { closeSync } from 'node:fs';
import { loadAddon } from '../addon.js';
import { type MemferryError, memferryError, native } from '../errors.js';
import type { FdConnection } from '../fd-channel.js';
import type { NativeRestore, NativeRestoreStats, NativeRun } from '../native.js';
import { deferred } from '../protocol/deferred.js';
import { Region } from '../region.js';
import { callOut } from '../tell-listeners.js';
import type { Handshake } from './handshake.js';
import { asOneRegion, type GuestMapping, type GuestMemory } from './mappings.js';

/**
 * What is brought before anyone waits for it: nothing, what a sequential reader will want next, or that and everything
 * else in order.
 */
export type PrePaging = 'none' | 'sequential' | 'all';

/** How serving a microVM ended, and its figures. */
export interface RestoreReport {
  /** Of Firecracker. */
  pid: number;
  /** `complete`: all is there and the handler may go. `owner-gone`: Firecracker has ended. `closed`: we let go of it. */
  end: 'complete' | 'owner-gone' | 'closed';
  /** Of its memory. */
  heapBytes: number;
  /** Since its connection. */
  durationMs: number;
  /** Figures of the handler. */
  stats: NativeRestoreStats;
}

/** A microVM whose memory is served from a snapshot or a region, for as long as it lives. */
export class MicroVm implements Disposable {
  /** Of Firecracker. */
  readonly pid: number;
  /** Its user. */
  readonly uid: number;
  /** Where its memory is, as Firecracker has said. */
  readonly memory: GuestMemory;
  readonly #restore: NativeRestore;
  readonly #ended = deferred<RestoreReport>();
  readonly #closed = deferred<void>();
  readonly #startedAt = performance.now();
  readonly #keepAlive = setInterval(() => {}, 2 ** 30);
  #complete = false;
  #over = false;

  /**
   * Serves from here on. Takes the connection and the descriptors over, also when it throws.
   * @throws INVALID_ARGUMENT, SYSTEM (the descriptor is no userfaultfd, or not that memory's), OWNER_GONE
   */
  constructor(
    private readonly connection: FdConnection,
    private readonly handshake: Handshake,
    source: { path: string } | { region: Region },
    options: {
      prePaging: PrePaging;
      mappings?: GuestMapping[];
      onLost?: ((runs: NativeRun[], why: string) => void) | undefined;
    },
  ) {
    this.pid = connection.peer.pid;
    this.uid = connection.peer.uid;
    this.memory = handshake.memory;
    this.#ended.promise.catch(() => {});
    try {
      const { pidfd } = connection.peer;
      if (pidfd === null) throw memferryError('OWNER_GONE', 'the peer ended, or is not visible from here');
      this.#restore = native(() =>
        loadAddon().createRestore({
          path: 'path' in source ? source.path : null,
          region: 'region' in source ? source.region.native : null,
          uffd: handshake.uffd,
          pidfd,
          mappings: options.mappings ?? handshake.memory.mappings,
          pageSize: handshake.memory.pageSize,
          prePaging: options.prePaging,
          onEvent: (kind, code, message, lost) => this.#on(kind, code, message, lost, options.onLost),
        }),
      );
    } catch (error) {
      this.#letGo();
      throw error;
    }
  }

  /**
   * How it ended. Rejects when it failed (what was missing is poisoned by then), with PAGES_LOST when pages were lost,
   * before they are poisoned: the others are served on.
   */
  get ended(): Promise<RestoreReport> {
    return this.#ended.promise;
  }

  /** Nothing is held of it any more: it has ended, or was closed. */
  get closed(): Promise<void> {
    return this.#closed.promise;
  }

  /** Whether writes are tracked by the userfaultfd itself, so that the running microVM can be a source. */
  get tracksWrites(): boolean {
    return this.stats().tracksWrites;
  }

  /** As they are now; also when it is over. */
  stats(): NativeRestoreStats {
    return this.#restore.stats();
  }

  /** The region that is the source is all there. */
  sourceComplete(): void {
    if (!this.#over) this.#restore.sourceComplete();
  }

  /**
   * The microVM's memory as a region, when all of it is there (`ended` with `complete`): what `migrate` and `park` move.
   * This handler is at its end then; the region watches the microVM.
   * @throws INVALID_ARGUMENT before that; as `Region.attach`
   */
  toRegion(): Region {
    if (!this.#complete || this.#over) {
      throw memferryError(
        'INVALID_ARGUMENT',
        'not all of the memory is there: serve it with prePaging "all"',
      );
    }
    const { pidfd } = this.connection.peer;
    if (pidfd === null) throw memferryError('OWNER_GONE', 'the microVM has ended');
    // Its events are the region's from here on.
    this.#restore.close();
    const region = attachMemory(pidfd, this.handshake, this.memory.lengthBytes);
    this.close();
    return region;
  }

  /**
   * Lets go: what the microVM has not got yet fails to be read from now on (SIGBUS), and whoever waits is woken. Twice
   * is fine.
   */
  close(): void {
    this.#close(() => this.#end('closed'));
  }

  [Symbol.dispose](): void {
    this.close();
  }

  /** Whoever sees the end sees that nothing is held any more. */
  #close(end: () => void): void {
    if (this.#over) return;
    this.#over = true;
    this.#restore.close();
    this.#letGo();
    end();
  }

  #on(
    kind: Parameters<Parameters<ReturnType<typeof loadAddon>['createRestore']>[0]['onEvent']>[0],
    code: string,
    message: string,
    lost: NativeRun[],
    onLost: ((runs: NativeRun[], why: string) => void) | undefined,
  ): void {
    switch (kind) {
      case 'complete':
        this.#complete = true;
        this.#end('complete');
        break;
      case 'owner-gone':
        this.#close(() => this.#end('owner-gone'));
        break;
      case 'lost':
        this.#ended.reject(lostPages(lost, message));
        callOut({ what: 'onLost', code: 'MEMFERRY_FIRECRACKER_THREW' }, onLost, lost, message);
        setImmediate(() => {
          if (!this.#over) this.#restore.acknowledgeLoss();
        });
        break;
      case 'failed':
        this.#close(() =>
          this.#ended.reject(memferryError(code === 'PROTOCOL' ? 'PROTOCOL_ERROR' : 'SYSTEM', message)),
        );
        break;
    }
  }

  #end(end: RestoreReport['end']): void {
    this.#ended.resolve({
      pid: this.pid,
      end,
      heapBytes: this.memory.lengthBytes,
      durationMs: performance.now() - this.#startedAt,
      stats: this.#restore.stats(),
    });
  }

  #letGo(): void {
    clearInterval(this.#keepAlive);
    this.connection.close();
    closeSync(this.handshake.uffd);
    if (this.handshake.memfd !== null) closeSync(this.handshake.memfd);
    this.#closed.resolve();
  }
}

/**
 * The memory as one region, its pages in the order of the snapshot.
 * @throws INVALID_ARGUMENT when it is not of that length; as `Region.attach`
 */
export function attachMemory(pidfd: number, { memory, uffd, memfd }: Handshake, lengthBytes: number): Region {
  const mappings = asOneRegion(memory, lengthBytes);
  return Region.attach({ pidfd, uffd, mappings, ...(memfd === null ? {} : { memory: memfd }) });
}

function lostPages(runs: NativeRun[], why: string): MemferryError {
  const pages = runs.reduce((sum, run) => sum + run.count, 0);
  return memferryError('PAGES_LOST', `${why}; ${pages} pages are lost, and reading one fails`, {
    facts: { runs, pages },
  });
}
