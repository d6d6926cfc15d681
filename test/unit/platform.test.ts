/** Where memferry cannot run it still installs and imports, and every call says what is missing. */
import { spawnSync } from 'node:child_process';
import { chmodSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, describe, expect, it, vi } from 'vitest';
import { load } from '../../src/addon.js';

const root = fileURLToPath(new URL('../..', import.meta.url));
const install = join(root, 'scripts/install.mjs');
const linux = Object.getOwnPropertyDescriptor(process, 'platform') as PropertyDescriptor;

afterEach(() => {
  Object.defineProperty(process, 'platform', linux);
  vi.resetModules();
});

function thrown(action: () => unknown): { code?: string; message?: string } {
  try {
    action();
  } catch (error) {
    return error as Error;
  }
  return {};
}

describe('on a system other than Linux', () => {
  it('the package imports, and every call says that Linux is needed', async () => {
    vi.resetModules();
    Object.defineProperty(process, 'platform', { value: 'darwin' });
    const { Region, doctor, trackers, hash, hashPages, diffPages, hashImplementation } = await import(
      '../../src/index.js'
    );
    const calls = {
      allocate: () => Region.allocate({ lengthBytes: 65_536 }),
      adopt: () => Region.adopt(new ArrayBuffer(65_536)),
      open: () => Region.open('0'.repeat(32)),
      doctor: () => doctor(),
      trackers: () => trackers(),
      hash: () => hash(new Uint8Array(1)),
      hashPages: () => hashPages(new Uint8Array(0)),
      diffPages: () => diffPages(new Uint8Array(0), new Uint8Array(0)),
      hashImplementation: () => hashImplementation(),
    };
    for (const [name, call] of Object.entries(calls)) {
      const error = thrown(call);
      expect(error.code, name).toBe('UNSUPPORTED_PLATFORM');
      expect(error.message, name).toMatch(/needs Linux.*darwin/);
    }
  });

  it('the install step builds nothing and succeeds', () => {
    const pretend = `data:text/javascript,Object.defineProperty(process,'platform',{value:'darwin'})`;
    const { status, stdout } = spawnSync(process.execPath, ['--import', pretend, install], {
      encoding: 'utf8',
    });
    expect(status).toBe(0);
    expect(stdout.trim().split('\n')).toEqual([expect.stringMatching(/nothing to build on darwin.*Linux/)]);
  });
});

describe('without the addon', () => {
  it('a call says how to build it', () => {
    const error = thrown(() => load('linux', '/nowhere/memferry.node'));
    expect(error).toMatchObject({
      code: 'ADDON_MISSING',
      message: expect.stringContaining('npm run build:addon'),
    });
  });

  it('a broken build is named, with the loader’s reason', () => {
    const directory = mkdtempSync(join(tmpdir(), 'memferry-test-'));
    try {
      const broken = join(directory, 'memferry.node');
      writeFileSync(broken, 'not an ELF file');
      const error = thrown(() => load('linux', broken)) as { code: string; message: string; cause: unknown };
      expect(error.code).toBe('ADDON_MISSING');
      expect(error.message).toContain(broken);
      expect(error.cause).toBeInstanceOf(Error);
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  });
});

describe('the install step', () => {
  it('names the packages of the tools that are missing', () => {
    const env = { PATH: '/nonexistent' };
    const { status, stderr } = spawnSync(process.execPath, [install], { encoding: 'utf8', env });
    expect(status).toBe(1);
    expect(stderr).toMatch(/no make, no Python 3, no C\+\+20 compiler/);
    expect(stderr).toMatch(/apt-get install make python3 g\+\+\n/);
    expect(stderr).not.toContain('xxhash');
  });

  it('names the package of a header that is missing, and only that', () => {
    const directory = mkdtempSync(join(tmpdir(), 'memferry-test-'));
    try {
      const compiler = join(directory, 'g++');
      const script =
        '#!/bin/sh\nfor f; do case $f in *.cc) grep -q xxhash "$f" && exit 1;; esac; done\nexit 0\n';
      writeFileSync(compiler, script);
      chmodSync(compiler, 0o755);
      const env = { ...process.env, CXX: compiler };
      const { status, stderr } = spawnSync(process.execPath, [install], { encoding: 'utf8', env });
      expect(status).toBe(1);
      expect(stderr).toMatch(/no xxhash\.h\n/);
      expect(stderr).toMatch(/apt-get install libxxhash-dev\n/);
      expect(stderr).toMatch(/dnf install xxhash-devel\n/);
    } finally {
      rmSync(directory, { recursive: true, force: true });
    }
  });
});
