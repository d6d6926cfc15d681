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
import { checkAttachment } from './attach.js';
import { isErrorCode, MemferryError, memferryError, native } from './errors.js';
import { resolveSuperviseOptions, type SuperviseOptions } from './options/supervise.js';
import { deferred } from './protocol/deferred.js';
import { openPages } from './regular-file.js';
import type { PagerStats } from './serve-pages.js';
import { callOut } from './tell-listeners.js';
import { holdUnpaged, isUnpaged, takeOver } from './unpaged.js';

export type { SuperviseOptions } from './options/supervise.js';

/** What it took until every page was there. */
export interface SupervisionReport {
  /** How many pagers it took. */
  pagers: number;
  /** The last pager's. */
  stats: PagerStats;
}

/** A guest that is paged, and its pagers. */
export interface Supervision extends Disposable {
  /**
   * Every page is there, and the memory is ordinary. Rejects with OWNER_GONE when the guest ended, with GUEST_LOST when it
   * was ended because nobody paged it any more.
   *
   * Where no pager could begin to serve it rejects with why (SYSTEM, ADDON_MISSING, ...), and so it does with CANCELLED
   * after `close`. The guest lives then, whoever touches a missing page waits, and `facts.unpaged` is true: call
   * `superviseGuest` anew in this process, with the same `mappings`, or `end()`. A process that exits before that ends the guest, since nobody would
   * keep it from reading zeros.
   */
  readonly done: Promise<SupervisionReport>;
  /** Of the pager that serves now; null between two of them, and when it is over. */
  readonly pagerPid: number | null;
  /** Ends the guest and the pager; `done` rejects with CANCELLED. Also when `done` has rejected and left the guest unpaged. */
  end(): void;
  /**
   * Ends the pager, and lets the guest wait for another supervision; see `done`. When every page is there it does nothing.
   * Twice is fine.
   */
  close(): void;
}

/** A line that a pager prints. */
type PagerLine =
  | { type: 'serving' | 'beat' | 'done'; stats: PagerStats }
  | { type: 'failed'; code: string; message: string };

const lookEveryMs = 100;
/** For a pager's first word: a process has to start for it, on a machine that may be busy. */
const firstWordMs = 20_000;
const program = fileURLToPath(new URL('./cli/main.js', import.meta.url));

/**
 * Pages another process's memory from a snapshot file (as `servePages`), by a process that is started for it (`memferry
 * page`): when that dies or stands still the next one goes on, or the guest is ended. This process holds the descriptors
 * and never touches the memory; if it dies too, whoever touches a missing page waits as long as the owner keeps a
 * duplicate of its userfaultfd (docs/attach.md). Needs root, or CAP_SYS_PTRACE over the owner.
 * @throws INVALID_ARGUMENT, SYSTEM (also of a snapshot that cannot be opened), OWNER_GONE: the guest is as it was
 */
