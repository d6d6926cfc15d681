/**
 * The SQL statements that JavaScript keeps of one database. A kept `Statement` of node-sqlite3-wasm is the address of what
 * SQLite made for it, which nobody else knows, and no object with a finalizer that the runtime would find: moved on it
 * would name whatever lies at that address in a database that has another history here. So those are named, and no pause
 * is granted while one is there. The library itself keeps no list of them; its own `run`, `all` and `get` finalize theirs.
 */
interface Kept {
  readonly isFinalized: boolean;
  finalize(): void;
}

const NAMED_CHARACTERS = 60;

export class KeptStatements {
  /** Weakly: what nobody can step any more may stay behind. */
  readonly #kept = new Map<WeakRef<Kept>, string>();

  add(statement: Kept, sql: string): void {
    const kept = new WeakRef(statement);
    this.#kept.set(kept, sql);
    const { finalize } = statement;
    statement.finalize = () => {
      this.#kept.delete(kept);
      finalize.call(kept.deref());
    };
  }

  /** For `busy`. */
  names(): string[] {
    const names: string[] = [];
    for (const [kept, sql] of this.#kept) {
      const statement = kept.deref();
      if (!statement || statement.isFinalized) this.#kept.delete(kept);
      else names.push(`statement that is not finalized: ${sql.slice(0, NAMED_CHARACTERS)}`);
    }
    return names;
  }
}
