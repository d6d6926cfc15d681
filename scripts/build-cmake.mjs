/**
 * Builds the same addon through CMakeLists.txt with cmake-js, into build-cmake/, beside node-gyp's. `--debug`: unoptimized,
 * into build-cmake-debug/.
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..');
const prefix = resolve(dirname(process.execPath), '..');
const env = { ...process.env };
if (!env.npm_config_nodedir && existsSync(join(prefix, 'include', 'node', 'node.h')))
  env.npm_config_nodedir = prefix;

const cmakeJs = createRequire(import.meta.url).resolve('cmake-js/bin/cmake-js');
const kind = process.argv.includes('--debug') ? 'Debug' : 'Release';
const out = kind === 'Debug' ? 'build-cmake-debug' : 'build-cmake';
const args = [cmakeJs, 'build', '--out', out, '--parallel', '2', '--CDMEMFERRY_TESTS=OFF'];
if (kind === 'Debug') args.push('--debug');
const result = spawnSync(process.execPath, args, { cwd: packageRoot, stdio: 'inherit', env });
if (result.status !== 0) process.exit(result.status ?? 1);

const built = [`${out}/${kind}/memferry.node`, `${out}/memferry.node`]
  .map((path) => join(packageRoot, path))
  .find((path) => existsSync(path));
if (built === undefined) {
  console.error(`memferry: cmake-js left no memferry.node in ${out}`);
  process.exit(1);
}
console.log(`memferry: built ${built}\nTo use it: MEMFERRY_ADDON=${built}`);
