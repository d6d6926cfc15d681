/** One trial in a process of its own: `node trial-main.js NAME [SAMPLES]`. Prints one JSON object a line. */

import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { compiledDirectory } from './support/paths.js';
import { makeTrial, type TrialModule } from './support/trial.js';

const [name, samples] = process.argv.slice(2);
if (name === undefined) throw new Error('which trial?');
const module = (await import(
  pathToFileURL(join(compiledDirectory, 'trials', `${name}.js`)).href
)) as TrialModule;
const trial = makeTrial(name, samples === undefined ? null : Number(samples), (result) => {
  process.stdout.write(`${JSON.stringify(result)}\n`);
});
// Signals end the process by way of 'exit', where children and namespaces are taken down.
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.once(signal, () => process.exit(1));
await module.run(trial);
process.exit(0);
