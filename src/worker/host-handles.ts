/**
 * Files and directories of the host that a guest opened through Node: they stay behind, so each of them refuses a pause,
 * by name. Node's own list of what is open knows neither a descriptor from `openSync`, nor what `node:wasi` has open for a
 * guest. (Threads: program-threads.ts.)
 * Installed before the guest's module is loaded; lives in the worker.
 */
import type { EventEmitter } from 'node:events';
import fs, { type PathLike } from 'node:fs';
import type { FileHandle } from 'node:fs/promises';
import { createRequire, syncBuiltinESMExports } from 'node:module';
import { fileURLToPath } from 'node:url';
import { interceptUnref } from './host-unref.js';

export interface HostHandles {
  /** E.g. `host file /var/log/x`, in the order of their opening. */
  names(): string[];
}

type Callback = (error: Error | null, fd: number) => void;

export function interceptHostHandles(): HostHandles {
  const files = new Map<number, string>();
  const handles = new Set<{ handle: FileHandle; name: string }>();

  const native = { openSync: fs.openSync, open: fs.open, close: fs.close, closeSync: fs.closeSync };
  const openAsync = fs.promises.open;
  const opened = (fd: number, path: unknown): void => void files.set(fd, fileName(path));

  const replaced = {
    openSync(...args: Parameters<typeof fs.openSync>): number {
      const fd = native.openSync(...args);
      opened(fd, args[0]);
      return fd;
    },
    closeSync(fd: number): void {
      native.closeSync(fd);
      files.delete(fd);
    },
    open(path: PathLike, ...rest: unknown[]): void {
      const callback = rest.at(-1) as Callback;
      const told: Callback = (error, fd) => {
        if (!error) opened(fd, path);
        callback(error, fd);
      };
      const args = typeof callback === 'function' ? [...rest.slice(0, -1), told] : rest;
      (native.open as (...all: unknown[]) => void)(path, ...args);
    },
    close(fd: number, callback?: (error?: Error | null) => void): void {
      files.delete(fd);
      if (callback) native.close(fd, callback);
      else native.close(fd);
    },
  };
  Object.assign(fs, replaced);
  fs.promises.open = async (...args) => {
    const handle = await openAsync(...args);
    const entry = { handle, name: fileName(args[0]) };
    handles.add(entry);
    (handle as unknown as EventEmitter).once('close', () => handles.delete(entry));
    return handle;
  };

  const wasi = interceptWasi();
  const unrefd = interceptUnref();
  syncBuiltinESMExports();

  return {
    names: () => [
      ...[...files.values()].map((name) => `host file ${name}`),
      ...[...handles].map(({ name }) => `host file ${name}`),
      ...wasi(),
      ...unrefd.names(),
    ],
  };
}

interface WasiOptions {
  preopens?: Record<string, string>;
  stdin?: number;
  stdout?: number;
  stderr?: number;
}

/**
 * A WASI with directories has them open in native code, and whatever its program opens below them; nothing tells which.
 * So it refuses for as long as it lives. Gives their names.
 */
function interceptWasi(): () => string[] {
  let made: { wasi: WeakRef<object>; names: string[] }[] = [];
  const living = () => {
    made = made.filter(({ wasi }) => wasi.deref() !== undefined);
    return made;
  };
  const module = quietly(() => createRequire(import.meta.url)('node:wasi') as { WASI: new () => object });
  if (module === null) return () => [];
  const { WASI } = module;
  module.WASI = new Proxy(WASI, {
    construct(target, args: unknown[], newTarget): object {
      const wasi = Reflect.construct(target, args, newTarget === module.WASI ? target : newTarget) as {
        wasiImport: object;
      };
      const { preopens = {}, stdin = 0, stdout = 1, stderr = 2 } = Object(args[0]) as WasiOptions;
      const names = [
        ...Object.values(preopens).map((path) => `host directory ${fileName(path)} of node:wasi`),
        ...[stdin, stdout, stderr]
          .filter((fd) => fd > 2)
          .map((fd) => `host file of descriptor ${fd}, of node:wasi`),
      ];
      // What WebAssembly was given keeps the files open, whether or not the object around it is kept.
      if (names.length > 0) living().push({ wasi: new WeakRef(wasi.wasiImport), names });
      return wasi;
    },
  });
  return () => living().flatMap(({ names }) => names);
}

/** It warns as it is loaded, which a guest that does not use it should not cause. Null: this Node has none. */
function quietly<T>(load: () => T): T | null {
  const { emitWarning } = process;
  process.emitWarning = () => {};
  try {
    return load();
  } catch {
    return null;
  } finally {
    process.emitWarning = emitWarning;
  }
}

export function fileName(path: unknown): string {
  if (path instanceof URL) return path.protocol === 'file:' ? fileURLToPath(path) : `${path.protocol}…`;
  const name = String(path);
  return name.length > 200 ? `…${name.slice(-200)}` : name;
}
