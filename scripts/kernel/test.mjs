/**
 * `npm run test:kernel [-- short | migration]`: the tests of what depends on the kernel, run on Debian's 6.1: the
 * trackers, the pager, the migrations. That kernel has soft-dirty bits, and neither asynchronous write protection nor
 * PAGEMAP_SCAN nor UFFDIO_POISON. The binaries are those of this system, which the other kernel's machine has as its
 * root. `short` is what CI runs.
 *
 * The last lines are as those of `npm test`: what was skipped and why, `failed: SUITE: TEST`, and
 * `N passed, N failed, N skipped`.
 */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { debianKernel, KERNEL_DIRECTORY } from './debian-kernel.mjs';
import { chooseAccelerator, runInside } from './machine.mjs';
import { gtestResults, vitestResults } from './results.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
/**
 * Of all the commands of one machine, by its clock, where a busy host costs nothing. By the host's clock there is only
 * an end at all, somewhat before the one that .ci/run sets.
 */
const MACHINE_SECONDS = 600;
const HOST_SECONDS = Number(process.env.KERNEL_TEST_SECONDS ?? 2400);
const RESULTS = '/run/results';
const END = '@@ends with ';

/** Of 6.1, as far as memferry asks for it. */
const LACKING = ['uffd-wp-async', 'uffd-wp-unpopulated', 'uffd-poison', 'uffd-move', 'pagemap-scan'];
const HAVING = ['userfaultfd', 'uffd-wp', 'hash-diff', 'soft-dirty'];
/** Of the native tests. */
const NATIVE = [
  ...[
    'FailingMemory*',
    'UserfaultfdTest*',
    'Pagemap*',
    'ProcessMaps*',
    'Region*',
    'Discarder*',
    '*ThreadFreezer*',
  ],
  ...['*TrackerTest*', 'TrackerNames*', 'HashDiff*', '*/SharedMemory*', '*/HugePages*', '*/LargePages*'],
  ...['AttachProcess*', '*AttachTracker*', '*AttachWriters*', '*AttachKinds*', '*AttachPager*'],
  ...['PagerPoison*', 'PagerWalk*', '*AttachSourcePager*', 'SnapshotPager*', '*SwappedMemory*'],
  ...['ReceiverPaging*', 'ReceiverRecovery*'],
  ...['*/EngineTest*/softdirty*', '*/EngineTest*/uffdwp2*', '*/EngineTest*/hashdiff2Channels'],
  '-Kvm/*:*/uffdwpasync*', // what the machine has not
].join(':');
/** Of the TypeScript suite: what an older kernel can fail; the tests of these files by their whole names. */
const UNIT = {
  files: ['unit/doctor', 'unit/trackers', 'unit/lifetime'],
  tests: ['^doctor', "^'[a-z-]+' ", '^the choice', '^a poisoned page'],
};
/** More migrations between processes. They take many minutes. */
const MIGRATION = {
  files: ['migration/trackers', 'migration/modes', 'migration/modes-more', 'migration/bad-days-postcopy'],
  tests: [
    ...['^without a choice', '^a tracker that', 'over 2 channels'],
    ...['a cut in the push', '^past the bound', 'not hang process.exit'],
  ],
};
/** What CI has time for: trackers, and whole migrations. Every file costs the start of a process. */
const SHORT = {
  files: ['unit/trackers', 'migration/modes-more'],
  tests: [
    ...["^'(soft-dirty|uffd-wp|hash-diff)' ", '^the choice', '^without a choice'],
    ...['the tracker soft-dirty in pre-copy', 'the tracker uffd-wp in hybrid'],
  ],
};
const CHOICES = new Map([
  [undefined, [UNIT, SHORT]],
  ['short', [SHORT]],
  ['migration', [UNIT, SHORT, MIGRATION]],
]);
const [asked, ...tooMany] = process.argv.slice(2);
const chosen = CHOICES.get(asked);
if (chosen === undefined || tooMany.length > 0) {
  process.stderr.write('usage: npm run test:kernel [-- short | migration]\n');
  process.exit(2);
}
const TYPESCRIPT = [...new Set(chosen.flatMap(({ files }) => files))].map((name) => `test/${name}.test.ts`);
const TYPESCRIPT_TESTS = chosen.flatMap(({ tests }) => tests).join('|');

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, () => process.exit(130));

if (process.arch !== 'x64') {
  finish([
    { suite: 'kernel', name: 'all of it', outcome: 'skipped', why: `needs x86-64, not ${process.arch}` },
  ]);
}
const built = spawnSync('bash', ['scripts/test-native.sh', 'plain'], {
  cwd: root,
  stdio: ['ignore', 2, 2],
  env: { ...process.env, BUILD_ONLY: '1' },
});
if (built.status !== 0) finish([failed('build', 'the native tests cannot be built')]);

const kernel = debianKernel((line) => process.stderr.write(`kernel: ${line}\n`));
const accelerator = await chooseAccelerator(kernel);
process.stdout.write(`==> Linux ${kernel.release} (${accelerator})\n`);

