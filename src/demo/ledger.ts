/**
 * The demo's database and what its client does with it. Every write carries an id that the guest inserts as a
 * unique key in the same transaction, so that a write sent twice is applied once; and every write adds one to
 * an account, so that one applied twice, or half, shows: the accounts' sum is the number of ids.
 */

import type { SqliteRequest } from './sqlite-guest.js';

export const ACCOUNTS = 64;
/** The rows that writes change, a few to a page, are this share of the database; the rest is only read. */
const ITEMS_SHARE = 1 / 8;
const ITEM_BYTES = 900;

/** Where the database's size comes from. */
export interface Bulk {
  items: number;
  /** Rows of the guest's own filler. */
  fillerRows: number;
}

export function itemsOf(databaseBytes: number): number {
  return Math.max(1, Math.floor((databaseBytes * ITEMS_SHARE) / ITEM_BYTES));
}

export function createLedger(items: number): SqliteRequest[] {
  const numbers = (most: string) =>
    `WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < ${most})`;
  return [
    {
      op: 'exec',
      sql: `CREATE TABLE account (number INTEGER PRIMARY KEY, applied INTEGER NOT NULL);
            CREATE TABLE item (number INTEGER PRIMARY KEY, touched INTEGER NOT NULL, payload BLOB NOT NULL)`,
    },
    { op: 'run', sql: `${numbers(String(ACCOUNTS - 1))} INSERT INTO account SELECT i, 0 FROM n` },
    {
      op: 'run',
      sql: `${numbers('?')} INSERT INTO item SELECT i, 0, randomblob(${ITEM_BYTES}) FROM n`,
      params: [items - 1],
    },
  ];
}

/** One transaction: an account, and one of the many rows that are changed with it. */
export function write(id: string, account: number, item: number): SqliteRequest {
  return {
    op: 'apply',
    id,
    statements: [
      { sql: 'UPDATE account SET applied = applied + 1 WHERE number = ?', params: [account] },
      { sql: 'UPDATE item SET touched = touched + 1 WHERE number = ?', params: [item] },
    ],
  };
}

/** The account, and some bytes of a large row, so that reads go all over the heap. */
export function read(account: number, fillerRow: number, offset: number): SqliteRequest {
  return {
    op: 'all',
    sql: `SELECT (SELECT applied FROM account WHERE number = ?) AS applied,
                 (SELECT hex(substr(data, ?, 16)) FROM filler WHERE id = ?) AS bytes`,
    params: [account, offset, fillerRow],
  };
}

/** The next ids after `after`, in order. */
export function idsAfter(after: string, limit: number): SqliteRequest {
  return {
    op: 'all',
    sql: 'SELECT id FROM applied_transactions WHERE id > ? ORDER BY id LIMIT ?',
    params: [after, limit],
  };
}

export const sumOfAccounts: SqliteRequest = { op: 'all', sql: 'SELECT sum(applied) AS value FROM account' };
export const sumOfItems: SqliteRequest = { op: 'all', sql: 'SELECT sum(touched) AS value FROM item' };
export const countOfFiller: SqliteRequest = { op: 'all', sql: 'SELECT count(*) AS value FROM filler' };
export const integrityCheck: SqliteRequest = { op: 'integrity' };

/** What a query for one value gives. */
export function singleValue(rows: unknown): number {
  return Number(Array.isArray(rows) ? (rows[0] as { value?: unknown } | undefined)?.value : undefined);
}

/** What the client holds against what the database has, at the end. */
export interface LedgerFindings {
  lost: number;
  duplicated: number;
}

/**
 * Pure: the ids that were acknowledged, those that the guest has, and how often the effects of a write were
 * applied, by each of the tables that it changes.
 */
export function compareLedger(
  acknowledged: Iterable<string>,
  present: string[],
  applied: number[],
): LedgerFindings {
  const here = new Set(present);
  let lost = 0;
  for (const id of acknowledged) if (!here.has(id)) lost++;
  const repeatedIds = present.length - here.size;
  const surplus = Math.max(0, ...applied.map((count) => count - here.size));
  const missing = Math.max(0, ...applied.map((count) => here.size - count));
  return { lost: lost + missing, duplicated: repeatedIds + surplus };
}
