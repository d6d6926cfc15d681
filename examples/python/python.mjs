/**
 * A Python interpreter (npm: pyodide) as a guest: its whole heap moves, and whatever is in the middle goes on, an
 * iterator, a generator, the state of `random`. Nothing of pyodide is changed.
 *
 *     { "run": "code" }     the value of the last expression, as JSON
 *
 * Objects of Python that JavaScript would keep (proxies) are destroyed before the answer. What else could not move,
 * `busy` names: files that Python has open, directories of the host that are mounted.
 */
import { defineGuest } from 'memferry/worker';
import { loadPyodide } from 'pyodide';

/** Text moves as text, files as bytes: both are JavaScript's here, so `save` has to carry them. */
const MOST_FILE_BYTES = 16 * 2 ** 20;

async function build() {
  const printed = [];
  const print = (line) => {
    printed.push(line);
    if (printed.length > 1000) printed.shift();
  };
  // The same at every host, so that the same start leads to the same addresses, whatever the host's environment.
  const env = { HOME: '/home/pyodide', PYTHONHASHSEED: '0' };
  const python = await alikeAnywhere(() => loadPyodide({ env, stdout: print, stderr: print }));
  // Once, so that what JavaScript keeps for running code is part of what was built.
  python.runPython('None');
  return { python, printed, files: filesIn(python) };
}

/**
 * Two more things of the host decide where Python's objects come to lie as it starts: the path of the program, which
 * is its argv[0], and the moment: a file's time at a whole second is an integer that CPython does not allocate.
 */
async function alikeAnywhere(start) {
  const { now } = Date;
  const [, program] = process.argv;
  Date.now = () => {
    const ms = now();
    return ms % 1000 === 0 ? ms + 1 : ms;
  };
  process.argv[1] = '/python';
  try {
    return await start();
  } finally {
    Date.now = now;
    process.argv[1] = program;
  }
}

/** Files of the interpreter's own file system, which Emscripten keeps in JavaScript: path → node. */
function filesIn({ FS }) {
  const found = new Map();
  const visit = (path, node) => {
    // Devices and processes are made by the interpreter.
    if (node.isMountpoint || path === '/dev' || path === '/proc') return;
    if (FS.isDir(node.mode)) {
      for (const [name, child] of Object.entries(node.contents)) visit(`${path}/${name}`, child);
    }
    if (FS.isDir(node.mode) || FS.isFile(node.mode)) {
      found.set(path, {
        mode: node.mode,
        mtime: Number(node.mtime ?? node.timestamp),
        bytes: node.usedBytes ?? 0,
      });
    }
  };
  visit('', FS.root);
  return found;
}

/** What the program made, changed or removed since the guest was built. */
function changes(app) {
  const { FS } = app.python;
  const now = filesIn(app.python);
  const changed = [...now].filter(([path, { mtime, bytes }]) => {
    const before = app.files.get(path);
    return (
      !before || (FS.isFile(FS.stat(path || '/').mode) && (before.mtime !== mtime || before.bytes !== bytes))
    );
  });
  return {
    removed: [...app.files.keys()].filter((path) => !now.has(path)).reverse(),
    made: changed.map(([path, { mode }]) => ({ path, mode, directory: FS.isDir(mode) })),
    bytes: changed.reduce((sum, [, { bytes }]) => sum + bytes, 0),
  };
}

/** Addresses that pyodide keeps in JavaScript, of modules and namespaces that it made as it started. */
function addresses({ python }) {
  const { _api: api, _module: module } = python;
  return Object.entries({ ...api, eval_code: api.pyodide_code.eval_code })
    .filter(([, value]) => api.isPyProxy(value))
    .map(([name, value]) => `${name} at ${module.PyProxy_getPtr(value)}`);
}

export default defineGuest({
  create: build,

  layout: (app) => [`Python ${app.python.version}`, ...addresses(app)],

  save(app) {
    const { made, removed } = changes(app);
    const files = made.map((file) =>
      file.directory ? file : { ...file, data: app.python.FS.readFile(file.path) },
    );
    return { printed: app.printed, files, removed };
  },

  busy(app) {
    const { FS } = app.python;
    const open = FS.streams
      .filter((stream) => stream && stream.fd > 2)
      .map((stream) => `Python's open file ${stream.path ?? `number ${stream.fd}`}`);
    const mounted = [...new Set(mountsBelow(FS.root.mount))]
      .filter((mount) => mount.type === FS.filesystems.NODEFS)
      .map(({ mountpoint, opts }) => `directory ${opts.root} of the host, mounted at ${mountpoint}`);
    const { bytes } = changes(app);
    const large = bytes > MOST_FILE_BYTES ? [`${bytes} bytes of files in the interpreter's file system`] : [];
    return [...open, ...mounted, ...large];
  },

  adopt(app, state) {
    app.printed.push(...state.printed);
    const { FS } = app.python;
    for (const path of state.removed) {
      if (FS.isDir(FS.stat(path).mode)) FS.rmdir(path);
      else FS.unlink(path);
    }
    for (const { path, mode, directory, data } of state.files) {
      if (!directory) FS.writeFile(path, data);
      else if (!FS.analyzePath(path).exists) FS.mkdir(path);
      FS.chmod(path, mode & 0o7777);
    }
  },

  handle(app, request) {
    if (request === 'printed') return app.printed;
    const { python } = app;
    const value = python.runPython(request.run);
    if (!python._api.isPyProxy(value)) return value ?? null;
    try {
      return value.toJs({ create_pyproxies: false, dict_converter: Object.fromEntries });
    } finally {
      value.destroy();
    }
  },
});

function mountsBelow(mount) {
  return [mount, ...mount.mounts.flatMap(mountsBelow)];
}
