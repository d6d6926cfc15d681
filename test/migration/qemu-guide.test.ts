/** docs/qemu.md: what it tells one to type, typed as it is written, with a guest that checks its own memory. */
import { type ChildProcess, spawn } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { guestArguments, problemOf, qemuObstacle } from '../support/qemu/rig.mjs';

const obstacle = qemuObstacle();
if (obstacle) console.warn(`skipped: the guide to QEMU: ${obstacle}`);

const path = (relative: string) => fileURLToPath(new URL(`../../${relative}`, import.meta.url));
const blocks = [...readFileSync(path('docs/qemu.md'), 'utf8').matchAll(/^```sh\n(.*?)^```$/gms)].map(
  ([, text]) => text as string,
);

describe.skipIf(obstacle !== null)('the guide to QEMU', () => {
  let directory: string;
  let shell: ChildProcess;
  let said = '';

  beforeAll(() => {
    directory = mkdtempSync(join(tmpdir(), 'memferry-guide-'));
    const bin = join(directory, 'bin');
    mkdirSync(bin);
    const memferry = join(bin, 'memferry');
    writeFileSync(memferry, `#!/bin/sh\nexec '${process.execPath}' '${path('lib/cli/main.js')}' "$@"\n`);
    chmodSync(memferry, 0o755);
    // The rest of the guest's options: without those that the guide writes out.
    const all = guestArguments({ memoryMb: 160 });
    const written = new Set(['-m', '-machine', '-object']);
    const rest = all.filter((one, at) => !written.has(one) && !written.has(all[at - 1] ?? ''));
    shell = spawn('bash', [], {
      cwd: directory,
      detached: true, // a group of its own, to be ended as a whole
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, PATH: `${bin}:${process.env['PATH']}`, XDG_RUNTIME_DIR: directory },
    });
    for (const stream of [shell.stdout, shell.stderr]) {
      stream?.setEncoding('utf8').on('data', (text) => {
        said += text;
      });
    }
    // A kernel's command line has spaces: a function is what the reader's options may well be, too.
    const quoted = rest.map((one) => `'${one}'`).join(' ');
    shell.stdin?.write(`set -e; GUEST=; qemu-system-x86_64() { env qemu-system-x86_64 ${quoted} "$@"; }\n`);
  });
  afterAll(() => {
    try {
      process.kill(-(shell.pid as number), 'SIGKILL');
    } catch {
      // It has ended.
    }
    rmSync(directory, { recursive: true, force: true });
  });

  const log = (name: string) => {
    try {
      return readFileSync(join(directory, name), 'latin1').replaceAll('\r\n', '\n');
    } catch {
      return '';
    }
  };
  async function until(condition: () => boolean, what: string): Promise<void> {
    const deadline = performance.now() + 120_000;
    while (!condition()) {
      if (performance.now() > deadline || shell.exitCode !== null) throw new Error(`${what}: ${said}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
  const ticks = (name: string) => log(name).match(/^T \d+/gm)?.length ?? 0;

  test('its commands move a guest', async () => {
    expect(blocks.length).toBe(4);
    const [here, there, destination, source] = blocks as [string, string, string, string];
    shell.stdin?.write(here);
    await until(() => ticks('here.log') > 10, 'the guest has not started');
    shell.stdin?.write(there);
    shell.stdin?.write(`until [ -S there.qmp -a -S there.shim ]; do sleep 0.1; done\n${destination}`);
    await until(() => said.includes('"listening"'), 'the destination does not listen');
    shell.stdin?.write(`${source}echo "moved: $?"\n`);
    await until(() => said.includes('moved: '), 'the source does not end');
    expect(said).toContain('moved: 0');
    await until(() => ticks('there.log') > 10, 'the guest does not go on');
    expect(problemOf([log('here.log'), log('there.log')])).toBeNull();
  }, 240_000);
});
