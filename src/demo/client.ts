/**
 * The demo's client, a process of its own: writers and a reader that never stop while the guest moves, each
 * with one request under way. It remembers every write that was acknowledged, and at the end reads back from
 * the guest what it has.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { memferryError } from '../errors.js';
import { serve } from './child.js';
import { GuestFinder, type HostAddress } from './guest-finder.js';
import { type LatencyFigures, LatencyRecord } from './latency.js';
import {
  ACCOUNTS,
  type Bulk,
  compareLedger,
  idsAfter,
  integrityCheck,
  type LedgerFindings,
  read,
  singleValue,
  sumOfAccounts,
  sumOfItems,
  write,
} from './ledger.js';

const WRITERS = 2;
/** Between an answer and the next request of the same session: a guest is rarely asked without a pause. */
const THINK_TIME_MS = 1;
const IDS_AT_ONCE = 20_000;
/** A read goes anywhere into one of the guest's filler rows; past the end it gives nothing, which is fine. */
const FILLER_ROW_BYTES = 65_536;
/** The integrity check reads the whole database, whose last pages may still be on their way. */
const VERIFY_DEADLINE_MS = 120_000;

export interface ClientStart {
  hosts: HostAddress[];
  bulk: Bulk;
}

export interface ClientFindings extends LedgerFindings {
  acknowledged: number;
  /** Reads that did not show a write acknowledged before they were sent. */
  staleReads: number;
  resent: number;
  /** What `PRAGMA integrity_check` says; `ok`. */
  integrity: string;
}

export interface ClientCounts {
  answered: number;
}

class Client {
  #finder: GuestFinder;
  #bulk: Bulk;
  #latency = new LatencyRecord();
  #acknowledged: string[] = [];
  #acknowledgedByAccount = new Array<number>(ACCOUNTS).fill(0);
  #staleReads = 0;
  #answered = 0;
  #stopping = false;
  #failure: Error | null = null;
  #sessions: Promise<void>[] = [];
  #waiters: { answered: number; resolve: () => void; reject: (error: Error) => void }[] = [];

  constructor({ hosts, bulk }: ClientStart) {
    this.#finder = new GuestFinder(hosts);
    this.#bulk = bulk;
  }

  async start(): Promise<void> {
    await this.#finder.connect();
    for (let writer = 0; writer < WRITERS; writer++) this.#run((turn) => this.#write(writer, turn));
    this.#run(() => this.#read());
  }

  /** Resolves after that many more answers, however long they take; rejects when a session failed. */
  async answers(more: number): Promise<ClientCounts> {
    if (this.#failure) throw this.#failure;
    await new Promise<void>((resolve, reject) => {
      this.#waiters.push({ answered: this.#answered + more, resolve, reject });
    });
    return { answered: this.#answered };
  }

  figures(): LatencyFigures {
    return this.#latency.take();
  }

  async finish(): Promise<ClientFindings> {
    this.#stopping = true;
    await Promise.all(this.#sessions);
    if (this.#failure) throw this.#failure;
    const present: string[] = [];
    for (;;) {
      const rows = await this.#finder.request(
        idsAfter(present.at(-1) ?? '', IDS_AT_ONCE),
        VERIFY_DEADLINE_MS,
      );
      if (!Array.isArray(rows)) throw memferryError('PROTOCOL_ERROR', 'the guest gave no list of ids');
      for (const row of rows) present.push(String((row as { id: unknown }).id));
      if (rows.length < IDS_AT_ONCE) break;
    }
    const applied = [
      singleValue(await this.#finder.request(sumOfAccounts, VERIFY_DEADLINE_MS)),
      singleValue(await this.#finder.request(sumOfItems, VERIFY_DEADLINE_MS)),
    ];
    const integrity = await this.#finder.request(integrityCheck, VERIFY_DEADLINE_MS);
    this.#finder.close();
    return {
      acknowledged: this.#acknowledged.length,
      ...compareLedger(this.#acknowledged, present, applied),
      staleReads: this.#staleReads,
      resent: this.#finder.resent,
      integrity: Array.isArray(integrity) ? integrity.join('; ') : String(integrity),
    };
  }

  #run(once: (turn: number) => Promise<void>): void {
    const session = async () => {
      for (let turn = 0; !this.#stopping; turn++) {
        await once(turn);
        await delay(THINK_TIME_MS);
      }
    };
    this.#sessions.push(
      session().catch((error) => {
        this.#failure ??= error as Error;
        this.#stopping = true;
        for (const waiter of this.#waiters.splice(0)) waiter.reject(this.#failure);
      }),
    );
  }

  async #timed(request: unknown): Promise<unknown> {
    const sentAtMs = performance.now();
    const value = await this.#finder.request(request);
    this.#latency.answered(sentAtMs, performance.now());
    this.#answered++;
    this.#waiters = this.#waiters.filter((waiter) => {
      if (waiter.answered > this.#answered) return true;
      waiter.resolve();
      return false;
    });
    return value;
  }

  async #write(writer: number, turn: number): Promise<void> {
    // Fixed width, so that the order of the text is the order of the writes.
    const id = `${writer}-${String(turn).padStart(9, '0')}`;
    const account = (turn * WRITERS + writer) % ACCOUNTS;
    await this.#timed(write(id, account, below(this.#bulk.items)));
    this.#acknowledged.push(id);
    (this.#acknowledgedByAccount[account] as number) += 1;
  }

  async #read(): Promise<void> {
    const account = below(ACCOUNTS);
    const atLeast = this.#acknowledgedByAccount[account] as number;
    const row = 1 + below(this.#bulk.fillerRows);
    const rows = (await this.#timed(read(account, row, 1 + below(FILLER_ROW_BYTES)))) as {
      applied: number;
    }[];
    if (!(Number(rows[0]?.applied) >= atLeast)) this.#staleReads++;
  }
}

function below(most: number): number {
  return Math.floor(Math.random() * most);
}

let client: Client | null = null;

function started(): Client {
  if (!client) throw memferryError('INVALID_ARGUMENT', 'the client has not started');
  return client;
}

serve({
  start: async (argument: ClientStart) => {
    client = new Client(argument);
    await client.start();
  },
  answers: (more: number) => started().answers(more),
  figures: () => started().figures(),
  finish: () => started().finish(),
});
