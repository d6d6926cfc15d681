/**
 * clang-tidy over native/: `node scripts/tidy.mjs [FILE...]`, called by scripts/check-native.sh lint. Four fifths of
 * what clang-tidy does for one of our files is to parse and walk the standard headers, so several files go to it as
 * one text and share that: 270 s of one processor in all, and over 1200 one by one. No finding is lost by it that we
 * know of; what two files say is `using` only in both, though, counts as used where one of them needs it.
 *
 * A file that passed is looked at again only when it, a header that it includes, the settings or clang-tidy have
 * changed; the stamps are in build-check/. JOBS sets the number of processes at once. A file counts as passed only
 * by an exit code of zero: whatever keeps clang-tidy from saying so fails the run.
 */
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { cpus } from 'node:os';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const build = resolve(root, process.env.BUILD_DIR || 'build-check');
const units = join(build, 'tidy');
const jobs = Number(process.env.JOBS || cpus().length);
/** One translation unit's: more share more headers, but then the last processes end far apart. */
const FILES_AT_ONCE = 8;
const LINES_AT_ONCE = 1600;
/** A process that takes longer hangs: one unit takes 10 s, a hundred times that at the lowest priority, perhaps. */
const LONGEST_MS = 30 * 60_000;
// The analyzer bounded: a fifth of its time, and it finds what is near.
const ANALYZER = ['mode=shallow', 'max-nodes=8000'].flatMap((setting) =>
  ['-Xclang', '-analyzer-config', '-Xclang', setting].map((argument) => `--extra-arg=${argument}`),
);

const texts = new Map();
const running = new Set();
await main(process.argv.slice(2));

async function main(asked) {
  if (!(jobs >= 1)) fail(`JOBS is '${process.env.JOBS}'`);
  const all = sourcesBelow('native');
  const files = asked.length > 0 ? asked.map((file) => relative(root, resolve(file))) : all;
  const unknown = files.find((file) => !all.includes(file));
  if (unknown) fail(`${unknown} is no source of native/`);
  const settings = settingsNow();
  const flags = flagsOf(files);
  mkdirSync(units, { recursive: true });
  const todo = files.filter((file) => stampOf(file) !== stateOf(file, settings, flags));
  const waiting = unitsOf(todo, flags);
  for (const [signal, number] of [
    ['SIGINT', 2],
    ['SIGTERM', 15],
  ]) {
    process.once(signal, () => process.exit(128 + number));
  }
  process.once('exit', () => {
    for (const child of running) child.kill();
  });
  let failed = 0;
  const worker = async () => {
    for (let unit = waiting.shift(); unit; unit = waiting.shift()) {
      const { code, output, errors } = await clangTidy(unit);
      if (code === 0) {
        for (const file of unit.files) writeStamp(file, stateOf(file, settings, flags));
      } else if (
        unit.files.length > 1 &&
        (output.includes('[clang-diagnostic-') || !output.includes(': error: '))
      ) {
        // They do not compile together (a name that two of them have), or clang-tidy died: then one by one.
        for (const file of unit.files) waiting.unshift({ files: [file], flags: unit.flags });
      } else {
        failed += 1;
        process.stdout.write(output);
        if (!/: error: /.test(output)) process.stdout.write(errors);
        process.stdout.write(`clang-tidy of ${unit.files.join(' ')}: ${code}\n`);
      }
    }
  };
  await Promise.all(Array.from({ length: jobs }, worker));
  if (failed > 0) fail('clang-tidy has found something');
  process.stdout.write(`lint: ${files.length} files\n`);
}

/** Units of files that have the same flags and no name of their own in common. */
function unitsOf(files, flags) {
  const made = [];
  for (const file of files) {
    const names = ownNames(textOf(file));
    const lines = textOf(file).split('\n').length;
    let unit = made.find(
      (one) =>
        one.flags === flags.get(file) &&
        one.files.length < FILES_AT_ONCE &&
        one.lines + lines <= LINES_AT_ONCE &&
        ![...names].some((name) => one.names.has(name)),
    );
    if (!unit) {
      unit = { files: [], flags: flags.get(file), lines: 0, names: new Set() };
      made.push(unit);
    }
    unit.files.push(file);
    unit.lines += lines;
    for (const name of names) unit.names.add(name);
  }
  return made.sort((a, b) => b.lines - a.lines);
}

