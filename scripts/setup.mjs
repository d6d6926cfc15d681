/**
 * Makes a fresh checkout able to run: `node scripts/setup.mjs demo|test|test:kernel|bench|bench:paper`, called by the npm
 * scripts of the same names. Checks Node and the system, installs what is missing where it may (root on a Debian), says
 * exactly what is missing where it may not, then installs the npm packages and builds what is out of date.
 *
 * Node's own modules only: it runs before anything is installed. With nothing to do it takes well under a
 * second.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, statSync, utimesSync, writeFileSync } from 'node:fs';
import { delimiter, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const ADDON = join(root, 'build/Release/memferry.node');
const TYPESCRIPT_STAMP = join(root, 'lib/.built');
const OLDEST_NODE = 20;
/** A build on a slow machine may take minutes; past this the one who holds the lock is stuck. */
const LOCK_WAIT_SECONDS = 15 * 60;
const LOCKED = 'MEMFERRY_SETUP_LOCKED';

/** Everything that some profile needs: how to tell that it is there, and the packages that bring it. */
const NEEDS = {
  'g++': {
    what: 'a C++20 compiler (g++)',
    there: () => onPath('g++') || onPath('clang++'),
    deb: 'g++',
    rpm: 'gcc-c++',
  },
  make: { what: 'make', there: () => onPath('make'), deb: 'make', rpm: 'make' },
  python3: {
    what: 'Python 3 (node-gyp runs it)',
    there: () => onPath('python3'),
    deb: 'python3',
    rpm: 'python3',
  },
  xxhash: {
    what: "xxHash's headers",
    there: () => header('xxhash.h'),
    deb: 'libxxhash-dev',
    rpm: 'xxhash-devel',
  },
  lz4: { what: "lz4's headers", there: () => header('lz4.h'), deb: 'liblz4-dev', rpm: 'lz4-devel' },
  zstd: { what: "zstd's headers", there: () => header('zstd.h'), deb: 'libzstd-dev', rpm: 'libzstd-devel' },
  libcrypto: {
    what: "OpenSSL's headers (the addon takes those of Node)",
    there: () => header('openssl/evp.h'),
    deb: 'libssl-dev',
    rpm: 'openssl-devel',
  },
  gcc: { what: 'a C compiler (gcc)', there: () => onPath('gcc'), deb: 'gcc', rpm: 'gcc' },
  cmake: { what: 'CMake', there: () => onPath('cmake'), deb: 'cmake', rpm: 'cmake' },
  ninja: { what: 'Ninja', there: () => onPath('ninja'), deb: 'ninja-build', rpm: 'ninja-build' },
  clang: { what: 'clang', there: () => onPath('clang') && onPath('clang++'), deb: 'clang', rpm: 'clang' },
  'clang-format': {
    what: 'clang-format',
    there: () => onPath('clang-format'),
    deb: 'clang-format',
    rpm: 'clang-tools-extra',
  },
  'clang-tidy': {
    what: 'clang-tidy',
    there: () => onPath('clang-tidy'),
    deb: 'clang-tidy',
    rpm: 'clang-tools-extra',
  },
  'clang-rt': {
    what: "clang's sanitizer runtimes",
    there: sanitizerRuntimes,
    deb: 'libclang-rt-dev',
    rpm: 'compiler-rt',
  },
  gtest: {
    what: 'GoogleTest',
    there: () => header('gtest/gtest.h'),
    deb: 'libgtest-dev',
    rpm: 'gtest-devel',
  },
  json: {
    what: "nlohmann's JSON for C++",
    there: () => header('nlohmann/json.hpp'),
    deb: 'nlohmann-json3-dev',
    rpm: 'json-devel',
  },
  'pkg-config': {
    what: 'pkg-config',
    there: () => onPath('pkg-config'),
    deb: 'pkg-config',
    rpm: 'pkgconf-pkg-config',
  },
  ip: {
    what: 'ip and tc (network namespaces)',
    there: () => onPath('ip') && onPath('tc'),
    deb: 'iproute2',
    rpm: 'iproute-tc',
  },
  curl: {
    what: 'curl (a guide has its reader type it)',
    there: () => onPath('curl'),
    deb: 'curl',
    rpm: 'curl',
  },
  mkswap: {
    what: 'mkswap (util-linux)',
    there: () => onPath('mkswap'),
    deb: 'util-linux',
    rpm: 'util-linux',
  },
  qemu: {
    what: 'QEMU for x86-64 (it runs another kernel)',
    there: () => onPath('qemu-system-x86_64'),
    deb: 'qemu-system-x86',
    rpm: 'qemu-system-x86-core',
  },
  xz: { what: 'xz (it unpacks a kernel)', there: () => onPath('xz'), deb: 'xz-utils', rpm: 'xz' },
  'libc.a': {
    what: 'the static C library (for the first process of another kernel)',
    there: staticLibrary,
    deb: 'libc6-dev',
    rpm: 'glibc-static',
  },
  redis: {
    what: 'redis-server',
    there: () => onPath('redis-server'),
    deb: 'redis-server',
    rpm: 'redis',
  },
};

