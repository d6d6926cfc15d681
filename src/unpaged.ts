/**
 * Memory of other processes that is registered for missing pages, and that nobody pages for the time being. Who touches a
 * missing page waits, and has to go on waiting: were the last descriptor of the userfaultfd closed, it would read zeros. So
 * a duplicate is kept here until somebody pages the memory again, or the owner has ended, with the ledger of what was
 * discarded; and a process that ends before ends the owner too, for the owner may have kept none. JavaScript thread.
 */
import { closeSync } from 'node:fs';
import { openPidfd, takeDescriptor } from './pidfd.js';

export interface HeldProcess {
  readonly pid: number;
  alive(): boolean;
  end(): void;
}

interface Unpaged {
  owner: HeldProcess;
  uffd: number;
  ledger: number;
}

const lookEveryMs = 1000;
const held = new Map<string, Unpaged>();
let looking: NodeJS.Timeout | undefined;

/**
 * `memory`: which of the owner's. The userfaultfd is duplicated, the ledger is taken over. Ends the owner where no duplicate
 * is to be had.
 */
export function holdUnpaged(memory: string, owner: HeldProcess, uffd: number, ledger: number): void {
  try {
    const self = openPidfd(process.pid);
    try {
      held.set(keyOf(memory, owner), { owner, uffd: takeDescriptor(self, uffd), ledger });
    } finally {
      closeSync(self);
    }
  } catch {
    owner.end();
    closeSync(ledger);
    return;
  }
  if (looking) return;
  process.on('exit', endOwners);
  looking = setInterval(() => {
    for (const [key, { owner, ledger }] of [...held]) {
      if (owner.alive()) continue;
      letGo(key);
      closeSync(ledger);
    }
  }, lookEveryMs).unref();
}

export function isUnpaged(memory: string, owner: HeldProcess): boolean {
  return held.has(keyOf(memory, owner));
}

/** Who asks pages it from here on. Gives the ledger, which is the caller's then; null where nothing is held. */
export function takeOver(memory: string, owner: HeldProcess): number | null {
  const key = keyOf(memory, owner);
  const same = held.get(key)?.owner.alive() === true;
  const ledger = letGo(key);
  if (ledger === null || same) return ledger;
  // Of a process that is gone, whose number this one has.
  closeSync(ledger);
  return null;
}

function letGo(key: string): number | null {
  const unpaged = held.get(key);
  if (!unpaged) return null;
  held.delete(key);
  closeSync(unpaged.uffd);
  if (held.size === 0) {
    clearInterval(looking);
    looking = undefined;
    process.off('exit', endOwners);
  }
  return unpaged.ledger;
}

function endOwners(): void {
  for (const { owner } of held.values()) owner.end();
}

const keyOf = (memory: string, { pid }: HeldProcess) => `${pid} ${memory}`;
