/**
 * Keeps a guest of another process whose pages come from a file alive, or ends it, when the process that pages it dies.
 * Without anybody who holds its userfaultfd, pages that are missing would read as zeros; with one that nobody reads, the
 * guest would hang. So the supervisor holds the descriptors, never touches the memory, and puts a new pager in the place
 * of one that dies or stands still.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { closeSync, openSync, unlinkSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import { loadAddon } from './addon.js';
import { type AttachOptions, checkAttachment } from './attach.js';
import { checkOptions } from './check-options.js';
import { MemferryError, memferryError, native } from './errors.js';
import { deferred } from './protocol/deferred.js';
import type { PagerStats } from './serve-pages.js';

/** What `superviseGuest` takes. */
export interface SuperviseOptions {
  /** The guest's memory, as for `Region.attach`; `uffd` is needed. Keep the descriptors open until `done` settles. */
  attachment: AttachOptions;
  /** Where its pages come from; see `servePages`. */
  snapshot: string;
  /** Where in the file they begin. Default 0. */
  offsetBytes?: number;
  /** Bring everything in order beside the faults. Default true; else only what is touched comes. */
  prepage?: boolean;
  /** What happens when a pager dies: a new one goes on (default), or the guest is ended. */
  onPagerDeath?: 'hand-over' | 'end';
  /** So many pagers in all, and the guest is ended when the last one dies. Default 5. */
  mostPagers?: number;
  /** A pager that says nothing for so long has died, in ms. Default 5000. */
  stallMs?: number;
  /** Told of each pager as it begins to serve. */
  onPager?: (pager: { pid: number; turn: number }) => void;
}

/** What it took until every page was there. */
export interface SupervisionReport {
  /** How many pagers it took. */
  pagers: number;
  /** The last pager's. */
  stats: PagerStats;
}

/** A guest that is paged, and its pagers. */
export interface Supervision {
  /**
   * Every page is there, and the memory is ordinary. Rejects with OWNER_GONE when the guest ended, with GUEST_LOST when it
   * was ended because nobody paged it.
   */
  readonly done: Promise<SupervisionReport>;
  /** Of the pager that serves now; null between two of them, and when it is over. */
  readonly pagerPid: number | null;
  /** Ends the guest and the pager; `done` rejects with CANCELLED. */
  end(): void;
}

/** A line that a pager prints. */
type PagerLine =
  | { type: 'serving' | 'beat' | 'done'; stats: PagerStats }
  | { type: 'failed'; code: string; message: string };

const supervising = [
  'attachment',
  'snapshot',
  'offsetBytes',
  'prepage',
  'onPagerDeath',
  'mostPagers',
  'stallMs',
  'onPager',
];
const lookEveryMs = 100;
const program = fileURLToPath(new URL('./cli/main.js', import.meta.url));

/**
 * Pages another process's memory from a snapshot file (as `servePages`), by a process that is started for it (`memferry
 * page`): when that dies or stands still the next one goes on, or the guest is ended. This process holds the descriptors
 * and never touches the memory; if it dies too, whoever touches a missing page waits as long as the owner keeps a
 * duplicate of its userfaultfd (docs/attach.md). Needs root, or CAP_SYS_PTRACE over the owner.
 * @throws INVALID_ARGUMENT, SYSTEM, OWNER_GONE
 */