const BUILD = ['g++', 'make', 'python3', 'xxhash', 'lz4', 'zstd'];
/** Guests of QEMU's are run on x86-64 alone. */
const GUESTS = process.arch === 'x64' ? ['qemu', 'xz', 'gcc', 'libc.a'] : [];
const PROFILES = {
  demo: BUILD,
  test: [
    ...BUILD,
    'cmake',
    'ninja',
    'clang',
    'clang-format',
    'clang-tidy',
    'clang-rt',
    'gcc',
    'libcrypto',
    'gtest',
    'json',
    'pkg-config',
    'ip',
    'curl',
    ...GUESTS,
  ],
  'test:kernel': [...BUILD, 'cmake', 'ninja', 'gcc', 'libcrypto', 'gtest', 'json', 'qemu', 'xz', 'libc.a'],
  bench: [...BUILD, 'gcc', 'libcrypto', 'ip', ...GUESTS],
  'bench:paper': [...BUILD, 'gcc', 'libcrypto', 'ip', 'mkswap', 'redis', ...GUESTS],
};

main(process.argv[2] ?? 'demo');

function main(profile) {
  const needs = PROFILES[profile];
  if (!needs) fail(`no profile '${profile}': write one of ${Object.keys(PROFILES).join(', ')}`);
  const major = Number(process.versions.node.split('.')[0]);
  if (major < OLDEST_NODE) fail(`Node ${OLDEST_NODE} or later is needed; this is ${process.versions.node}`);
  if (process.platform !== 'linux') {
    fail(
      `memferry needs Linux (x86-64 or arm64): it moves memory with userfaultfd, which ${process.platform} does not have`,
    );
  }
  if (upToDate(needs)) return;
  if (process.env[LOCKED] !== '1') workUnderLock(profile);
  installSystemPackages(needs.filter((name) => !NEEDS[name].there()));
  if (!nodeModulesCurrent()) run('npm', ['ci', '--no-audit', '--no-fund'], 'installing the npm packages');
  // Each product gets the time at which its build began: a source saved meanwhile is newer. (And a build that
  // finds nothing to compile leaves the file's time as it was.)
  if (!addonCurrent()) {
    const began = new Date();
    run('npm', ['run', '--silent', 'build:addon'], 'building the native addon');
    utimesSync(ADDON, began, began);
  }
  if (!typescriptCurrent()) {
    const began = new Date();
    run('npm', ['run', '--silent', 'build:ts'], 'compiling TypeScript');
    writeFileSync(TYPESCRIPT_STAMP, '');
    utimesSync(TYPESCRIPT_STAMP, began, began);
  }
}

function upToDate(needs) {
  return (
    needs.every((name) => NEEDS[name].there()) &&
    nodeModulesCurrent() &&
    addonCurrent() &&
    typescriptCurrent()
  );
}

// ---- system packages

function onPath(command) {
  return (process.env.PATH ?? '')
    .split(delimiter)
    .concat('/usr/sbin', '/sbin')
    .some((directory) => directory !== '' && existsSync(join(directory, command)));
}

function header(path) {
  const directories = [
    '/usr/include',
    '/usr/local/include',
    ...(process.env.CPLUS_INCLUDE_PATH ?? '').split(delimiter),
  ];
  return directories.some((directory) => directory !== '' && existsSync(join(directory, path)));
}

function staticLibrary() {
  if (!onPath('gcc')) return false;
  const { stdout } = spawnSync('gcc', ['-print-file-name=libc.a'], { encoding: 'utf8' });
  return typeof stdout === 'string' && stdout.startsWith('/') && existsSync(stdout.trim());
}

function sanitizerRuntimes() {
  if (!onPath('clang')) return false;
  const machine = process.arch === 'arm64' ? 'aarch64' : 'x86_64';
  // Older layouts put the architecture in the file's name, newer ones in its directory's.
  return [`libclang_rt.tsan-${machine}.a`, 'libclang_rt.tsan.a'].some((file) => {
    const { stdout } = spawnSync('clang', [`-print-file-name=${file}`], { encoding: 'utf8' });
    return typeof stdout === 'string' && stdout.startsWith('/') && existsSync(stdout.trim());
  });
}

