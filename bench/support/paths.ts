/** Where things lie once the benchmarks are compiled into build-bench/js. */
import { existsSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

function findRoot(): string {
  let directory = dirname(fileURLToPath(import.meta.url));
  while (!existsSync(join(directory, 'package.json'))) {
    const parent = dirname(directory);
    if (parent === directory) throw new Error('no package.json above the benchmarks');
    directory = parent;
  }
  return directory;
}

export const repositoryRoot = findRoot();
export const floorsDirectory = join(repositoryRoot, 'build-bench', 'floors');
/** The compiled counterpart of bench/. */
export const compiledDirectory = join(repositoryRoot, 'build-bench', 'js');
