/**
 * Pages the memory of another process from a file: a snapshot that is restored lazily. A pager like this can be followed
 * by another one, in another process, which goes on where it stopped; see `superviseGuest`.
 */
import { closeSync } from 'node:fs';
import { setTimeout } from 'node:timers/promises';
import { loadAddon } from './addon.js';
import { checkCallbacks, checkOptions } from './check-options.js';
import { type MemferryError, memferryError, native } from './errors.js';
import { deferred } from './protocol/deferred.js';
import { Region } from './region.js';
import { openPages } from './regular-file.js';
import { callOut } from './tell-listeners.js';

/** From the end of an owner's memory to the end of its process, at most. */
const ownerEndsMs = 250;

/** What `servePages` takes. */
export interface ServePagesOptions {
  /** Attached, with the owner's userfaultfd; its missing pages are served. */
  region: Region;
  /** The pages in order, raw: a file. */
  snapshot: string;
  /** Where in the file they begin. Default 0. */
  offsetBytes?: number;
  /** An open file that outlives this process and that every pager of this memory is given; see `superviseGuest`. */
  ledger?: number;
  /** Bring everything in order beside the faults. Default true; else only what is touched comes. */
  prepage?: boolean;
  /**
   * Pages that the file does not have: they fail to be read soon after. What is lost within a moment comes in one call.
   * What it throws is a warning of the process.
   */
  onLost?: (runs: readonly { first: number; count: number }[], error: MemferryError) => void;
}

/** Figures of one pager. */
export interface PagerStats {
  /** The region's. */
  pages: number;
  /** There, or dropped by the owner. */
  pagesSettled: number;
  /** Of them those that were there when this pager began. */
  pagesFound: number;
  /** That cannot be had, and fail to be read. */
  pagesLost: number;
  /** Pages that somebody waited for. */
  faults: number;
  /** Half of these were there within so long, in µs. */
  faultP50Us: number;
  /** 99 of 100 of these, in µs. */
  faultP99Us: number;
}

/** A pager at work. */
export interface PageService extends Disposable {
  /**
   * Every page is there, and the memory is ordinary. Rejects when paging cannot go on (OWNER_GONE, REGION_GONE, SYSTEM),
   * and with CANCELLED when it was stopped before.
   */
  readonly done: Promise<void>;
  /** As they are now; also when it is over. */
  stats(): PagerStats;
  /** Stops. Whoever touches a missing page waits for a successor. */
  leave(): void;
  /** Stops, and what is missing fails to be read. */
  end(): void;
  /** As `leave`. Twice is fine. */
  close(): void;
}

/**
 * Serves from now on. The region cannot move meanwhile.
 * @throws INVALID_ARGUMENT: a region that is not attached, has no userfaultfd, or is paged already, a snapshot that is no
 * file or ends before `offsetBytes`; SYSTEM; OWNER_GONE
 */
export function servePages(options: ServePagesOptions): PageService {
  checkOptions(options, 'servePages', ['region', 'snapshot', 'offsetBytes', 'ledger', 'prepage', 'onLost']);
  const { region, snapshot, offsetBytes = 0, ledger = null, prepage = true, onLost } = options;
  if (!(region instanceof Region))
    throw memferryError('INVALID_ARGUMENT', 'servePages: region is no Region; Region.attach makes one');
  if (typeof snapshot !== 'string' || snapshot === '')
    throw memferryError('INVALID_ARGUMENT', 'servePages: snapshot is the path of a file');
  if (typeof prepage !== 'boolean')
    throw memferryError('INVALID_ARGUMENT', 'servePages: prepage is true or false');
  checkCallbacks('servePages', { onLost });
  if (!Number.isSafeInteger(offsetBytes) || offsetBytes < 0)
    throw memferryError('INVALID_ARGUMENT', 'servePages: offsetBytes is no offset');
  if (!region.native.claim()) throw memferryError('REGION_BUSY', 'the region is moving, or paged already');
  const done = deferred<void>();
  done.promise.catch(() => {}); // nobody may be waiting
  let file = -1;
  try {
    file = openPages(snapshot, offsetBytes, 'servePages');
    const pager = native(() =>
      loadAddon().createSourcePager({
        region: region.native,
        snapshot: file,
        offset: offsetBytes,
        ledger,
        prepage,
        onEvent: ({ kind, code, message, lost }) => {
          if (kind === 'done') {
            done.resolve();
            stop('leave');
          }
          if (kind === 'lost') {
            const pages = lost.reduce((sum, { count }) => sum + count, 0);
            const error = memferryError('PAGES_LOST', message, { facts: { runs: lost, pages } });
            callOut({ what: 'onLost', code: 'MEMFERRY_LOST_THREW' }, onLost, lost, error);
          }
          if (kind === 'failed') void fail(code === 'REGION_GONE' ? code : 'SYSTEM', message);
        },
      }),
    );
    let last: PagerStats | null = null;
    let over = false;
    const stop = (how: 'leave' | 'end') => {
      if (over) return;
      over = true;
      native(() => pager[how]());
      last = native(() => pager.stats());
      region.native.release();
      // Its last word may be on its way still.
      if (last.pagesSettled === last.pages) done.resolve();
      else done.reject(memferryError('CANCELLED', 'the pager was stopped before every page was there'));
    };
    // The kernel ends a process's memory before it says that the process has ended.
    const fail = async (code: 'REGION_GONE' | 'SYSTEM', message: string) => {
      if (code === 'SYSTEM') await Promise.race([region.ownerGone, setTimeout(ownerEndsMs)]);
      done.reject(memferryError(code, message));
    };
    void region.ownerGone?.then((error) => {
      done.reject(error);
      stop('leave');
    });
    return {
      done: done.promise,
      stats: () => last ?? native(() => pager.stats()),
      leave: () => stop('leave'),
      end: () => stop('end'),
      close: () => stop('leave'),
      [Symbol.dispose]: () => stop('leave'),
    };
  } catch (error) {
    region.native.release();
    throw error;
  } finally {
    if (file >= 0) closeSync(file);
  }
}
