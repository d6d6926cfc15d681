/**
 * What test programs say, as `{ suite, name, outcome: 'passed' | 'failed' | 'skipped', why }` for each test. Pure. A
 * program that ended before it could say all of it is a failure of its own.
 */
import { relative } from 'node:path';

const MOST_OF_A_MESSAGE = 600;

/** @param {string} output of a GoogleTest program; @param {number | undefined} code its exit code */
export function gtestResults(suite, output, code) {
  const results = [];
  let running = null;
  let said = [];
  for (const line of output.split('\n')) {
    const mark = /^\[( +OK| {2}FAILED| {2}SKIPPED| RUN {5}) +\] (\S+?)(?:, where .*)? ?(?:\(\d+ ms\))?$/.exec(
      line,
    );
    if (!mark) {
      said.push(line);
    } else if (mark[1].startsWith(' RUN')) {
      running = mark[2].replace(/,$/, '');
      said = [];
    } else if (running !== null) {
      const outcome = { OK: 'passed', FAILED: 'failed', SKIPPED: 'skipped' }[mark[1].trim()];
      const why = outcome === 'passed' ? '' : message(said);
      results.push({ suite, name: running, outcome, why });
      running = null;
    }
  }
  if (running !== null) {
    results.push({
      suite,
      name: running,
      outcome: 'failed',
      why: `the program ended in it (${code ?? 'no exit code'})`,
    });
  } else if (results.length === 0 || (code !== 0 && !results.some(({ outcome }) => outcome === 'failed'))) {
    results.push({ suite, name: 'the program', outcome: 'failed', why: `exit code ${code ?? 'unknown'}` });
  }
  return results;
}

/** @param {string | null} json of vitest's reporter of that name; @param {string} [wanted] the pattern that chose the tests */
export function vitestResults(suite, json, code, root, wanted = '') {
  const results = [];
  const { testResults = [] } = json === null ? {} : JSON.parse(json);
  for (const file of testResults) {
    const path = relative(root, file.name);
    if (file.status === 'failed' && file.assertionResults.length === 0) {
      results.push({
        suite,
        name: path,
        outcome: 'failed',
        why: `does not load: ${message([file.message ?? ''])}`,
      });
    }
    for (const test of file.assertionResults) {
      if (!new RegExp(wanted).test(test.fullName)) continue;
      const outcome = { passed: 'passed', failed: 'failed' }[test.status] ?? 'skipped';
      const why = message(test.failureMessages ?? []);
      results.push({ suite, name: `${path}: ${test.fullName}`, outcome, why });
    }
  }
  if (results.length === 0 || (code !== 0 && !results.some(({ outcome }) => outcome === 'failed'))) {
    results.push({ suite, name: 'vitest', outcome: 'failed', why: `exit code ${code ?? 'unknown'}` });
  }
  return results;
}

function message(lines) {
  const text = lines
    .map((line) => line.trim())
    .filter((line) => line !== '' && !/: Skipped$/.test(line))
    .join(' ');
  return text.slice(0, MOST_OF_A_MESSAGE);
}
