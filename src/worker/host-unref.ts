/**
 * What a guest keeps open without keeping its worker alive (`unref`): Node's list of open resources leaves it out, and
 * it would be lost with the worker all the same. Timers are not meant: one that is unref'd stands still and stays
 * behind, as the guest has said that it may. Installed before the guest's module is loaded; lives in the worker.
 */
import childProcess from 'node:child_process';
import dgram from 'node:dgram';
import fs from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import net from 'node:net';

/** So many are held before the closed ones among them are looked for. */
const roomAtFirst = 256;

interface Held {
  name: string;
  /** Still open. */
  open(): boolean;
}

/** As Node has it: `unref` and `ref` give the object itself. */
interface Unrefable {
  unref(...args: unknown[]): unknown;
  ref(...args: unknown[]): unknown;
}

export function interceptUnref(): { names(): string[] } {
  const held = new Map<object, Held>();
  let roomFor = roomAtFirst;
  const forgetClosed = () => {
    for (const [object, { open }] of held) if (!open()) held.delete(object);
  };
  const hold = (object: object, entry: Held) => {
    held.set(object, entry);
    if (held.size < roomFor) return;
    forgetClosed();
    roomFor = Math.max(roomAtFirst, 2 * held.size);
  };

  const watch = (prototype: Unrefable, describe: (object: never) => Held) => {
    const { unref, ref } = prototype;
    prototype.unref = function (this: object, ...args) {
      // Node does so to sockets in a pool, and to a server that was told so before it listened.
      if (this instanceof net.Server || !calledByNode()) hold(this, describe(this as never));
      return Reflect.apply(unref, this, args);
    };
    prototype.ref = function (this: object, ...args) {
      held.delete(this);
      return Reflect.apply(ref, this, args);
    };
  };

  watch(net.Socket.prototype, (socket: net.Socket) => ({
    name: `socket${to(socket)}`,
    open: () => !socket.destroyed,
  }));
  watch(net.Server.prototype, (server: net.Server) => ({
    name: `server${at(server.address())}`,
    open: () => server.listening,
  }));
  watch(dgram.Socket.prototype, (socket: dgram.Socket) => {
    let closed = false;
    socket.once('close', () => {
      closed = true;
    });
    return { name: 'UDP socket', open: () => !closed };
  });
  watch(childProcess.ChildProcess.prototype as unknown as Unrefable, (child: childProcess.ChildProcess) => ({
    name: `child process ${child.pid}`,
    open: () => child.exitCode === null && child.signalCode === null,
  }));

  // Made so that it keeps nothing alive, instead of told so later.
  const watchFile = fs.watch;
  const watched = (...args: Parameters<typeof fs.watch>): fs.FSWatcher => {
    const watcher = watchFile(...args);
    const options = args[1] as { persistent?: boolean } | string | null | undefined;
    const name = `file watcher ${String(args[0]).slice(-200)}`;
    let closed = false;
    watcher.once('close', () => {
      closed = true;
    });
    const entry = { name, open: () => !closed };
    if (Object(options).persistent === false) hold(watcher, entry);
    const { unref, ref } = watcher as unknown as Unrefable;
    Object.assign(watcher, {
      unref() {
        hold(watcher, entry);
        return Reflect.apply(unref, watcher, []);
      },
      ref() {
        held.delete(watcher);
        return Reflect.apply(ref, watcher, []);
      },
    });
    return watcher;
  };
  Object.assign(fs, { watch: watched });
  syncBuiltinESMExports();

  return {
    names() {
      forgetClosed();
      return [...held.values()].map(({ name }) => `${name} that was unref'd`);
    },
  };
}

function to({ remoteAddress, remotePort }: net.Socket): string {
  return remoteAddress === undefined ? '' : ` to ${remoteAddress}:${remotePort}`;
}

function at(address: ReturnType<net.Server['address']>): string {
  if (address === null) return '';
  return typeof address === 'string' ? ` at ${address}` : ` at port ${address.port}`;
}

/** Node's own pools (the HTTP agent, `fetch`) keep idle connections so: nothing is under way in them. */
function calledByNode(): boolean {
  const limit = Error.stackTraceLimit;
  Error.stackTraceLimit = 6;
  const lines = (new Error().stack ?? '').split('\n').slice(3);
  Error.stackTraceLimit = limit;
  return /\(?node:/.test(lines[0] ?? '');
}
