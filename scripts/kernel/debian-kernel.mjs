/**
 * Debian's stable kernel, fetched without being installed: the package that `linux-image-amd64` stands for, as apt
 * has it (whose signatures it checks), unpacked below build-kernel/ and kept there. The ELF image is taken out of the
 * compressed one, because that boots twice as fast where instructions are emulated.
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

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
export const KERNEL_DIRECTORY = join(root, 'build-kernel');
const META_PACKAGE = 'linux-image-amd64';
const FETCH_TIMEOUT_MS = 120_000;
const UNPACK_TIMEOUT_MS = 120_000;
const MOST_OUTPUT = 512 * 1024 * 1024;

/**
 * @returns {{ release: string, vmlinux: string, modules: string }} the kernel's release (`uname -r`), its ELF image,
 * and the directory with its modules. One that was fetched before is taken as it is.
 * @param {(line: string) => void} [say]
 */
export function debianKernel(say = () => {}) {
  const there = fetched();
  if (there) return there;
  if (process.arch !== 'x64') throw new Error(`this needs an x86-64 machine; this one is ${process.arch}`);
  mkdirSync(KERNEL_DIRECTORY, { recursive: true });
  const scratch = mkdtempSync(join(KERNEL_DIRECTORY, 'fetch-'));
  try {
    let name = packageName();
    say(`fetching ${name}`);
    const download = () =>
      run('apt-get', ['download', '-qq', name], { cwd: scratch, timeout: FETCH_TIMEOUT_MS });
    try {
      download();
    } catch {
      // Old package lists name a kernel that the archive has replaced.
      updateLists();
      name = packageName();
      download();
    }
    const deb = readdirSync(scratch).find((file) => file.endsWith('.deb'));
    if (!deb) throw new Error(`apt-get download ${name} brought no package`);
    const release = name.replace(/^linux-image-/, '');
    const unpacked = join(scratch, 'root');
    run('dpkg-deb', ['-x', join(scratch, deb), unpacked], { timeout: UNPACK_TIMEOUT_MS });
    const product = join(scratch, 'kernel');
    mkdirSync(product);
    const image = readFileSync(join(unpacked, 'boot', `vmlinuz-${release}`));
    writeFileSync(join(product, 'vmlinux'), elfImage(image));
    // Where /lib is a link to /usr/lib, newer packages have only the latter.
    const modules = ['lib', 'usr/lib']
      .map((lib) => join(unpacked, lib, 'modules', release))
      .find((directory) => existsSync(directory));
    if (!modules) throw new Error(`${deb} has no modules`);
    renameSync(modules, join(product, 'modules'));
    try {
      renameSync(product, join(KERNEL_DIRECTORY, release));
    } catch (error) {
      if (!fetched()) throw error; // else somebody else was faster
    }
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
  return fetched();
}

/** The newest of those that are there. */
function fetched() {
  if (!existsSync(KERNEL_DIRECTORY)) return null;
  const release = readdirSync(KERNEL_DIRECTORY)
    .filter((name) => existsSync(join(KERNEL_DIRECTORY, name, 'modules')))
    .sort((a, b) => a.localeCompare(b, 'en', { numeric: true }))
    .pop();
  if (release === undefined) return null;
  const directory = join(KERNEL_DIRECTORY, release);
  return { release, vmlinux: join(directory, 'vmlinux'), modules: join(directory, 'modules') };
}

/** `linux-image-amd64` has no content: it depends on the kernel that is current. */
function packageName() {
  const ask = () => {
    const { stdout } = spawnSync('apt-cache', ['depends', META_PACKAGE], { encoding: 'utf8' });
    return /Depends: (linux-image-\d[^\s]*-amd64)\s/.exec(`${stdout ?? ''}\n`)?.[1];
  };
  const known = ask();
  if (known) return known;
  // Without package lists (a fresh container): only root may fetch them.
  updateLists();
  const found = ask();
  if (!found) {
    throw new Error(
      `apt knows no ${META_PACKAGE}: this needs a Debian, its package lists (apt-get update) and its archive`,
    );
  }
  return found;
}

function updateLists() {
  spawnSync('apt-get', ['update', '-qq'], { stdio: ['ignore', 2, 2], timeout: FETCH_TIMEOUT_MS });
}

/** The kernel's own loader decompresses this payload; its place is in the boot protocol's header. */
function elfImage(image) {
  const MAGIC = 0x202;
  if (image.toString('latin1', MAGIC, MAGIC + 4) !== 'HdrS') throw new Error('the kernel is no bzImage');
  const setupSectors = image[0x1f1] || 4;
  const from = (setupSectors + 1) * 512 + image.readUInt32LE(0x248);
  const payload = image.subarray(from, from + image.readUInt32LE(0x24c) - 4); // the last four are its length
  const size = image.readUInt32LE(from + payload.length);
  const tool = [
    { magic: 'fd377a585a00', command: ['xz', '-dc', '--single-stream'] },
    { magic: '1f8b', command: ['gzip', '-dc'] },
    { magic: '28b52ffd', command: ['zstd', '-dc'] },
  ].find(({ magic }) => payload.toString('hex', 0, magic.length / 2) === magic);
  if (!tool) throw new Error('the kernel is compressed by something unknown');
  const [command, ...args] = tool.command;
  const { stdout, error } = spawnSync(command, args, { input: payload, maxBuffer: MOST_OUTPUT });
  if (error && error.code !== 'EPIPE') throw new Error(`${command}: ${error.message}`);
  if (stdout.length !== size || stdout.toString('latin1', 1, 4) !== 'ELF') {
    throw new Error(`${command} gave ${stdout.length} bytes of a kernel that has ${size}`);
  }
  return stdout;
}

/**
 * The modules with these names and what they depend on, in the order in which they can be loaded. A name that is
 * built in, or that this kernel lacks, is left out.
 * @returns {string[]} paths
 */
export function modulesInOrder(kernel, names) {
  const byName = new Map();
  for (const entry of readdirSync(join(kernel.modules, 'kernel'), { recursive: true })) {
    const name = /([^/]+)\.ko$/.exec(entry)?.[1];
    if (name) byName.set(name.replaceAll('-', '_'), join(kernel.modules, 'kernel', entry));
  }
  const order = [];
  const visiting = new Set();
  const visit = (name) => {
    const path = byName.get(name.replaceAll('-', '_'));
    if (path === undefined || visiting.has(path)) return;
    visiting.add(path);
    const depends = /\0depends=([^\0]*)\0/.exec(readFileSync(path, 'latin1'))?.[1] ?? '';
    for (const other of depends.split(',')) if (other !== '') visit(other);
    order.push(path);
  };
  for (const name of names) visit(name);
  return order;
}

function run(command, args, options) {
  const { status, signal, error } = spawnSync(command, args, { stdio: ['ignore', 2, 2], ...options });
  if (status === 0) return;
  throw new Error(
    `${command} ${args.join(' ')}: ${error?.message ?? (signal ? `ended by ${signal}` : `exit code ${status}`)}`,
  );
}
