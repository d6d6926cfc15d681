/** The parts of `npm run test:kernel` that need no other kernel: its archive, and what it makes of test programs' words. */
import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';

const part = (name: string) => import(new URL(`../../scripts/kernel/${name}`, import.meta.url).href);
const { cpio } = await part('cpio.mjs');
const { gtestResults, vitestResults } = await part('results.mjs');

interface Entry {
  name: string;
  mode: number;
  content: string;
}

/** By the format's description, not by what wrote it. */
function unpack(archive: Buffer): Entry[] {
  const entries: Entry[] = [];
  for (let at = 0; ; ) {
    expect(archive.toString('latin1', at, at + 6)).toBe('070701');
    const field = (index: number) =>
      Number.parseInt(archive.toString('latin1', at + 6 + index * 8, at + 14 + index * 8), 16);
    const nameEnd = at + 110 + field(11);
    const name = archive.toString('utf8', at + 110, nameEnd - 1);
    const start = Math.ceil(nameEnd / 4) * 4;
    const end = start + field(6);
    if (name === 'TRAILER!!!') return entries;
    entries.push({ name, mode: field(1), content: archive.toString('utf8', start, end) });
    at = Math.ceil(end / 4) * 4;
  }
}

describe('an initramfs', () => {
  it('has what it was given, and the directories above', () => {
    const entries = unpack(
      cpio([
        { path: '/a/b/file', content: 'odd', mode: 0o755 },
        { path: '/a/empty', content: '' },
        { path: '/link', link: 'a/b' },
        { path: '/a/b/dir/' },
      ]),
    );
    expect(entries).toEqual([
      { name: 'a', mode: 0o040755, content: '' },
      { name: 'a/b', mode: 0o040755, content: '' },
      { name: 'a/b/file', mode: 0o100755, content: 'odd' },
      { name: 'a/empty', mode: 0o100644, content: '' },
      { name: 'link', mode: 0o120777, content: 'a/b' },
      { name: 'a/b/dir', mode: 0o040755, content: '' },
    ]);
  });

  it('refuses what cannot be in one', () => {
    expect(() => cpio([{ path: 'relative', content: '' }])).toThrow();
    expect(() =>
      cpio([
        { path: '/twice', content: '' },
        { path: '/twice', content: '' },
      ]),
    ).toThrow();
  });
});

describe('what a GoogleTest program says', () => {
  const passed = ['[ RUN      ] A.One', 'talk', '[       OK ] A.One (3 ms)'];
  const skipped = [
    '[ RUN      ] B.Two/x',
    'file.cc:7: Skipped',
    'no such feature',
    '',
    '[  SKIPPED ] B.Two/x (0 ms)',
  ];
  const failed = [
    '[ RUN      ] C.Three',
    'file.cc:9: Failure',
    'one is not two',
    '[  FAILED  ] C.Three, where GetParam() = 4 (1 ms)',
  ];

  it('is taken test by test', () => {
    const summary = [
      '[  PASSED  ] 1 test.',
      '[  FAILED  ] 1 test, listed below:',
      '[  FAILED  ] C.Three',
      ' 1 FAILED TEST',
    ];
    const output = [...passed, ...skipped, ...failed, ...summary].join('\n');
    expect(gtestResults('s', output, 1)).toEqual([
      { suite: 's', name: 'A.One', outcome: 'passed', why: '' },
      { suite: 's', name: 'B.Two/x', outcome: 'skipped', why: 'no such feature' },
      { suite: 's', name: 'C.Three', outcome: 'failed', why: 'file.cc:9: Failure one is not two' },
    ]);
  });

  it('is a failure where it ends in the middle, says nothing, or ends badly', () => {
    const outcomes = (lines: string[], code?: number) =>
      gtestResults('s', lines.join('\n'), code).map(({ name, outcome }: Entry & { outcome: string }) => [
        name,
        outcome,
      ]);
    expect(outcomes([...passed, '[ RUN      ] D.Four', 'half a'], 127)).toEqual([
      ['A.One', 'passed'],
      ['D.Four', 'failed'],
    ]);
    expect(outcomes([], undefined)).toEqual([['the program', 'failed']]);
    expect(outcomes(passed, 3)).toEqual([
      ['A.One', 'passed'],
      ['the program', 'failed'],
    ]);
  });
});

describe('what vitest says', () => {
  const report = (assertionResults: object[], status = 'passed', message = '') =>
    JSON.stringify({ testResults: [{ name: '/r/t/x.test.ts', status, message, assertionResults }] });

  it('is taken test by test', () => {
    const json = report([
      { status: 'passed', fullName: 'one', failureMessages: [] },
      { status: 'failed', fullName: 'two', failureMessages: ['because'] },
      { status: 'skipped', fullName: 'three', failureMessages: [] },
    ]);
    expect(vitestResults('s', json, 1, '/r')).toEqual([
      { suite: 's', name: 't/x.test.ts: one', outcome: 'passed', why: '' },
      { suite: 's', name: 't/x.test.ts: two', outcome: 'failed', why: 'because' },
      { suite: 's', name: 't/x.test.ts: three', outcome: 'skipped', why: '' },
    ]);
    expect(vitestResults('s', json, 1, '/r', '^t(wo|hree)')).toHaveLength(2);
  });

  it('is a failure where there is none, a file does not load, or it ends badly', () => {
    expect(vitestResults('s', null, undefined, '/r')).toMatchObject([{ outcome: 'failed' }]);
    expect(vitestResults('s', report([], 'failed', 'no such module'), 1, '/r')).toMatchObject([
      { outcome: 'failed', why: 'does not load: no such module' },
    ]);
    const well = report([{ status: 'passed', fullName: 'one', failureMessages: [] }]);
    expect(vitestResults('s', well, 1, '/r')).toMatchObject([{ outcome: 'passed' }, { outcome: 'failed' }]);
  });
});

describe('the command', () => {
  it('says how it is used', () => {
    const { status, stderr } = spawnSync(process.execPath, ['scripts/kernel/run.mjs'], { encoding: 'utf8' });
    expect(status).toBe(2);
    expect(stderr).toContain('usage:');
  });
});
