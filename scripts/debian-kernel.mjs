/**
 * Debian's own kernel, to be booted under QEMU: `node scripts/debian-kernel.mjs` fetches the package by apt, unpacks it
 * below build-kernel/ without installing it, and prints `{ version, vmlinux, modules, config }`, the paths of the
 * uncompressed ELF (half the time to boot of the compressed one), of the modules and of the configuration.
 * `debianKernel()` is the same for tests and benches. Once it is there nothing is asked of the network any more.
 *
 * Node's own modules only.
 */
import { spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const KERNELS = join(root, 'build-kernel');

/** How a bzImage may be packed: what it begins with, and who unpacks it. What follows the end is not an error. */
const PACKINGS = [
  { magic: Buffer.from([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0]), command: ['xz', '-dc', '--single-stream'] },
  { magic: Buffer.from([0x1f, 0x8b, 8]), command: ['gzip', '-dc'] },
  { magic: Buffer.from([0x28, 0xb5, 0x2f, 0xfd]), command: ['zstd', '-dc'] },
];
const ELF = Buffer.from([0x7f, 0x45, 0x4c, 0x46]);
const MOST_BYTES = 256 * 2 ** 20;

if (process.argv[1] && fileURLToPath(import.meta.url) === process.argv[1]) {
  process.stdout.write(`${JSON.stringify(debianKernel(), null, 2)}\n`);
}

/** Fetches it when it is not there. Throws with what to do where it cannot. */
export function debianKernel() {
  const there = unpacked();
  if (there) return there;
  if (process.arch !== 'x64')
    throw new Error(`Debian's kernel is booted on x86-64 only, not on ${process.arch}`);
  mkdirSync(KERNELS, { recursive: true });
  const work = mkdtempSync(join(KERNELS, 'new-'));
  try {
    const name = packageName();
    run('apt-get', ['download', '-q', name], work);
    const file = readdirSync(work).find((entry) => entry.endsWith('.deb'));
    if (!file) throw new Error(`apt-get download ${name} has left no package`);
    run('dpkg-deb', ['-x', file, 'root'], work);
    rmSync(join(work, file));
    const image = readdirSync(join(work, 'root/boot')).find((entry) => entry.startsWith('vmlinuz-'));
    if (!image) throw new Error(`${name} has no kernel in it`);
    const version = image.slice('vmlinuz-'.length);
    writeFileSync(join(work, 'root/vmlinux'), elfOf(readFileSync(join(work, 'root/boot', image))));
    const target = join(KERNELS, version);
    // Whole or not at all, also where two do it at once.
    if (!existsSync(join(target, 'vmlinux'))) {
      rmSync(target, { recursive: true, force: true });
      renameSync(join(work, 'root'), target);
    }
  } finally {
    rmSync(work, { recursive: true, force: true });
  }
  const made = unpacked();
  if (!made) throw new Error(`no kernel below ${KERNELS}`);
  return made;
}

function unpacked() {
  if (!existsSync(KERNELS)) return null;
  const version = readdirSync(KERNELS)
    .filter((entry) => existsSync(join(KERNELS, entry, 'vmlinux')))
    .sort()
    .at(-1);
  if (version === undefined) return null;
  const home = join(KERNELS, version);
  const lib = existsSync(join(home, 'usr/lib/modules')) ? 'usr/lib/modules' : 'lib/modules';
  return {
    version,
    vmlinux: join(home, 'vmlinux'),
    modules: join(home, lib, version),
    config: join(home, `boot/config-${version}`),
  };
}

/** `linux-image-amd64` is empty: it depends on the kernel of the day. */
function packageName() {
  let listed = run('apt-cache', ['depends', 'linux-image-amd64'], root, { mayFail: true });
  if (!/Depends: linux-image-/.test(listed)) {
    run('apt-get', ['update', '-qq'], root);
    listed = run('apt-cache', ['depends', 'linux-image-amd64'], root);
  }
  const name = /Depends: (linux-image-\d\S*)/.exec(listed)?.[1];
  if (!name) throw new Error('apt knows no linux-image-amd64: a Debian of x86-64 is needed');
  return name;
}

function elfOf(image) {
  for (const { magic, command } of PACKINGS) {
    for (let at = image.indexOf(magic); at >= 0; at = image.indexOf(magic, at + 1)) {
      const [program, ...args] = command;
      const { stdout } = spawnSync(program, args, { input: image.subarray(at), maxBuffer: MOST_BYTES });
      if (stdout?.subarray(0, 4).equals(ELF)) return stdout;
    }
  }
  throw new Error('the kernel image is packed in no way known here (xz, gzip, zstd)');
}

function run(command, args, cwd, { mayFail = false } = {}) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd,
    encoding: 'utf8',
    env: { ...process.env, LC_ALL: 'C' },
  });
  if (status === 0) return stdout;
  if (mayFail) return '';
  throw new Error(`${command} ${args.join(' ')}: ${error?.message ?? stderr.trim()}`);
}