export function superviseGuest(options: SuperviseOptions): Supervision {
  const { snapshot, offsetBytes, prepage, onPagerDeath, mostPagers, stallMs, onPager } =
    resolveSuperviseOptions(options);
  const { pidfd, uffd, mappings, memory } = checkAttachment(options.attachment);
  if (uffd === null) throw memferryError('INVALID_ARGUMENT', 'superviseGuest: the userfaultfd is missing');
  const owner = native(() => loadAddon().holdProcess(pidfd));
  // What can fail comes before the memory is registered: from then on only a pager can give the guest its pages.
  // Once: a pager that follows must have the pages of the one before it, whatever lies at the path by then.
  const image = openPages(snapshot, offsetBytes, 'superviseGuest');
  let ledger = -1;
  try {
    ledger = openLedger();
    // Before the first pager: what nobody has registered would read as zeros until then.
    native(() => loadAddon().registerMissing(pidfd, uffd, mappings, memory));
  } catch (error) {
    closeSync(image);
    if (ledger >= 0) closeSync(ledger);
    throw error;
  }
  const ours = mappings.map(({ address, lengthBytes }) => `${address}:${lengthBytes}`).join();
  // What an earlier supervision has left behind goes on: what the owner has discarded since must not come back.
  const former = takeOver(ours, owner);
  if (former !== null) {
    closeSync(ledger);
    ledger = former;
  }
  const done = deferred<SupervisionReport>();
  let child: ChildProcess | null = null;
  let turn = 0;
  let heard = performance.now();
  /** That the pager of now has said anything yet. */
  let spoken = false;
  let stats: PagerStats | null = null;
  /** Why the last pager failed; the code where it has said one. */
  let why: { code: string; message: string } | null = null;
  /** That any has: its ledger and its pages are there, and who follows it goes on. */
  let served = false;

  const args = [
    ...['page', '--pidfd', '3', '--uffd', '4', '--ledger', '5', '--snapshot', '/proc/self/fd/6'],
    ...['--offset', String(offsetBytes)],
    ...(prepage ? [] : ['--no-prepage']),
    ...(memory === null ? [] : ['--memory', '7']),
    ...mappings.flatMap(({ address, lengthBytes, offset }) => [
      '--mapping',
      `0x${address.toString(16)}:${lengthBytes}:${offset}`,
    ]),
  ];

  const settle = (error: MemferryError | null) => {
    if (done.settled) return;
    clearInterval(look);
    if (!unpaged) closeSync(ledger);
    closeSync(image);
    child?.kill('SIGKILL');
    child = null;
    if (error) done.reject(error);
    else if (stats) done.resolve({ pagers: turn, stats });
  };
  /** Its pages are missing already, so that whoever touches one waits; that it goes on waiting is all that can be done. */
  const leave = (code: MemferryError['code'], message: string) => {
    if (unpaged) return;
    unpaged = true;
    holdUnpaged(ours, owner, uffd, ledger);
    const over = () => settle(new MemferryError(code, message, { facts: { pagers: turn, unpaged: true } }));
    // What it says from now on, and that it ends, means nothing any more; but the next one comes only after it.
    const last = child;
    child = null;
    if (last?.pid === undefined || last.exitCode !== null || last.signalCode !== null) {
      over();
      return;
    }
    last.once('exit', over);
    last.kill('SIGKILL');
  };
  let unpaged = false;
  const giveUp = () => {
    const because = why?.message ?? 'its pager died';
    if (!served) {
      leave(
        isErrorCode(why?.code) ? why.code : 'SYSTEM',
        `no pager could begin, and the guest waits for its pages: ${because}`,
      );
      return;
    }
    owner.end();
    settle(
      memferryError('GUEST_LOST', `the guest was ended, since nobody pages its memory: ${because}`, {
        facts: { pagers: turn },
      }),
    );
  };
  const start = () => {
    turn += 1;
    heard = performance.now();
    spoken = false;
    const fds = [pidfd, uffd, ledger, image, ...(memory === null ? [] : [memory])];
    let own: ChildProcess;
    try {
      own = spawn(process.execPath, [program, ...args], { stdio: ['ignore', 'pipe', 'ignore', ...fds] });
    } catch (error) {
      // Some of what the system refuses is thrown (ENOMEM), the rest is told below.
      why = { code: '', message: error instanceof Error ? error.message : String(error) };
      if (!owner.alive()) settle(memferryError('OWNER_GONE', `the guest's process ${owner.pid} is gone`));
      else if (turn >= mostPagers || (served && onPagerDeath === 'end')) giveUp();
      else setTimeout(() => child === null && !done.settled && !unpaged && start(), lookEveryMs);
      return;
    }
    child = own;
    const died = () => {
      if (own !== child || done.settled) return;
      child = null;
      if (!owner.alive()) settle(memferryError('OWNER_GONE', `the guest's process ${owner.pid} is gone`));
      else if (turn >= mostPagers || (served ? onPagerDeath === 'end' : why?.code)) giveUp();
      else start();
    };
    own.on('error', (error) => {
      why = { code: '', message: error.message };
      // It was never started, and then 'close' may not come.
      if (own.pid === undefined) died();
    });
    if (own.stdout) {
      createInterface({ input: own.stdout }).on('line', (text) => {
        if (own !== child) return;
        heard = performance.now();
        spoken = true;
        const line = parseLine(text);
        if (line === null) return;
        if (line.type === 'failed') why = line;
        else stats = line.stats;
        if (line.type === 'serving') {
          served = true;
          callOut({ what: 'onPager', code: 'MEMFERRY_PAGER_THREW' }, onPager, { pid: own.pid ?? 0, turn });
        }
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
    else if (now - heard > (spoken ? stallMs : Math.max(stallMs, firstWordMs))) {
      why = { code: '', message: `a pager stood still for ${Math.round(now - heard)} ms` };
      heard = now;
      child?.kill('SIGKILL');
    }
  }, lookEveryMs);
  start();
  const close = () => {
    if (!done.settled) leave('CANCELLED', 'the supervision was closed; the guest waits for its pages');
  };
  return {
    done: done.promise,
    get pagerPid() {
      return child?.pid ?? null;
    },
    end() {
      // Whoever has taken it over has it.
      if (done.settled && !isUnpaged(ours, owner)) return;
      owner.end();
      settle(new MemferryError('CANCELLED', 'the guest was ended'));
    },
    close,
    [Symbol.dispose]: close,
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