/** What a file declares for itself: in an unnamed namespace, by `using` or `static` outside any function. */
function ownNames(text) {
  const names = new Set();
  let unnamed = false;
  for (const line of text.split('\n')) {
    if (/^namespace\b/.test(line)) {
      unnamed = line === 'namespace {';
      continue;
    }
    if (line === '}  // namespace') unnamed = false;
    const alias = /^using (\w+) =/.exec(line);
    const type = unnamed && /^(?:struct|class|enum class|enum|union) (\w+)/.exec(line);
    const other = (unnamed || /^static /.test(line)) && /^[A-Za-z].*?(\w+)(?:\[.*\])?\s*[({=;]/.exec(line);
    const name = alias?.[1] ?? (type || other)?.[1];
    if (name) names.add(name);
  }
  return names;
}

function clangTidy(unit) {
  // One text, not one that includes them: the analyzer and some checks pass over what is included.
  const source =
    unit.files.length > 1 ? join(units, `${nameOf(unit.files[0])}.unit.cc`) : join(root, unit.files[0]);
  if (unit.files.length > 1) writeFileSync(source, unit.files.map(textOf).join('\n'));
  const child = spawn(
    'clang-tidy',
    [
      '--quiet',
      `--config-file=${join(root, '.clang-tidy')}`,
      ...ANALYZER,
      source,
      '--',
      ...JSON.parse(unit.flags),
    ],
    { cwd: root, stdio: ['ignore', 'pipe', 'pipe'], timeout: LONGEST_MS, killSignal: 'SIGKILL' },
  );
  running.add(child);
  return new Promise((resolved) => {
    const said = { output: '', errors: '' };
    child.stdout.setEncoding('utf8').on('data', (text) => {
      said.output += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text) => {
      said.errors += text;
    });
    child.once('error', (error) => {
      running.delete(child);
      resolved({ ...said, code: 'did not run', errors: `${error.message}\n` });
    });
    child.once('close', (code, signal) => {
      running.delete(child);
      const output = said.output
        .replaceAll(source, '\0')
        .replace(/\0:(\d+)/g, (_, line) => placeOf(Number(line), unit));
      resolved({ ...said, output, code: code ?? `ended by ${signal}` });
    });
  });
}

/** Where a line of a unit comes from. */
function placeOf(line, unit) {
  let rest = line;
  for (const file of unit.files) {
    const lines = textOf(file).split('\n').length;
    if (rest <= lines || file === unit.files.at(-1)) return `${file}:${rest}`;
    rest -= lines;
  }
}

/** For each file what it is compiled with, as JSON; CMake's list has all but the addon's own. */
function flagsOf(files) {
  succeeds('cmake', [
    ...['-S', root, '-B', build, '-DCMAKE_CXX_COMPILER=clang++'],
    ...['-DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON', '-DMEMFERRY_TESTS=OFF'],
  ]);
  const flags = new Map();
  for (const entry of JSON.parse(readFileSync(join(build, 'compile_commands.json'), 'utf8'))) {
    // Neither the compiler nor `-o OBJECT -c SOURCE`, which stand first and last.
    const words = entry.command.split(/\s+/).slice(1, -4);
    flags.set(relative(root, entry.file), JSON.stringify(words));
  }
  const ofAddon = files.filter((file) => file.startsWith('native/bind/'));
  const addon = ofAddon.length > 0 ? addonFlags() : '';
  for (const file of ofAddon) flags.set(file, addon);
  for (const file of files) {
    if (!flags.has(file)) fail(`CMake does not compile ${file}`);
  }
  return flags;
}

/** As binding.gyp has them; the headers are those of the node in use. */
function addonFlags() {
  const prefix = process.env.npm_config_nodedir || resolve(process.execPath, '../..');
  const node = join(prefix, 'include/node');
  if (!existsSync(join(node, 'node_api.h')))
    fail(`no Node headers in ${node}: npm_config_nodedir says where`);
  const api = createRequire(import.meta.url)('node-addon-api').include_dir;
  return JSON.stringify([
    ...['-std=c++20', `-I${join(root, 'native')}`, '-isystem', resolve(root, api), '-isystem', node],
    ...['-DNAPI_VERSION=8', '-DNAPI_CPP_EXCEPTIONS'],
  ]);
}

// ---- stamps

function settingsNow() {
  const version = succeeds('clang-tidy', ['--version']);
  return hashOf([version, textOf('.clang-tidy'), ...ANALYZER]);
}

function stateOf(file, settings, flags) {
  return hashOf([settings, flags.get(file), ...closureOf(file).map(textOf)]);
}

/** The file and what it includes of ours, at any depth. */
function closureOf(file) {
  const found = new Set([file]);
  for (const one of found) {
    for (const [, name] of textOf(one).matchAll(/^\s*#\s*include "([^"]+)"/gm)) {
      for (const path of [join('native', name), join(dirname(one), name)]) {
        if (existsSync(join(root, path))) found.add(path);
      }
    }
  }
  return [...found].sort();
}

function stampOf(file) {
  const path = join(units, `${nameOf(file)}.stamp`);
  return existsSync(path) ? readFileSync(path, 'utf8') : '';
}

function writeStamp(file, state) {
  const path = join(units, `${nameOf(file)}.stamp`);
  writeFileSync(`${path}.new`, state);
  renameSync(`${path}.new`, path);
}

function nameOf(file) {
  return file.replaceAll('/', '_');
}

function hashOf(parts) {
  const hash = createHash('sha256');
  for (const part of parts) hash.update(`${part.length}\n`).update(part);
  return hash.digest('hex');
}

function textOf(path) {
  if (!texts.has(path)) texts.set(path, readFileSync(join(root, path), 'utf8'));
  return texts.get(path);
}

function sourcesBelow(directory) {
  const names = readdirSync(join(root, directory), { recursive: true });
  return names
    .filter((name) => name.endsWith('.cc'))
    .map((name) => join(directory, name))
    .sort();
}

function succeeds(command, args) {
  const { status, error, stdout, stderr } = spawnSync(command, args, { cwd: root, encoding: 'utf8' });
  if (status !== 0) fail(`${command} ${args.join(' ')}: ${error?.message ?? `${stdout}${stderr}`}`);
  return stdout;
}

function fail(message) {
  process.stderr.write(`lint: ${message}\n`);
  process.exit(1);
}
