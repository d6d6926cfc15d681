/**
 * Builds the example: the VMM with node-gyp into build/Release, the TypeScript into build/js. memferry is the package
 * that Node finds from here: the checkout that this folder lies in, or an installed one.
 *   node examples/kvm/build.mjs
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = dirname(fileURLToPath(import.meta.url));
const { resolve: find } = createRequire(import.meta.url);
if (process.platform !== 'linux' || process.arch !== 'x64') {
  console.error(
    `its guest is a program for x86: there is no KVM for it on ${process.platform} ${process.arch}`,
  );
  process.exit(1);
}

// Headers that were installed with this very node; else node-gyp downloads them.
const prefix = resolve(dirname(process.execPath), '..');
const headers = existsSync(join(prefix, 'include/node/node.h')) ? [`--nodedir=${prefix}`] : [];
for (const step of ['configure', 'build']) {
  run([find('node-gyp/bin/node-gyp.js'), step, '--silent', ...headers]);
}
run([find('typescript/bin/tsc'), '-p', here]);

function run(args) {
  const { status } = spawnSync(process.execPath, args, { cwd: here, stdio: 'inherit' });
  if (status !== 0) process.exit(status ?? 1);
}