const results = mkdtempSync(join(KERNEL_DIRECTORY, 'results-'));
process.once('exit', () => rmSync(results, { recursive: true, force: true }));
const node = quote(process.execPath);
// Programs are read beforehand: a wait for the host, which may be busy, is no part of a test.
const scripts = {
  native: `
    cat build-native/test/native/memferry_tests >/dev/null
    run ${node} lib/cli/main.js doctor --json
    run build-native/test/native/memferry_tests --gtest_filter=${quote(NATIVE)}`,
  typescript: `
    cat ${node} build/Release/memferry.node >/dev/null
    run ${node} node_modules/vitest/vitest.mjs run --config scripts/kernel/vitest.config.mjs \\
      --configLoader native --maxWorkers=1 --reporter=verbose \\
      --reporter=json --outputFile.json=${RESULTS}/vitest.json \\
      -t ${quote(TYPESCRIPT_TESTS)} ${TYPESCRIPT.map(quote).join(' ')}`,
};
const began = Date.now();
// A machine has one processor, and this one usually more: the two do not wait for each other.
const [native, typescript] = await Promise.all(
  Object.entries(scripts).map(([name, script]) => inside(name, script)),
);
process.stdout.write(`==> ${((Date.now() - began) / 1000).toFixed(1)} s\n`);
finish([
  ...native.died,
  ...kernelResults(native.said[0] ?? ''),
  ...gtestResults('native', native.said[1] ?? '', native.codes[1]),
  ...typescript.died,
  ...vitestResults(
    'typescript',
    readOr(join(results, 'vitest.json')),
    typescript.codes[0],
    root,
    TYPESCRIPT_TESTS,
  ),
]);

/** Runs the script's commands there; gives what each said, and its exit code. */
async function inside(name, script) {
  let output = '';
  let shown = 0;
  const { code, console: messages } = await runInside(kernel, {
    shares: [
      { path: '/', at: '/', how: 'ro' },
      { path: root, at: root, how: 'overlay' },
      { path: results, at: RESULTS, how: 'rw' },
    ],
    tmpfs: [
      { at: '/tmp', mebibytes: 512 },
      { at: '/run', mebibytes: 64 },
      { at: '/dev/shm', mebibytes: 512 },
    ],
    command: ['/bin/sh', '-c', `run() { "$@"; echo "${END}$?"; }${script}`],
    environment: {
      PATH: process.env.PATH ?? '',
      HOME: '/tmp',
      TMPDIR: '/tmp',
      XDG_RUNTIME_DIR: '/run',
      CI: 'true',
      NO_COLOR: '1',
    },
    directory: root,
    deadlineSeconds: MACHINE_SECONDS,
    hostSeconds: HOST_SECONDS,
    memoryMiB: 2048,
    // To swap to.
    modules: ['zram'],
    accelerator,
    onOutput: (text) => {
      output += text;
      const end = output.lastIndexOf('\n') + 1;
      if (end > shown) process.stdout.write(output.slice(shown, end)); // whole lines: two of them write
      shown = Math.max(shown, end);
    },
  });
  if (code !== 0) process.stdout.write(`${output.slice(shown)}\n${messages}\n`);
  return {
    died: code === 0 ? [] : [failed(name, `the machine ended with ${code}`)],
    // Each up to the line with its exit code.
    said: output.split(END).map((part) => part.replace(/^\d+\n/, '')),
    codes: [...output.matchAll(new RegExp(`${END}(\\d+)`, 'g'))].map(([, number]) => Number(number)),
  };
}

function finish(outcomes) {
  const of = (outcome) => outcomes.filter((one) => one.outcome === outcome);
  const lines = ['skipped', 'failed'].flatMap((outcome) =>
    of(outcome).map(({ suite, name, why }) => `${outcome}: ${suite}: ${name}${why ? `: ${why}` : ''}\n`),
  );
  process.stdout.write(
    `\n${lines.join('')}${of('passed').length} passed, ${of('failed').length} failed, ${of('skipped').length} skipped\n`,
  );
  process.exit(of('failed').length > 0 ? 1 : 0);
}

/** That it is the kernel that it should be, and has what makes it worth testing on: else the tests prove nothing here. */
function kernelResults(json) {
  const facts = { kernel: null, trackers: [], features: [] };
  try {
    Object.assign(facts, JSON.parse(json));
  } catch {
    // Then nothing below holds.
  }
  const offers = new Map(
    [...facts.features, ...facts.trackers].map(({ name, available }) => [name, available]),
  );
  return [
    [`memferry doctor runs on ${kernel.release}`, facts.kernel === kernel.release],
    ...LACKING.map((name) => [`doctor says that ${name} is missing`, offers.get(name) === false]),
    ...HAVING.map((name) => [`doctor says that ${name} is there`, offers.get(name) === true]),
  ].map(([name, holds]) => ({ suite: 'kernel', name, outcome: holds ? 'passed' : 'failed' }));
}

function failed(suite, name) {
  return { suite, name, outcome: 'failed' };
}

function readOr(path) {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return null;
  }
}

function quote(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