function installSystemPackages(missing) {
  if (missing.length === 0) return;
  const debian = onPath('apt-get');
  const packages = (family) => [...new Set(missing.map((name) => NEEDS[name][family]))];
  if (debian && process.getuid?.() === 0) {
    // RUNLEVEL: a server that is installed (Redis) is not started as a service.
    const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive', RUNLEVEL: '1' };
    run('apt-get', ['update', '-qq'], 'updating the list of Debian packages', { env });
    const wanted = packages('deb').map(debianName);
    run(
      'apt-get',
      ['install', '-y', '-qq', '--no-install-recommends', ...wanted],
      `installing ${wanted.join(' ')}`,
      { env },
    );
    missing = missing.filter((name) => !NEEDS[name].there());
    if (missing.length === 0) return;
  }
  const lines = missing.map((name) => `  ${NEEDS[name].what}`);
  const command = debian
    ? `sudo apt-get install ${packages('deb').join(' ')}`
    : `${onPath('dnf') ? 'sudo dnf install' : 'with your package manager (names as Fedora has them)'} ${packages('rpm').join(' ')}`;
  fail(`missing on this system:\n${lines.join('\n')}\ninstall it: ${command}`);
}

/** Before Debian 12 the runtimes come only under the compiler's version. */
function debianName(name) {
  if (name !== 'libclang-rt-dev') return name;
  const policy = spawnSync('apt-cache', ['policy', name], { encoding: 'utf8' }).stdout ?? '';
  if (/Candidate: (?!\(none\))/.test(policy)) return name;
  const version = /Depends: clang-(\d+)/.exec(
    spawnSync('apt-cache', ['depends', 'clang'], { encoding: 'utf8' }).stdout ?? '',
  );
  return version ? `libclang-rt-${version[1]}-dev` : name;
}

// ---- npm packages and builds

/** By content, not by time: a checkout gives every file the same fresh time. */
function nodeModulesCurrent() {
  const installedList = join(root, 'node_modules/.package-lock.json');
  if (!existsSync(installedList)) return false;
  const wanted = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages;
  const installed = JSON.parse(readFileSync(installedList, 'utf8')).packages;
  return Object.entries(wanted).every(
    ([path, entry]) => path === '' || entry.optional || installed[path]?.version === entry.version,
  );
}

function addonCurrent() {
  return newerThanAll(ADDON, newest('native', /\.(cc|h)$/), newest('binding.gyp'));
}

function typescriptCurrent() {
  if (!existsSync(join(root, 'lib/cli/main.js'))) return false;
  return newerThanAll(TYPESCRIPT_STAMP, newest('src', /\.ts$/), newest('tsconfig.json'));
}

function newerThanAll(product, ...sources) {
  return existsSync(product) && sources.every((time) => time <= statSync(product).mtimeMs);
}

/** The latest change below a path; a directory counts too, since removing a file changes nothing else. */
function newest(path, pattern) {
  const absolute = join(root, path);
  if (!existsSync(absolute)) return 0;
  const status = statSync(absolute);
  if (!status.isDirectory()) return status.mtimeMs;
  let latest = status.mtimeMs;
  for (const entry of readdirSync(absolute, { withFileTypes: true })) {
    if (entry.isDirectory()) latest = Math.max(latest, newest(join(path, entry.name), pattern));
    else if (pattern.test(entry.name))
      latest = Math.max(latest, statSync(join(absolute, entry.name)).mtimeMs);
  }
  return latest;
}

// ---- running

/** Standard output belongs to the command that follows (it may be JSON): everything goes to standard error. */
function run(command, args, what, options = {}) {
  process.stderr.write(`setup: ${what}\n`);
  const { status, signal, error } = spawnSync(command, args, {
    cwd: root,
    stdio: ['ignore', 2, 2],
    ...options,
  });
  if (status !== 0)
    fail(
      `${command} ${args.join(' ')}: ${error?.message ?? (signal ? `ended by ${signal}` : `exit code ${status}`)}`,
    );
}

/**
 * Two npm scripts started at once must not build into the same directory: the work is done by a second run of
 * this file, under a lock that the kernel releases however that run ends. The lock file is one that exists.
 */
function workUnderLock(profile) {
  const again = [process.execPath, fileURLToPath(import.meta.url), profile];
  const [command, ...args] = onPath('flock')
    ? ['flock', '--wait', String(LOCK_WAIT_SECONDS), join(root, 'package.json'), ...again]
    : again;
  const { status } = spawnSync(command, args, {
    stdio: ['ignore', 2, 2],
    env: { ...process.env, [LOCKED]: '1' },
  });
  process.exit(status ?? 1);
}

function fail(message) {
  process.stderr.write(`setup: ${message}\n`);
  process.exit(1);
}
