/**
 * The demo's guest: SQLite in WebAssembly with a `:memory:` database, whose pages all lie in the WebAssembly
 * memory. Runs in a worker; its host talks to it by requests. `apply` executes each transaction exactly once:
 * its id is a unique key that is inserted in the same transaction, so a client may retry as often as it likes.
 */
import sqlite from 'node-sqlite3-wasm';

import { defineGuest } from '../worker/index.js';
import { KeptStatements } from './statements.js';

export type SqlValue = null | number | bigint | string | Uint8Array;

export interface SqlStatement {
  sql: string;
  params?: SqlValue[];
}

export type SqliteRequest =
  /** SQL without results; several statements, transactions left open too. */
  | { op: 'exec'; sql: string }
  | { op: 'run'; sql: string; params?: SqlValue[] }
  | { op: 'all'; sql: string; params?: SqlValue[] }
  /** A query whose rows are taken one by one: gives its number. It does not move: close it before. */
  | { op: 'open'; sql: string; params?: SqlValue[] }
  /** Its next row; null when there is none, and then it is closed. */
  | { op: 'next'; cursor: number }
  | { op: 'close'; cursor: number }
  /** One transaction, applied once however often it is asked for. */
  | { op: 'apply'; id: string; statements: SqlStatement[] }
  /** Is this id applied? */
  | { op: 'applied'; id: string }
  /** Adds random rows until the database has so many bytes, but at most `mostBytes` in this request. */
  | { op: 'fill'; databaseBytes: number; mostBytes?: number }
  | { op: 'stats' }
  | { op: 'integrity' };

export interface SqliteStats {
  databaseBytes: number;
  appliedTransactions: number;
  inTransaction: boolean;
}

type Row = Record<string, SqlValue>;

interface Statement {
  readonly isFinalized: boolean;
  iterate(values?: SqlValue[]): IterableIterator<Row>;
  finalize(): void;
}

interface Database {
  /** The address of the sqlite3 structure: all that JavaScript knows of the open database, but for statements. */
  _ptr: number;
  readonly inTransaction: boolean;
  exec(sql: string): void;
  run(sql: string, values?: SqlValue[]): { changes: number; lastInsertRowid: number | bigint };
  all(sql: string, values?: SqlValue[]): Row[];
  get(sql: string, values?: SqlValue[]): Row | null;
  prepare(sql: string): Statement;
}

interface Cursor {
  statement: Statement;
  rows: IterableIterator<Row>;
}

/** The database, and what JavaScript keeps of it beside its address. */
interface Open {
  db: Database;
  statements: KeptStatements;
  cursors: Map<number, Cursor>;
  opened: number;
}

interface State {
  databasePointer: number;
}

const FILLER_ROW_BYTES = 65_536;
const FILL_STEP_BYTES = 4 * 2 ** 20;

function open(): Open {
  const db = new sqlite.Database(':memory:') as unknown as Database;
  const statements = new KeptStatements();
  const prepare = db.prepare.bind(db);
  db.prepare = (sql) => {
    const statement = prepare(sql);
    statements.add(statement, sql);
    return statement;
  };
  return { db, statements, cursors: new Map(), opened: 0 };
}

function openCursor(guest: Open, sql: string, params?: SqlValue[]): number {
  const statement = guest.db.prepare(sql);
  guest.opened += 1;
  guest.cursors.set(guest.opened, { statement, rows: statement.iterate(params) });
  return guest.opened;
}

function closeCursor({ cursors }: Open, number: number): void {
  cursors.get(number)?.statement.finalize();
  cursors.delete(number);
}

function nextRow(guest: Open, number: number): Row | null {
  const cursor = guest.cursors.get(number);
  if (!cursor) throw new Error(`no cursor ${number} is open`);
  const row = cursor.rows.next();
  if (!row.done) return row.value;
  closeCursor(guest, number);
  return null;
}

