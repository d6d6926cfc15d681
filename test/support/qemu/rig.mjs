/**
 * QEMUs for tests and benches: each an unmodified qemu-system-x86_64 with its RAM in a shared memory-backend and the
 * shim preloaded, that runs Debian's kernel with guest.c as its only program. Plain JavaScript, because the tests and
 * the benches are built apart.
 */
import { spawn, spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { createConnection } from 'node:net';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { cpio } from '../../../scripts/kernel/cpio.mjs';
import { debianKernel } from '../../../scripts/kernel/debian-kernel.mjs';

const here = dirname(fileURLToPath(import.meta.url));
const root = join(here, '../../..');
export const shimObject = join(root, 'build/Release/libmemferry-shim.so');
export const qemuProgram = 'qemu-system-x86_64';

/** Why there can be no guest here, or null. */
export function qemuObstacle() {
  if (process.arch !== 'x64') return `QEMU guests are run on x86-64, not on ${process.arch}`;
  if (process.getuid?.() !== 0) return 'a userfaultfd of full scope in QEMU needs root';
  if (spawnSync(qemuProgram, ['--version']).status !== 0) return `${qemuProgram} is not installed`;
  return null;
}

/** The kernel and an initramfs that has guest.c in it, made when they are older than it. */
export function guestSystem() {
  const kernel = debianKernel();
  const made = join(root, 'build-kernel/guest');
  const source = join(here, 'guest.c');
  const initramfs = join(made, 'initramfs');
  if (!existsSync(initramfs) || statSync(initramfs).mtimeMs < statSync(source).mtimeMs) {
    mkdirSync(made, { recursive: true });
    const program = join(made, `init-${process.pid}`);
    run('gcc', ['-O2', '-Wall', '-Wextra', '-Werror', '-static', '-s', '-o', program, source]);
    writeFileSync(`${program}.cpio`, cpio([{ path: '/init', mode: 0o755, content: readFileSync(program) }]));
    renameSync(`${program}.cpio`, initramfs);
    rmSync(program);
  }
  return { kernel: kernel.vmlinux, initramfs };
}

function run(command, args) {
  const { status, stderr, error } = spawnSync(command, args, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${error?.message ?? stderr}`);
}

/**
 * What a guest is made of; the same for the source and every destination of it.
 * @param {{ memoryMb?: number, fillMb?: number, dirtyPages?: number, tickMs?: number, backend?: string | null }} options
 */
export function guestArguments({ memoryMb = 160, fillMb = 16, dirtyPages = 32, tickMs = 5, backend = null }) {
  const { kernel, initramfs } = guestSystem();
  return [
    ...['-accel', 'tcg', '-cpu', 'max', '-smp', '1', '-nodefaults', '-display', 'none', '-no-reboot'],
    ...['-m', `${memoryMb}M`, '-machine', 'pc,memory-backend=ram0'],
    ...['-object', backend ?? `memory-backend-file,id=ram0,size=${memoryMb}M,share=on,mem-path=/dev/shm`],
    ...['-kernel', kernel, '-initrd', initramfs, '-append'],
    `console=ttyS0 quiet panic=-1 fill_mb=${fillMb} dirty_pages=${dirtyPages} tick_ms=${tickMs}`,
  ];
}

const started = new Set();
process.on('exit', () => {
  for (const qemu of started) qemu.kill();
});

/** One QEMU: its process, its sockets, and what its guest has said on the serial line. */
export class Qemu {
  constructor(directory, process_, stderr) {
    this.directory = directory;
    this.process = process_;
    this.qmp = join(directory, 'qmp');
    this.shim = join(directory, 'shim');
    this.ended = new Promise((resolve) => process_.once('exit', (code, signal) => resolve(signal ?? code)));
    this.stderr = stderr;
    this.exited = false;
    this.ended.then(() => {
      this.exited = true;
    });
  }

  /** `incoming`: a destination, which waits. `prefix`: what it is started by (a namespace). */
  static async start({
    args,
    incoming = false,
    prefix = /** @type {string[]} */ ([]),
    preload = shimObject,
    extra = /** @type {string[]} */ ([]),
    environment = {},
  }) {
    const directory = mkdtempSync(join(tmpdir(), 'memferry-qemu-'));
    const [command, ...rest] = [
      ...prefix,
      qemuProgram,
      ...args,
      ...['-qmp', `unix:${join(directory, 'qmp')},server=on,wait=off`],
      ...['-serial', `file:${join(directory, 'serial')}`],
      ...(incoming ? ['-S', '-incoming', 'defer'] : []),
      ...extra,
    ];
    const child = spawn(command, rest, {
      stdio: ['ignore', 'ignore', 'pipe'],
      env: {
        ...process.env,
        LD_PRELOAD: preload,
        MEMFERRY_SHIM_SOCKET: join(directory, 'shim'),
        ...environment,
      },
    });
    const stderr = [];
    child.stderr.setEncoding('utf8').on('data', (text) => stderr.push(text));
    const qemu = new Qemu(directory, child, stderr);
    started.add(qemu);
    await qemu.until(() => greets(qemu.qmp), 'its QMP greeting');
    return qemu;
  }

  get pid() {
    return this.process.pid;
  }

  /** All that the guest has written here. */
  get serial() {
    const file = join(this.directory, 'serial');
    return existsSync(file) ? readFileSync(file, 'latin1').replaceAll('\r\n', '\n') : '';
  }

  /** The guest's last whole tick, or -1. */
  get counter() {
    const lines = this.serial.split('\n').slice(0, -1);
    const last = lines.filter((line) => line.startsWith('T ')).at(-1);
    return last === undefined ? -1 : Number(last.split(' ')[1]);
  }

  /** Until the guest has counted `more` than now. */
  async ticks(more = 3, timeoutMs = 60_000) {
    const from = this.counter;
    await this.until(() => this.counter >= from + more, `tick ${from + more}`, timeoutMs);
  }

  async until(condition, what, timeoutMs = 30_000) {
    const deadline = performance.now() + timeoutMs;
    while (!(await condition())) {
      const serial = () => `serial ends in ${JSON.stringify(this.serial.slice(-300))}`;
      if (this.exited) {
        throw new Error(`QEMU ended while waiting for ${what}: ${this.stderr.join('')}; ${serial()}`);
      }
      if (performance.now() > deadline) {
        throw new Error(`waited ${timeoutMs} ms for ${what}; ${serial()}`);
      }
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }

  kill() {
    if (!this.exited) this.process.kill('SIGKILL');
    rmSync(this.directory, { recursive: true, force: true });
    started.delete(this);
  }

  async stop() {
    if (!this.exited) this.process.kill('SIGKILL');
    await this.ended;
    this.kill();
  }
}

/** The socket is there before the machine is: QEMU greets from its main loop. */
function greets(path) {
  return new Promise((resolve) => {
    const socket = createConnection(path);
    socket.once('data', () => {
      socket.destroy();
      resolve(true);
    });
    socket.once('error', () => resolve(false));
    socket.once('close', () => resolve(false));
  });
}

/**
 * What is wrong with a guest's account, or null: `serials` are what it wrote at each place it was, in turn. Every tick
 * must follow the one before it, no line may be cut, no sum wrong.
 */
export function problemOf(serials) {
  const lines = serials.join('').split('\n').slice(0, -1);
  const first = lines.findIndex((line) => line.startsWith('T '));
  if (first < 0) return 'the guest never ticked';
  let expected = 0;
  for (const line of lines.slice(first)) {
    const [, counter, bad] = /^T (\d+) pages \d+ files \d+ bad (\d+)$/.exec(line) ?? [];
    if (counter === undefined) return `a line that is no tick: ${JSON.stringify(line)}`;
    if (Number(counter) !== expected) return `tick ${counter} instead of ${expected}`;
    if (bad !== '0') return `${bad} sums are wrong at tick ${counter}`;
    expected++;
  }
  return null;
}
