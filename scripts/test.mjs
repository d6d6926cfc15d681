/**
 * `npm test`: every suite in turn, whatever the one before did. At the end a line `failed: SUITE: TEST: WHY` for each
 * test that failed, and one with the sum of all: `N passed, N failed, N skipped`. `npm test -- SUITE...` runs some; CI
 * runs `typescript-engine`, a part of the first, on another Node. While the TypeScript suite runs, which mostly waits, the
 * native ones are compiled and the fuzzers run, at the lowest priority.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { constants, cpus, setPriority, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const vitestResults = join(root, 'build/test-results/vitest.json');

const NATIVE = { native: 'plain', 'native-asan': 'asan', 'native-tsan': 'tsan' };
/** Those tests that another Node can fail: not what the addon has to deal with, losses, bases, encodings. */
const OF_THE_ENGINE = [
  'test/unit',
  ...['modes', 'park', 'bad-days-worker', 'demo-by-hand'].map((name) => `test/migration/${name}.test.ts`),
];
/** What runs the programs in C, and not how they are built. */
const WATCHED = ['hostile', 'unpark'];
const FUZZERS = ['sh', '-c', 'exec scripts/fuzz.sh 2>&1'];
/** Each gives its counts; a suite that died before it could count has `failed` 1. */
const SUITES = {
  typescript: () => runVitest(['--project=unit', '--project=migration*']),
  'typescript-engine': () => runVitest(OF_THE_ENGINE),
  ...Object.fromEntries(Object.keys(NATIVE).map((name) => [name, () => runCtest(name)])),
  embed: runEmbedded,
  'embed-tsan': runEmbeddedWatched,
  fuzz: runFuzzers,
};

const asked = process.argv.slice(2);
const unknown = asked.filter((name) => !Object.hasOwn(SUITES, name));
if (unknown.length > 0) {
  process.stderr.write(`test: no suite '${unknown[0]}': write some of ${Object.keys(SUITES).join(', ')}\n`);
  process.exit(1);
}

const names = asked.length > 0 ? asked : Object.keys(SUITES).filter((name) => name !== 'typescript-engine');
const ahead = inTurn([
  // What a build that fails says, the suite's own build says again.
  ...names
    .filter((name) => Object.hasOwn(NATIVE, name))
    .map((name) => ({
      name,
      command: ['bash', 'scripts/test-native.sh', NATIVE[name]],
      env: { BUILD_ONLY: '1', JOBS: String(Math.max(1, cpus().length - 1)) },
    })),
  ...(names.includes('typescript') && names.includes('fuzz') ? [{ name: 'fuzz', command: FUZZERS }] : []),
]);
for (const [signal, number] of [
  ['SIGINT', 2],
  ['SIGTERM', 15],
]) {
  process.once(signal, () => process.exit(128 + number));
}
const sum = { passed: 0, failed: 0, skipped: 0 };
const failures = [];
for (const name of names) {
  process.stdout.write(`\n==> ${name}\n`);
  const began = Date.now();
  const counts = await SUITES[name]();
  process.stdout.write(`==> ${name}: ${line(counts)}, ${((Date.now() - began) / 1000).toFixed(1)} s\n`);
  for (const key of Object.keys(sum)) sum[key] += counts[key];
}
process.stdout.write(`\n${failures.map((failure) => `failed: ${failure}\n`).join('')}${line(sum)}\n`);
process.exitCode = sum.failed > 0 ? 1 : 0;

async function runVitest(files = [], env = {}) {
  mkdirSync(dirname(vitestResults), { recursive: true });
  rmSync(vitestResults, { force: true });
  const reporters = ['default', './scripts/results-reporter.mjs'].map((name) => `--reporter=${name}`);
  const { code } = await run(
    process.execPath,
    ['node_modules/vitest/vitest.mjs', 'run', ...reporters, ...files],
    { ...env, MEMFERRY_TEST_RESULTS: vitestResults },
  );
  try {
    const results = JSON.parse(readFileSync(vitestResults, 'utf8'));
    for (const { file, title, why } of results.failures) {
      failures.push(`typescript: ${file}: ${title}${inOneLine(why)}`);
    }
    return code === 0 || results.counts.failed > 0 ? results.counts : { ...results.counts, failed: 1 };
  } catch {
    return { passed: 0, failed: 1, skipped: 0 };
  }
}

/**
 * One after the other, each at the lowest priority and without being seen: of each name, when it has ended, its exit code
 * and what it wrote to its standard output.
 */
function inTurn(commands) {
  const ends = new Map();
  let before = Promise.resolve();
  for (const { name, command, env = {} } of commands) {
    before = before.then(
      () =>
        new Promise((resolve) => {
          const child = spawn(command[0], command.slice(1), {
            cwd: root,
            stdio: ['ignore', 'pipe', 'ignore'],
            detached: true, // a group of its own, to be ended as a whole
            env: { ...process.env, ...env },
          });
          let output = '';
          child.stdout?.setEncoding('utf8').on('data', (text) => {
            output += text;
          });
          const end = () => process.kill(-child.pid, 'SIGTERM');
          const settle = (code) => {
            process.off('exit', end);
            resolve({ code, output });
          };
          child.once('error', () => settle(1));
          child.once('close', (code) => settle(code ?? 1));
          if (child.pid === undefined) return;
          process.once('exit', end);
          try {
            setPriority(child.pid, constants.priority.PRIORITY_LOW);
          } catch {
            // Then it is only less polite.
          }
        }),
    );
    ends.set(name, before);
  }
  return ends;
}