function first(db: Database, sql: string): number {
  return Number(Object.values(db.get(sql) ?? {})[0] ?? 0);
}

function databaseBytes(db: Database): number {
  return first(db, 'PRAGMA page_count') * first(db, 'PRAGMA page_size');
}

function apply(db: Database, id: string, statements: SqlStatement[]): { id: string; applied: boolean } {
  if (db.inTransaction) throw new Error('a transaction is open already: end it before apply');
  db.exec('BEGIN IMMEDIATE');
  try {
    const { changes } = db.run('INSERT OR IGNORE INTO applied_transactions (id) VALUES (?)', [id]);
    if (changes > 0) for (const { sql, params } of statements) db.run(sql, params);
    db.exec('COMMIT');
    return { id, applied: changes > 0 };
  } catch (error) {
    // Some errors have rolled back already.
    if (db.inTransaction) db.exec('ROLLBACK');
    throw error;
  }
}

function fill(db: Database, target: number, most: number): { databaseBytes: number } {
  db.exec('CREATE TABLE IF NOT EXISTS filler (id INTEGER PRIMARY KEY, data BLOB NOT NULL)');
  let added = 0;
  let has = databaseBytes(db);
  while (has < target && added < most) {
    const rows = Math.max(1, Math.ceil(Math.min(FILL_STEP_BYTES, target - has) / FILLER_ROW_BYTES));
    db.run(
      `WITH RECURSIVE step(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM step WHERE i < ?)
       INSERT INTO filler (data) SELECT randomblob(${FILLER_ROW_BYTES}) FROM step`,
      [rows],
    );
    added += rows * FILLER_ROW_BYTES;
    has = databaseBytes(db);
  }
  return { databaseBytes: has };
}

export default defineGuest<Open, State, SqliteRequest>({
  create() {
    const guest = open();
    guest.db.exec('CREATE TABLE applied_transactions (id TEXT PRIMARY KEY) WITHOUT ROWID');
    return guest;
  },

  /** Loading SQLite makes its instance and its memory; the database in it is dropped with the memory's pages. */
  receive: open,

  save: ({ db }) => ({ databasePointer: db._ptr }),

  /** Files belong to the host: a database that is attached from one cannot move. Nor can a statement. */
  busy: ({ db, statements }) => [
    ...statements.names(),
    ...db
      .all('PRAGMA database_list')
      .flatMap(({ name, file }) =>
        file ? [`database file ${String(file)} attached as ${String(name)}`] : [],
      ),
  ],

  adopt({ db }, state) {
    if (!Number.isInteger(state?.databasePointer)) throw new TypeError('no database in the state');
    db._ptr = state.databasePointer;
    return undefined;
  },

  handle(guest, request) {
    const { db } = guest;
    switch (request.op) {
      case 'exec':
        db.exec(request.sql);
        return null;
      case 'run':
        return db.run(request.sql, request.params);
      case 'all':
        return db.all(request.sql, request.params);
      case 'open':
        return openCursor(guest, request.sql, request.params);
      case 'next':
        return nextRow(guest, request.cursor);
      case 'close':
        closeCursor(guest, request.cursor);
        return null;
      case 'apply':
        return apply(db, request.id, request.statements);
      case 'applied':
        return db.get('SELECT 1 FROM applied_transactions WHERE id = ?', [request.id]) !== null;
      case 'fill':
        return fill(db, request.databaseBytes, request.mostBytes ?? Number.POSITIVE_INFINITY);
      case 'stats':
        return {
          databaseBytes: databaseBytes(db),
          appliedTransactions: first(db, 'SELECT count(*) FROM applied_transactions'),
          inTransaction: db.inTransaction,
        } satisfies SqliteStats;
      case 'integrity':
        return db.all('PRAGMA integrity_check').map((row) => String(Object.values(row)[0]));
      default:
        throw new TypeError(`unknown operation ${String((request as { op: unknown }).op)}`);
    }
  },
});
