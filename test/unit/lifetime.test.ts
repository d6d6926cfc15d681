/**
 * Memory never vanishes under a native thread, and no end of a thread or process hangs or crashes on one: each
 * case is a process of its own (lifetime-child.mjs), because what is tested may take the process with it.
 */
import { spawn } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { describe, expect, it, vi } from 'vitest';

const child = fileURLToPath(new URL('lifetime-child.mjs', import.meta.url));
const addon =
  process.env['MEMFERRY_ADDON'] ??
  fileURLToPath(new URL('../../build/Release/memferry.node', import.meta.url));
/** Far beyond what any of them takes on a busy machine; a hang is what it is for. */
const LIMIT_MS = 30_000;
vi.setConfig({ testTimeout: LIMIT_MS + 5000 });

interface End {
  code: number | null;
  signal: string | null;
  stdout: string;
  stderr: string;
}

function run(scenario: string): Promise<End> {
  return new Promise((resolve, reject) => {
    const args = ['--expose-gc', '--no-warnings', child, addon, scenario];
    const process_ = spawn(process.execPath, args, { stdio: ['ignore', 'pipe', 'pipe'] });
    const end: End = { code: null, signal: null, stdout: '', stderr: '' };
    process_.stdout.on('data', (chunk) => {
      end.stdout += chunk;
    });
    process_.stderr.on('data', (chunk) => {
      end.stderr += chunk;
    });
    const timer = setTimeout(() => {
      process_.kill('SIGKILL');
      reject(new Error(`${scenario} did not end in ${LIMIT_MS} ms: ${end.stdout}${end.stderr}`));
    }, LIMIT_MS);
    process_.on('error', reject);
    process_.on('close', (code, signal) => {
      clearTimeout(timer);
      resolve({ ...end, code, signal });
    });
  });
}

const WELL: End = { code: 0, signal: null, stdout: 'ok\n', stderr: '' };
const EXITED: End = { code: 7, signal: null, stdout: '', stderr: '' };

describe('the end of a worker', () => {
  it('retires its regions, however it ends', async () => {
    expect(await run('worker-ends')).toEqual(WELL);
  });
  it('by terminate is safe while other threads hash and track its memory', async () => {
    expect(await run('terminate-in-the-middle')).toEqual(WELL);
  });
  it('by terminate is safe while its engines move memory', async () => {
    expect(await run('terminate-while-moving')).toEqual(WELL);
  });
});

describe('garbage collection', () => {
  it('frees regions and trackers that nobody closed', async () => {
    expect(await run('gc-frees')).toEqual(WELL);
  });
  it('keeps adopted memory while another thread has a handle on it', async () => {
    expect(await run('gc-keeps-what-another-thread-uses')).toEqual(WELL);
  });
  it('keeps engines that are open', async () => {
    expect(await run('gc-keeps-open-engines')).toEqual(WELL);
  });
});

describe('process.exit', () => {
  for (const scenario of [
    'exit-while-hashing',
    'exit-while-tracking',
    'exit-while-moving',
    'exit-while-worker-moves',
    'exit-while-worker-waits',
    'exit-while-worker-waits-for-itself',
  ]) {
    it(`ends the process at once with its code: ${scenario}`, async () => {
      expect(await run(scenario)).toEqual(EXITED);
    });
  }
  it('is not needed: engines keep no process alive', async () => {
    expect(await run('exit-without-closing')).toEqual({ ...WELL, stdout: '' });
  });
});

describe('a poisoned page', () => {
  it('is a RuntimeError in WebAssembly, and the process goes on', async () => {
    expect(await run('poison-reaches-wasm')).toEqual(WELL);
  });
  it('ends a process whose JavaScript reads it, by a signal, and never reads as zero', async () => {
    const { code, signal, stdout } = await run('poison-kills-javascript');
    expect({ code, stdout }).toEqual({ code: null, stdout: '' });
    expect(['SIGBUS', 'SIGSEGV']).toContain(signal);
  });
  it('fails a digest, and no more', async () => {
    expect(await run('digest-of-poisoned-pages')).toEqual(WELL);
  });
});

describe('events', () => {
  it('stop with close, those on their way included', async () => {
    expect(await run('no-event-after-close')).toEqual(WELL);
  });
  it('that are dropped close the descriptors that they carry', async () => {
    expect(await run('control-descriptors-do-not-leak')).toEqual(WELL);
  });
  it('whose callback throws are uncaught exceptions, not silence', async () => {
    expect(await run('callback-that-throws')).toEqual(WELL);
  });
});
