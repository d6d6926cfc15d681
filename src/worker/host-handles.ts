/**
 * Files and threads of the host that a guest opened through Node: they stay behind, so each of them refuses a pause,
 * by name. Node's own list of what is open knows neither a descriptor from `openSync` nor a worker that was unref'd.
 * Installed before the guest's module is loaded; lives in the worker.
 */
import type { EventEmitter } from 'node:events';
import fs, { type PathLike } from 'node:fs';
import type { FileHandle } from 'node:fs/promises';
import { syncBuiltinESMExports } from 'node:module';
import { fileURLToPath } from 'node:url';
import threads from 'node:worker_threads';

export interface HostHandles {
  /** E.g. `host file /var/log/x`, in the order of their opening. */
  names(): string[];
}

type Callback = (error: Error | null, fd: number) => void;

export function interceptHostHandles(): HostHandles {
  const files = new Map<number, string>();
  const handles = new Set<{ handle: FileHandle; name: string }>();
  const workers = new Map<threads.Worker, string>();

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

  const Worker = threads.Worker;
  threads.Worker = new Proxy(Worker, {
    construct(target, args: unknown[], newTarget): object {
      const worker = Reflect.construct(
        target,
        args,
        newTarget === threads.Worker ? target : newTarget,
      ) as threads.Worker;
      workers.set(worker, fileName(args[0]));
      worker.once('exit', () => workers.delete(worker));
      return worker;
    },
  });
  syncBuiltinESMExports();

  return {
    names: () => [
      ...[...files.values()].map((name) => `host file ${name}`),
      ...[...handles].map(({ name }) => `host file ${name}`),
      ...[...workers.values()].map((name) => `a thread of its own (${name})`),
    ],
  };
}

function fileName(path: unknown): string {
  if (path instanceof URL) return path.protocol === 'file:' ? fileURLToPath(path) : `${path.protocol}…`;
  const name = String(path);
  return name.length > 200 ? `…${name.slice(-200)}` : name;
}