/** What the test of this number said of its failure, in one line: the assertion, or what the sanitizer found. */
function whyOf(number, output) {
  const lines = output.split('\n');
  const from = lines.findIndex((text) => new RegExp(`^ *\\d+/\\d+ Test +#${number}: .*\\*\\*\\*`).test(text));
  const length = lines
    .slice(from + 1)
    .findIndex((text) => /^ *(\d+\/\d+ Test +#\d+:|Start +\d+:)/.test(text));
  if (from < 0 || length < 0) return '';
  const said = lines.slice(from + 1, from + 1 + length);
  const first = said.findIndex((text) => /: Failure$|Sanitizer:|^unknown file/.test(text));
  const summary = said.filter((text) => text.startsWith('SUMMARY:'));
  // Of a stack, our own frames.
  const ours = said.slice(first).filter((text) => !/^\s*#\d/.test(text) || /\/native\//.test(text));
  const told = first < 0 ? said.slice(-8) : [...ours.slice(0, 12), ...summary];
  return `: ${told
    .map((text) => text.trim().slice(0, 240))
    .filter(Boolean)
    .join(' | ')
    .slice(0, 1500)}`;
}

async function runCtest(suite) {
  await ahead.get(suite);
  const { code, output } = await run('bash', ['scripts/test-native.sh', NATIVE[suite]]);
  const summary = /(\d+) tests? failed out of (\d+)/.exec(output);
  if (!summary) return { passed: 0, failed: 1, skipped: 0 };
  const failed = Number(summary[1]);
  const skipped = (output.match(/\*\*\*Skipped/g) ?? []).length;
  const list = /The following tests FAILED:\n((?:\s+\d+ - .*\n)*)/.exec(output)?.[1] ?? '';
  for (const [, number, test] of list.matchAll(/(\d+) - (.*)/g)) {
    failures.push(`${NATIVE[suite]}: ${test}${whyOf(number, output)}`);
  }
  return {
    passed: Number(summary[2]) - failed - skipped,
    failed: code !== 0 && failed === 0 ? 1 : failed,
    skipped,
  };
}

/** The core as it is installed, programs that embed it, and then guests that move from here to one of those. */
async function runEmbedded() {
  await ahead.get('native');
  const directory = mkdtempSync(join(tmpdir(), 'memferry-embed-'));
  try {
    const { code, output } = await run('sh', ['scripts/test-embed.sh'], { MEMFERRY_EMBED_DIR: directory });
    const counts = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(output);
    if (!counts) return { passed: 0, failed: 1, skipped: 0 };
    const [passed, failed, skipped] = counts.slice(1).map(Number);
    for (const [, name] of output.matchAll(/^failed: (.*)$/gm)) failures.push(`embed: ${name}`);
    const more = await runVitest(['--project=embed'], {
      MEMFERRY_EMBED_PROGRAMS: join(directory, 'programs'),
      MEMFERRY_COMMIT_TWIN: join(root, 'build-native/test/embed/memferry_commit_twin'),
      MEMFERRY_PARKER: join(root, 'build-native/test/embed/memferry_parker'),
    });
    return {
      passed: passed + more.passed,
      failed: (code !== 0 && failed === 0 ? 1 : failed) + more.failed,
      skipped: skipped + more.skipped,
    };
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** The destination in C once more, of the build for ThreadSanitizer: its protocol, its threads, strangers. */
async function runEmbeddedWatched() {
  await ahead.get('native-tsan');
  const { code } = await run('bash', ['scripts/test-native.sh', 'tsan'], { BUILD_ONLY: '1' });
  if (code !== 0) return { passed: 0, failed: 1, skipped: 0 };
  return runVitest(['--project=embed', ...WATCHED.map((name) => `test/embed/${name}.test.ts`)], {
    MEMFERRY_EMBED_PROGRAMS: join(root, 'build-native-tsan/test/embed'),
    MEMFERRY_EMBED_WATCHED: '1',
    TSAN_OPTIONS: 'halt_on_error=1:second_deadlock_stack=1',
  });
}

/** Each target counts as one; it says so itself where clang's libFuzzer is not there. */
async function runFuzzers() {
  const already = await ahead.get('fuzz');
  if (already) process.stdout.write(already.output);
  const { code, output } = already ?? (await run(FUZZERS[0], FUZZERS.slice(1)));
  const counts = /(\d+) passed, (\d+) failed, (\d+) skipped\s*$/.exec(output);
  if (!counts) return { passed: 0, failed: 1, skipped: 0 };
  const [passed, failed, skipped] = counts.slice(1).map(Number);
  for (const [, name] of output.matchAll(/^fuzz: (.*) FAILED$/gm)) failures.push(`fuzz: ${name}`);
  return { passed, failed: code !== 0 && failed === 0 ? 1 : failed, skipped };
}

/** Shows what the command says while it runs, and keeps it. */
function run(command, args, env = {}) {
  return new Promise((resolve) => {
    const child = spawn(command, args, {
      cwd: root,
      stdio: ['ignore', 'pipe', 'inherit'],
      env: { ...process.env, ...env },
    });
    let output = '';
    child.stdout.setEncoding('utf8').on('data', (text) => {
      output += text;
      process.stdout.write(text);
    });
    child.once('error', (error) => {
      process.stderr.write(`test: ${command}: ${error.message}\n`);
      resolve({ code: 1, output });
    });
    child.once('close', (code) => resolve({ code: code ?? 1, output }));
  });
}

/** As much of a failure's message as says what it is. */
function inOneLine(message) {
  const text = (message ?? '').replace(/\s+/g, ' ').trim();
  return text === '' ? '' : `: ${text.slice(0, 1500)}`;
}

function line({ passed, failed, skipped }) {
  return `${passed} passed, ${failed} failed, ${skipped} skipped`;
}
