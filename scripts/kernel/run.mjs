/**
 * `node scripts/kernel/run.mjs COMMAND [ARGUMENT...]`: runs a command of this system on Debian's kernel, in a machine
 * of its own: the system is its root, read-only; the checkout can be written to, but what is written goes with the
 * machine.
 */
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

import { debianKernel } from './debian-kernel.mjs';
import { chooseAccelerator, runInside } from './machine.mjs';

const root = join(dirname(fileURLToPath(import.meta.url)), '../..');
const command = process.argv.slice(2);
if (command.length === 0) {
  process.stderr.write('usage: node scripts/kernel/run.mjs COMMAND [ARGUMENT...]\n');
  process.exit(2);
}
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, () => process.exit(130));
const kernel = debianKernel((line) => process.stderr.write(`kernel: ${line}\n`));
const accelerator = await chooseAccelerator(kernel);
const began = Date.now();
const { code, console: messages } = await runInside(kernel, {
  shares: [
    { path: '/', at: '/', how: 'ro' },
    { path: root, at: root, how: 'overlay' },
  ],
  tmpfs: [
    { at: '/tmp', mebibytes: 512 },
    { at: '/run', mebibytes: 64 },
    { at: '/dev/shm', mebibytes: 512 },
  ],
  command: ['/usr/bin/env', ...command],
  environment: { PATH: process.env.PATH ?? '', HOME: '/tmp', TMPDIR: '/tmp' },
  directory: root,
  deadlineSeconds: Number(process.env.DEADLINE ?? 300),
  hostSeconds: 3600,
  memoryMiB: 2048,
  modules: ['zram'],
  accelerator,
  onOutput: (text) => process.stdout.write(text),
});
if (code >= 124) process.stderr.write(messages);
process.stderr.write(
  `kernel: ${kernel.release}, ${accelerator}, ${((Date.now() - began) / 1000).toFixed(1)} s, exit code ${code}\n`,
);
process.exitCode = code;
