/**
 * A reporter for Vitest that `npm test` reads: counts, and of each failure what was expected and what came instead, as
 * one JSON file (`MEMFERRY_TEST_RESULTS`).
 */
import { writeFileSync } from 'node:fs';
import { stripVTControlCharacters } from 'node:util';

export default class ResultsReporter {
  onTestRunEnd(modules, unhandledErrors) {
    const counts = { passed: 0, failed: 0, skipped: 0 };
    const failures = [];
    for (const module of modules) {
      const file = module.relativeModuleId;
      const before = counts.failed;
      for (const test of module.children.allTests()) {
        const { state, errors } = test.result();
        // One that was still waiting when the run ended has not passed.
        counts[state === 'pending' ? 'failed' : state]++;
        if (state === 'failed') failures.push({ file, title: test.fullName, why: whyOf(errors) });
      }
      // A file that does not load has no tests, and a hook that fails is no test's failure.
      const others = [module, ...module.children.allSuites()].flatMap((each) => each.errors());
      if (others.length === 0 && (module.state() !== 'failed' || counts.failed > before)) continue;
      counts.failed++;
      failures.push({ file, title: 'outside its tests', why: whyOf(others) });
    }
    for (const error of unhandledErrors) {
      counts.failed++;
      failures.push({ file: '', title: 'an error that nobody handled', why: whyOf([error]) });
    }
    writeFileSync(process.env.MEMFERRY_TEST_RESULTS, JSON.stringify({ counts, failures }));
  }
}

function whyOf(errors = []) {
  return errors
    .map(({ message, diff, stack }) =>
      [message, diff, stack?.split('\n').filter((text) => text.includes('/test/'))]
        .flat()
        .filter(Boolean)
        .join('\n'),
    )
    .map(stripVTControlCharacters)
    .join('\n');
}
