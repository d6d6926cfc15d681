/**
 * One run of a kernel under QEMU: directories of the host over 9p, a command inside with its output streamed, its exit
 * code, a bound in time. Whatever happens, the machine is gone and its files are removed when the promise settles, or
 * when this process exits.
 */
import { spawn, spawnSync } from 'node:child_process';
import { closeSync, mkdirSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

import { KERNEL_DIRECTORY } from './debian-kernel.mjs';
import { initramfs } from './initramfs.mjs';

const QEMU = 'qemu-system-x86_64';
const EXIT_PORT = '0xf4';
const KVM_PROBE_SECONDS = 5;
/**
 * Where instructions are emulated, time inside is counted in them, one a nanosecond: the same machine everywhere, about
 * a quarter as fast as a real one, however slow or busy this one is. So no bound of a test is about the host.
 */
const CLOCK = ['-icount', 'shift=0,sleep=on', '-rtc', 'clock=vm'];
/**
 * Without string instructions as the processor's own way to copy and clear: emulated they go byte by byte (`rep movsb`)
 * or word by word (`rep stosq`), and count so. A copy of 64 MiB takes 0.07 s instead of 0.25.
 */
const EMULATED = { cpu: 'max,erms=off,fsrm=off', kernel: 'clearcpuid=rep_good' };
const FILE_MODULES = ['virtio_pci', '9pnet_virtio', '9p', 'overlay'];

/**
 * @param {{ vmlinux: string, modules: string }} kernel
 * @param {object} run
 * @param {{ path: string, at: string, how: 'ro' | 'rw' | 'overlay' }[]} [run.shares] directories of the host and their
 *   places inside; the first is the root (`at: '/'`). What is written over an `overlay` stays in the machine's memory.
 * @param {{ at: string, mebibytes: number }[]} [run.tmpfs]
 * @param {string[]} run.command absolute, as inside
 * @param {Record<string, string>} [run.environment] all of it
 * @param {string} [run.directory]
 * @param {number} run.deadlineSeconds of the command, by the machine's clock
 * @param {number} run.hostSeconds of all of it, by the host's
 * @param {number} [run.memoryMiB]
 * @param {string[]} [run.modules] more kernel modules
 * @param {'kvm' | 'tcg'} [run.accelerator]
 * @param {(text: string) => void} [run.onOutput]
 * @returns {Promise<{ code: number, console: string }>} `code`: the command's exit code, 124 when it was not done in
 *   time, 125 when it could not be run, 127 for a signal, 126 when the machine died under it; `console`: the kernel's
 *   messages
 */
export async function runInside(kernel, run) {
  mkdirSync(KERNEL_DIRECTORY, { recursive: true });
  const scratch = mkdtempSync(join(KERNEL_DIRECTORY, 'run-'));
  const remove = () => rmSync(scratch, { recursive: true, force: true });
  process.once('exit', remove);
  const hardware = run.accelerator === 'kvm';
  try {
    const shares = (run.shares ?? []).map((share, index) => ({ ...share, tag: `share${index}` }));
    const initrd = join(scratch, 'initramfs');
    const consoleLog = join(scratch, 'console');
    writeFileSync(
      initrd,
      initramfs(kernel, {
        ...run,
        shares,
        modules: [...(shares.length > 0 ? FILE_MODULES : []), ...(run.modules ?? [])],
      }),
    );
    const code = await machine(
      [
        ...['-accel', run.accelerator ?? 'tcg', '-cpu', hardware ? 'host' : EMULATED.cpu],
        ...(hardware ? [] : CLOCK),
        ...['-m', `${run.memoryMiB ?? 1024}M`, '-smp', '1'],
        ...['-kernel', kernel.vmlinux, '-initrd', initrd],
        ...[
          '-append',
          // A panic ends the machine. Guards against other processors' attacks only cost time here.
          `console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off nokaslr random.trust_cpu=on ${hardware ? '' : EMULATED.kernel}`,
        ],
        ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
        ...['-chardev', `file,id=console,path=${quoted(consoleLog)}`, '-serial', 'chardev:console'],
        ...['-chardev', 'stdio,id=out,signal=off', '-serial', 'chardev:out'],
        ...['-device', `isa-debug-exit,iobase=${EXIT_PORT},iosize=1`],
        ...shares.flatMap(({ tag, path, how }) => [
          ...[
            '-fsdev',
            `local,id=${tag},path=${quoted(path)},security_model=none,multidevs=remap,readonly=${how === 'rw' ? 'off' : 'on'}`,
          ],
          ...['-device', `virtio-9p-pci,fsdev=${tag},mount_tag=${tag}`],
        ]),
      ],
      run.hostSeconds * 1000,
      run.onOutput ?? (() => {}),
    );
    return { code, console: readFileSync(consoleLog, 'utf8') };
  } finally {
    process.off('exit', remove);
    remove();
  }
}

/** Hardware does it where it really can: some machines have the device and fail with any kernel. So one is booted. */
export async function chooseAccelerator(kernel) {
  try {
    closeSync(openSync('/dev/kvm', 'r+'));
  } catch {
    return 'tcg';
  }
  const probe = runInside(kernel, {
    command: [],
    deadlineSeconds: KVM_PROBE_SECONDS,
    hostSeconds: KVM_PROBE_SECONDS,
    memoryMiB: 256,
    accelerator: 'kvm',
  });
  return probe.then(
    ({ code }) => (code === 0 ? 'kvm' : 'tcg'),
    () => 'tcg',
  );
}

function machine(args, timeoutMs, onOutput) {
  return new Promise((resolve, reject) => {
    // The kernel ends it with this process, also where that is killed.
    const guarded = spawnSync('setpriv', ['--pdeathsig', 'KILL', 'true']).status === 0;
    const child = guarded
      ? spawn('setpriv', ['--pdeathsig', 'KILL', QEMU, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
      : spawn(QEMU, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    let complaint = '';
    let late = false;
    const kill = () => child.kill('SIGKILL');
    process.once('exit', kill);
    const timer = setTimeout(() => {
      late = true;
      kill();
    }, timeoutMs);
    const settled = () => {
      clearTimeout(timer);
      process.off('exit', kill);
    };
    child.stdout.setEncoding('utf8').on('data', onOutput);
    child.stderr.setEncoding('utf8').on('data', (text) => {
      complaint = `${complaint}${text}`.slice(-4096);
    });
    child.once('error', (error) => {
      settled();
      reject(new Error(`${QEMU}: ${error.message}`));
    });
    child.once('close', (code) => {
      settled();
      // The device gives 2 * code + 1; QEMU's own ends are 0 (the machine went off or panicked) and 1.
      if (late) resolve(124);
      else if (code === 1 && complaint !== '') reject(new Error(complaint.trim()));
      else if (code === null || code % 2 === 0) resolve(126);
      else resolve((code - 1) / 2);
    });
  });
}

/** In a list of options a comma in a value is written twice. */
function quoted(path) {
  return path.replaceAll(',', ',,');
}
