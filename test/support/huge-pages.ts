/** Huge pages of 2 MiB for a test file, and given back after it. */
import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';

// Not vm.nr_hugepages: other tests set that, and set it back while this file runs.
const overcommitFile = '/proc/sys/vm/nr_overcommit_hugepages';

export class HugePagePool {
  #former: string | null = null;

  /** Why so many cannot be had, or null; `restore` follows either way. */
  reserve(wanted: number): string | null {
    const before = readFileSync(overcommitFile, 'utf8').trim();
    try {
      writeFileSync(overcommitFile, String(Number(before) + wanted));
      this.#former = before;
      tryThem(wanted);
      return null;
    } catch (error) {
      return `no ${2 * wanted} MiB of huge pages to be had (${(error as Error).message})`;
    }
  }

  restore(): void {
    if (this.#former !== null) writeFileSync(overcommitFile, this.#former);
    this.#former = null;
  }
}

/** Whether so many can be had shows in a process that gives them all back. */
function tryThem(wanted: number): void {
  const library = new URL('../../lib/index.js', import.meta.url).href;
  const attempt = `import('${library}').then(({ Region }) =>
    Region.allocate({ lengthBytes: ${wanted} * 2 ** 21, hugePages: true }))`;
  execFileSync(process.execPath, ['-e', attempt], { stdio: 'pipe' });
}
