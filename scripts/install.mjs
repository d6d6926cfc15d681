/**
 * npm's install step: builds the addon with node-gyp. On a system other than Linux it says so and lets the
 * package install, because importing it works there. When a tool or a header is missing it names the package.
 *
 * `node scripts/install.mjs [rebuild|build] [--debug]`
 */
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism, tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..');

if (process.platform !== 'linux') {
  console.log(`memferry: nothing to build on ${process.platform}; its calls need Linux`);
  process.exit(0);
}

const missing = findMissing();
if (missing.length > 0) {
  console.error(
    `memferry: the addon cannot be built, there is no ${missing.map((part) => part.what).join(', no ')}`,
  );
  for (const family of ['debian', 'fedora', 'alpine']) {
    const packages = [...new Set(missing.map((part) => part[family]))];
    const command = { debian: 'apt-get install', fedora: 'dnf install', alpine: 'apk add' }[family];
    console.error(`  ${family.padEnd(7)} ${command} ${packages.join(' ')}`);
  }
  process.exit(1);
}

const asked = process.argv.slice(2);
const unknown = asked.find((word) => !['rebuild', 'build', '--debug'].includes(word));
if (unknown !== undefined) {
  console.error(`memferry: '${unknown}' is not [rebuild|build] [--debug]`);
  process.exit(1);
}
const debug = asked.includes('--debug');
const flags = [`--jobs=${availableParallelism()}`, '--silent', ...(debug ? ['--debug'] : [])];
const headers = localHeaders();
if (headers !== null) flags.push(`--nodedir=${headers}`);
const gyp = nodeGyp();
if (!asked.includes('build')) nodeGypDoes('clean');
nodeGypDoes('configure');
precompile(debug ? 'Debug' : 'Release');
nodeGypDoes('build');

function nodeGypDoes(step) {
  const result = spawnSync(process.execPath, [gyp, step, ...flags], { cwd: packageRoot, stdio: 'inherit' });
  if (result.status === 0) return;
  console.error('memferry: building the addon failed; the messages above say why');
  process.exit(result.status ?? 1);
}

/**
 * native/standard_headers.h, with the very flags that the addon's files get (binding.gyp includes it first in all of
 * them), to where the compilers run. A third of the build's time; without it the build is the same.
 */
function precompile(configuration) {
  const build = join(packageRoot, 'build');
  const compiled = join(build, 'standard_headers.h.gch');
  rmSync(compiled, { force: true });
  const compiler = process.env.CXX ?? 'g++';
  // A cache in front of the compiler serves the better where there is none.
  if (compiler.includes(' ')) return;
  try {
    const makefile = readFileSync(join(build, 'memferry.target.mk'), 'utf8');
    const words = ['DEFS', 'INCS', 'CFLAGS', 'CFLAGS_CC'].map((name) => {
      const [, value = ''] =
        makefile.match(new RegExp(`^${name}_${configuration} :=((?:.*\\\\\n)*.*)`, 'm')) ?? [];
      return value.replaceAll('\\\n', ' ').replaceAll('$(srcdir)', '..');
    });
    const flags = `${words.join(' ')} ${process.env.CPPFLAGS ?? ''} ${process.env.CXXFLAGS ?? ''}`;
    const command = `"$1" ${flags} -x c++-header ../native/standard_headers.h -o standard_headers.h.gch`;
    spawnSync('sh', ['-c', command, 'sh', compiler], { cwd: build, stdio: 'ignore' });
  } catch {
    // Nothing is there to take the flags from: node-gyp does it otherwise by now.
  }
}

/** What a build needs and this machine lacks, with the package that has it. */
function findMissing() {
  const python = process.env.npm_config_python ?? process.env.PYTHON ?? 'python3';
  const compiler = process.env.CXX ?? 'g++';
  const needs = [
    {
      what: 'make',
      works: () => runs('make', ['--version']),
      debian: 'make',
      fedora: 'make',
      alpine: 'make',
    },
    {
      what: 'Python 3',
      works: () => runs(python, ['--version']),
      debian: 'python3',
      fedora: 'python3',
      alpine: 'python3',
    },
    {
      what: 'C++20 compiler',
      works: () => compiles(compiler, ''),
      debian: 'g++',
      fedora: 'gcc-c++',
      alpine: 'g++',
    },
    {
      what: 'xxhash.h',
      works: () => compiles(compiler, '#include <xxhash.h>'),
      debian: 'libxxhash-dev',
      fedora: 'xxhash-devel',
      alpine: 'xxhash-dev',
    },
    {
      what: 'lz4.h',
      works: () => compiles(compiler, '#include <lz4.h>'),
      debian: 'liblz4-dev',
      fedora: 'lz4-devel',
      alpine: 'lz4-dev',
    },
    {
      what: 'zstd.h',
      works: () => compiles(compiler, '#include <zstd.h>'),
      debian: 'libzstd-dev',
      fedora: 'libzstd-devel',
      alpine: 'zstd-dev',
    },
    {
      what: 'kernel headers (linux/userfaultfd.h)',
      works: () => compiles(compiler, '#include <linux/userfaultfd.h>'),
      debian: 'linux-libc-dev',
      fedora: 'kernel-headers',
      alpine: 'linux-headers',
    },
  ];
  const lacking = needs.filter((need) => !need.works());
  // Without a compiler nothing is known of the headers.
  const compilerMissing = lacking.some((need) => need.what === 'C++20 compiler');
  return compilerMissing ? lacking.filter((need) => !need.what.includes('.h')) : lacking;
}

function runs(command, args) {
  return spawnSync(command, args, { stdio: 'ignore' }).status === 0;
}

function compiles(compiler, source) {
  const directory = mkdtempSync(join(tmpdir(), 'memferry-'));
  try {
    const file = join(directory, 'probe.cc');
    writeFileSync(file, `#include <version>\n${source}\nint main() { return 0; }\n`);
    const [command, ...args] = compiler.split(' ');
    return runs(command, [...args, '-std=c++20', '-fsyntax-only', file]);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/**
 * Where the headers of this very node lie, if they were installed with it. npm's own node-gyp knows them only
 * from npm's configuration, and else downloads them.
 */
function localHeaders() {
  if (process.env.npm_config_nodedir) return process.env.npm_config_nodedir;
  const prefix = resolve(dirname(process.execPath), '..');
  return existsSync(join(prefix, 'include', 'node', 'node.h')) ? prefix : null;
}

/** The node-gyp that npm brings along when it runs us; else the development dependency. */
function nodeGyp() {
  const fromNpm = process.env.npm_config_node_gyp;
  if (fromNpm && existsSync(fromNpm)) return fromNpm;
  try {
    return createRequire(import.meta.url).resolve('node-gyp/bin/node-gyp.js');
  } catch {
    console.error('memferry: there is no node-gyp; install with npm, which brings one');
    process.exit(1);
  }
}
