/**
 * Memory of real programs, for figures about savings: the WebAssembly heap of SQLite, with a database of the sources of
 * this checkout's npm packages, line by line; and the heap of a Python process that holds its standard library parsed.
 * Each is written to a file, from its first byte to its last, zeros and garbage included.
 */
import { spawn } from 'node:child_process';
import { closeSync, openSync, readdirSync, readFileSync, readSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

const sqliteBytes = 64 * 2 ** 20;
const pythonBytes = 64 * 2 ** 20;
const textFile = /\.(js|mjs|cjs|ts|mts|json|md)$/;

/** In the order of their names, so that the same lock file gives the same database. */
function* textFiles(directory: string): Generator<string> {
  for (const entry of readdirSync(directory, { withFileTypes: true }).sort((a, b) =>
    a.name < b.name ? -1 : 1,
  )) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) yield* textFiles(path);
    else if (textFile.test(entry.name)) yield path;
  }
}

interface Database {
  run(sql: string, values?: (string | number)[]): unknown;
  exec(sql: string): void;
  get(sql: string): Record<string, unknown> | null;
}

interface Memory {
  readonly buffer: ArrayBuffer;
}
type Instance = new (module: object, imports?: Record<string, object>) => { readonly exports: object };
/** As far as it is needed here; the types of WebAssembly come with a browser's. */
const webAssembly = (
  globalThis as unknown as { WebAssembly: { Instance: Instance; Memory: new () => Memory } }
).WebAssembly;

/** SQLite in this process, and the memory of its instance. */
async function loadSqlite(): Promise<{ database: Database; memory: Memory }> {
  const found: Memory[] = [];
  const real = webAssembly.Instance;
  webAssembly.Instance = new Proxy(real, {
    construct(_, [module, imports = {}]: [object, Record<string, object>?]) {
      const instance = new real(module, imports);
      const values = [instance.exports, ...Object.values(imports)].flatMap((each) => Object.values(each));
      for (const value of values) if (value instanceof webAssembly.Memory) found.push(value);
      return instance;
    },
  });
  try {
    const { default: sqlite } = await import('node-sqlite3-wasm');
    const database = new sqlite.Database(':memory:') as unknown as Database;
    const [memory] = found;
    if (memory === undefined) throw new Error("SQLite's memory was not seen");
    return { database, memory };
  } finally {
    webAssembly.Instance = real;
  }
}

export async function writeSqliteHeap(packages: string, to: string): Promise<void> {
  const { database, memory } = await loadSqlite();
  database.exec(`CREATE TABLE file (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE);
                 CREATE TABLE line (file INTEGER NOT NULL, number INTEGER NOT NULL, text TEXT NOT NULL,
                                    PRIMARY KEY (file, number)) WITHOUT ROWID;
                 CREATE INDEX line_text ON line (substr(text, 1, 24));`);
  let files = 0;
  for (const path of textFiles(packages)) {
    files++;
    database.run('INSERT INTO file VALUES (?, ?)', [files, path]);
    const lines = JSON.stringify(readFileSync(path, 'utf8').split('\n'));
    database.run('INSERT INTO line SELECT ?, key, value FROM json_each(?)', [files, lines]);
    if (memory.buffer.byteLength >= sqliteBytes) break;
  }
  writeFileSync(to, new Uint8Array(memory.buffer));
}

/** Parses the standard library's modules and keeps their trees, then says so and waits. */
const pythonProgram = `
import ast, glob, os, sys
kept, most = {}, int(sys.argv[1])
def resident():
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
for path in sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), '**', '*.py'), recursive=True)):
    try:
        with open(path, encoding='utf-8') as f: text = f.read()
        kept[path] = (text, ast.parse(text))
    except (SyntaxError, UnicodeDecodeError, RecursionError): continue
    if resident() >= most: break
print('ready', flush=True)
sys.stdin.read()
`;

/** Its anonymous memory that can be written, as /proc/PID/mem has it. */
export async function writePythonHeap(to: string): Promise<void> {
  const child = spawn('python3', ['-c', pythonProgram, String(pythonBytes)], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  try {
    await new Promise<void>((resolve, reject) => {
      child.once('error', reject);
      child.once('exit', () => reject(new Error('python3 ended')));
      createInterface({ input: child.stdout }).once('line', () => resolve());
    });
    const maps = readFileSync(`/proc/${child.pid}/maps`, 'utf8').split('\n');
    const memory = openSync(`/proc/${child.pid}/mem`, 'r');
    const file = openSync(to, 'w');
    try {
      for (const line of maps) {
        const match = /^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$/.exec(line);
        if (match === null) continue;
        const [start, end] = [Number(`0x${match[1]}`), Number(`0x${match[2]}`)];
        const bytes = Buffer.alloc(end - start);
        for (let at = 0; at < bytes.length; ) {
          const got = readSync(memory, bytes, at, bytes.length - at, start + at);
          if (got === 0) break;
          at += got;
        }
        writeSync(file, bytes);
      }
    } finally {
      closeSync(memory);
      closeSync(file);
    }
  } finally {
    child.removeAllListeners('exit');
    child.kill('SIGKILL');
  }
}