export function superviseGuest(options: SuperviseOptions): Supervision {
  checkOptions(options, 'superviseGuest', supervising);
  const { onPagerDeath = 'hand-over', mostPagers = 5, stallMs = 5000 } = options;
  if (typeof options.snapshot !== 'string')
    throw memferryError('INVALID_ARGUMENT', 'superviseGuest: snapshot is the path of a file');
  const { pidfd, uffd, mappings, memory } = checkAttachment(options.attachment);
  if (uffd === null) throw memferryError('INVALID_ARGUMENT', 'superviseGuest: the userfaultfd is missing');
  if (!Number.isInteger(mostPagers) || mostPagers < 1 || mostPagers > 1000)
    throw memferryError('INVALID_ARGUMENT', 'superviseGuest: mostPagers is 1 to 1000');
  const owner = native(() => loadAddon().holdProcess(pidfd));
  // Before the first pager: what nobody has registered would read as zeros until then.
  native(() => loadAddon().registerMissing(pidfd, uffd, mappings, memory));
  const ledger = openLedger();
  const done = deferred<SupervisionReport>();
  let child: ChildProcess | null = null;
  let turn = 0;
  let heard = performance.now();
  let stats: PagerStats | null = null;
  let why = '';

  const args = [
    ...['page', '--pidfd', '3', '--uffd', '4', '--ledger', '5', '--snapshot', options.snapshot],
    ...['--offset', String(options.offsetBytes ?? 0)],
    ...(options.prepage === false ? ['--no-prepage'] : []),
    ...(memory === null ? [] : ['--memory', '6']),
    ...mappings.flatMap(({ address, lengthBytes, offset }) => [
      '--mapping',
      `0x${address.toString(16)}:${lengthBytes}:${offset}`,
    ]),
  ];

  const settle = (error: MemferryError | null) => {
    if (done.settled) return;
    clearInterval(look);
    closeSync(ledger);
    if (error) done.reject(error);
    else if (stats) done.resolve({ pagers: turn, stats });
    child?.kill('SIGKILL');
    child = null;
  };
  const lose = () => {
    owner.end();
    settle(
      memferryError(
        'GUEST_LOST',
        `the guest was ended, since nobody pages its memory: ${why || 'its pager died'}`,
        {
          facts: { pagers: turn },
        },
      ),
    );
  };
  const start = () => {
    turn += 1;
    heard = performance.now();
    const fds = [pidfd, uffd, ledger, ...(memory === null ? [] : [memory])];
    const own = spawn(process.execPath, [program, ...args], { stdio: ['ignore', 'pipe', 'ignore', ...fds] });
    child = own;
    const died = () => {
      if (own !== child || done.settled) return;
      child = null;
      if (!owner.alive()) settle(memferryError('OWNER_GONE', `the guest's process ${owner.pid} is gone`));
      else if (onPagerDeath === 'end' || turn >= mostPagers) lose();
      else start();
    };
    own.on('error', (error) => {
      why = error.message;
      // It was never started, and then 'close' may not come.
      if (own.pid === undefined) died();
    });
    if (own.stdout) {
      createInterface({ input: own.stdout }).on('line', (text) => {
        if (own !== child) return;
        heard = performance.now();
        const line = parseLine(text);
        if (line === null) return;
        if (line.type === 'failed') why = line.message;
        else stats = line.stats;
        if (line.type === 'serving') options.onPager?.({ pid: own.pid ?? 0, turn });
        if (line.type === 'done') settle(null);
      });
    }
    own.on('close', died);
  };
  let lookedAt = performance.now();
  const look = setInterval(() => {
    const now = performance.now();
    // While this process did not run it heard nothing, whatever the pager said.
    heard = Math.min(now, heard + Math.max(0, now - lookedAt - lookEveryMs));
    lookedAt = now;
    if (!owner.alive()) settle(memferryError('OWNER_GONE', `the guest's process ${owner.pid} is gone`));
    else if (now - heard > stallMs) {
      why = `a pager stood still for ${stallMs} ms`;
      heard = now;
      child?.kill('SIGKILL');
    }
  }, lookEveryMs);
  start();
  return {
    done: done.promise,
    get pagerPid() {
      return child?.pid ?? null;
    },
    end() {
      if (done.settled) return;
      owner.end();
      settle(new MemferryError('CANCELLED', 'the guest was ended'));
    },
  };
}

function parseLine(text: string): PagerLine | null {
  try {
    return JSON.parse(text) as PagerLine;
  } catch {
    return null;
  }
}

/** On tmpfs, with no name: it goes with the last who has it open. */
function openLedger(): number {
  const path = `/dev/shm/memferry-ledger-${randomUUID()}`;
  const file = native(() => openSync(path, 'wx+', 0o600));
  unlinkSync(path);
  return file;
}
