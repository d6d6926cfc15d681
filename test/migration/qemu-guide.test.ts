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

  let marks = 0;
  /** Types the block, and gives its last command's exit code. */
  async function exitCode(block: string): Promise<number> {
    const mark = new RegExp(`^ended ${++marks}: (\\d+)\\n`, 'm');
    shell.stdin?.write(`${block}echo "ended ${marks}: $?"\n`);
    await until(() => mark.test(said), 'the command does not end');
    return Number(mark.exec(said)?.[1]);
  }
  /** What the reader sees for himself: QEMU is there. */
  const waitFor = (name: string) => `until [ -S ${name}.qmp -a -S ${name}.shim ]; do sleep 0.1; done\n`;

  const typed = [...blocks];
  const next = () => typed.shift() ?? '';

  test('its commands move a guest', async () => {
    shell.stdin?.write(next());
    await until(() => ticks('here.log') > 10, 'the guest has not started');
    shell.stdin?.write(next());
    shell.stdin?.write(waitFor('there') + next());
    await until(() => said.includes('"port":7071'), 'the destination does not listen');
    expect(await exitCode(next()), said).toBe(0);
    await until(() => ticks('there.log') > 10, 'the guest does not go on');
    expect(problemOf([log('here.log'), log('there.log')])).toBeNull();
  }, 240_000);

  test('and move it on through a server', async () => {
    shell.stdin?.write(next());
    shell.stdin?.write(waitFor('third') + next());
    await until(() => /"port":7077/.test(said) && /"port":7072/.test(said), 'nobody listens');
    const before = said.length;
    expect(await exitCode(next()), said).toBe(0);
    await until(() => ticks('third.log') > 10, 'the guest does not go on');
    expect(problemOf([log('here.log'), log('there.log'), log('third.log')])).toBeNull();
    const complete = () => said.slice(before).match(/^{"type":"report".*"verified":true.*$/gm)?.length === 1;
    await until(complete, 'the guest is not gathered');
    // It is told when the rest has been gathered.
    const status = async () => {
      await exitCode('memferry status 127.0.0.1:7077\n');
      return said;
    };
    await expect.poll(status).toMatch(/^{"type":"status".*"held":\[\]/m);
  }, 240_000);

  test('no command is left out', () => {
    expect(typed).toEqual([]);
  });
});
