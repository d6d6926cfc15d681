/** The memory file system that a test kernel starts from: our own init, the modules that it needs, what it is to do. */
import { spawnSync } from 'node:child_process';
import { mkdirSync, readFileSync, renameSync, rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { cpio } from './cpio.mjs';
import { KERNEL_DIRECTORY, modulesInOrder } from './debian-kernel.mjs';

const INIT_SOURCE = fileURLToPath(new URL('./init.c', import.meta.url));

/**
 * @param {{ modules: string }} kernel
 * @param {object} what
 * @param {string[]} what.modules names; what they depend on comes too
 * @param {{ tag: string, at: string, how: 'ro' | 'rw' | 'overlay' }[]} [what.shares] 9p tags; the first is /
 * @param {{ at: string, mebibytes: number }[]} [what.tmpfs]
 * @param {string[]} [what.command] `[]`: the machine ends with 0 when its init is through
 * @param {Record<string, string>} [what.environment]
 * @param {string} [what.directory]
 * @param {number} [what.deadlineSeconds]
 * @returns {Buffer}
 */
export function initramfs(kernel, what) {
  const modules = modulesInOrder(kernel, what.modules).map((path, index) => ({
    path: `/modules/${String(index).padStart(2, '0')}.ko`,
    content: readFileSync(path),
  }));
  const [root, ...others] = (what.shares ?? []).map(({ tag, at, how }) => ['share', tag, at, how]);
  const records = [
    ...modules.map(({ path }) => ['module', path]),
    ...(root ? [root] : []),
    ...(what.tmpfs ?? []).map(({ at, mebibytes }) => ['tmpfs', at, String(mebibytes)]),
    ...others,
    ...Object.entries(what.environment ?? {}).map(([name, value]) => ['env', `${name}=${value}`]),
    ...(what.command ?? []).map((argument) => ['arg', argument]),
    ['cwd', what.directory ?? '/'],
    ['deadline', String(what.deadlineSeconds ?? 60)],
  ];
  return cpio([
    { path: '/init', content: readFileSync(builtInit()), mode: 0o755 },
    { path: '/records', content: records.map((fields) => `${fields.join('\t')}\0`).join('') },
    ...modules,
  ]);
}

function builtInit() {
  const product = join(KERNEL_DIRECTORY, 'init');
  try {
    if (statSync(product).mtimeMs >= statSync(INIT_SOURCE).mtimeMs) return product;
  } catch {
    // Not built yet.
  }
  mkdirSync(KERNEL_DIRECTORY, { recursive: true });
  const fresh = `${product}.${process.pid}`;
  const { status, error } = spawnSync(
    'gcc',
    ['-std=c11', '-O2', '-Wall', '-Wextra', '-Werror', '-static', '-o', fresh, INIT_SOURCE],
    { stdio: ['ignore', 2, 2] },
  );
  if (status !== 0) {
    rmSync(fresh, { force: true });
    throw new Error(`gcc cannot build ${INIT_SOURCE}${error ? `: ${error.message}` : ''}`);
  }
  renameSync(fresh, product);
  return product;
}
