/** What a process may take, from the files of a system that has limits. */
import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { spareBytes, systemMemory } from '../../src/staging/system-memory.js';

const run = promisify(execFile);
const meminfo = 'MemTotal:       1000 kB\nMemFree:  10 kB\nMemAvailable:    600 kB\nSwapTotal:       24 kB\n';

/** A file that is not there throws. */
function system(files: Record<string, string>) {
  return systemMemory((path) => {
    const text = files[path];
    if (text === undefined) throw new Error(`ENOENT: ${path}`);
    return text;
  });
}

describe('the memory that there is', () => {
  it("is the machine's where no group has a limit", () => {
    const none = { mostBytes: 1024 * 1024, availableBytes: 600 * 1024, group: null, limitBytes: 1000 * 1024 };
    expect(system({ '/proc/meminfo': meminfo })).toEqual(none);
    const files = {
      '/proc/meminfo': meminfo,
      '/proc/self/cgroup': '0::/a\n',
      '/proc/self/mountinfo': '30 29 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n',
      '/sys/fs/cgroup/a/memory.max': 'max\n',
      '/sys/fs/cgroup/a/memory.current': '1000\n',
    };
    expect(system(files)).toEqual(none);
    expect(system({})).toMatchObject({ mostBytes: Number.POSITIVE_INFINITY, group: null });
  });

  it('is not taken for endless where nothing can be opened', () => {
    const failing = (code: string) => () => {
      throw Object.assign(new Error(code), { code });
    };
    expect(() => systemMemory(failing('EMFILE'))).toThrow('EMFILE');
    expect(systemMemory(failing('EACCES')).availableBytes).toBe(Number.POSITIVE_INFINITY);
  });

  it('is what the tightest group above the process has left, its file pages counted as free', () => {
    const group = '/sys/fs/cgroup/a/b';
    const files = {
      '/proc/meminfo': meminfo,
      '/proc/self/cgroup': '1:name=systemd:/x\n0::/a/b/c\n',
      '/proc/self/mountinfo': '30 29 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n',
      [`${group}/c/memory.max`]: 'max\n',
      [`${group}/c/memory.current`]: '9\n',
      [`${group}/memory.max`]: '10000\n',
      [`${group}/memory.current`]: '7000\n',
      [`${group}/memory.stat`]: 'anon 3000\nactive_file 300\ninactive_file 1000\n',
      '/sys/fs/cgroup/a/memory.max': '90000\n',
      '/sys/fs/cgroup/a/memory.current': '8000\n',
    };
    expect(system(files)).toMatchObject({ availableBytes: 4300, group, limitBytes: 10_000 });
  });

  it('is the same with the first version of groups, mounted from the container on', () => {
    const files = {
      '/proc/meminfo': meminfo,
      '/proc/self/cgroup': '4:memory:/docker/1/inner\n3:cpu:/docker/1\n0::/\n',
      '/proc/self/mountinfo':
        '40 29 0:30 /docker/1 /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n' +
        '41 29 0:31 /docker/1 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n',
      '/sys/fs/cgroup/memory/inner/memory.limit_in_bytes': '9223372036854771712\n',
      '/sys/fs/cgroup/memory/inner/memory.usage_in_bytes': '10\n',
      '/sys/fs/cgroup/memory/memory.limit_in_bytes': '5000\n',
      '/sys/fs/cgroup/memory/memory.usage_in_bytes': '6000\n',
    };
    expect(system(files)).toMatchObject({ availableBytes: 0, group: '/sys/fs/cgroup/memory' });
  });
});

describe('what may be taken of it', () => {
  const GIB = 2 ** 30;
  const of = (availableBytes: number, limitBytes: number) =>
    spareBytes({ availableBytes, limitBytes, mostBytes: limitBytes, group: null });
  it('is all but a reserve', () => {
    expect(of(10 * GIB, 64 * GIB)).toBe(9.75 * GIB);
    expect(of(1 * GIB, 1 * GIB)).toBe((15 / 16) * GIB);
    expect(of(0.1 * GIB, 64 * GIB)).toBe(0);
    expect(of(Number.POSITIVE_INFINITY, Number.POSITIVE_INFINITY)).toBe(Number.POSITIVE_INFINITY);
  });
});

/** In a process of its own: were it to take the memory, that one would be killed. */
async function stageIn(options: string): Promise<{ code: string; message: string; ms: number }> {
  const program = `
    import os from 'node:os';
    import { stage } from ${JSON.stringify(new URL('../../lib/index.js', import.meta.url).href)};
    const started = performance.now();
    const error = await stage({ secret: 'a secret of sixteen bytes', ...(${options}) }).then((s) => s.close(), (e) => e);
    console.log(JSON.stringify({ code: error?.code, message: error?.message, ms: performance.now() - started }));`;
  const { stdout } = await run(process.execPath, ['--input-type=module', '-e', program]);
  return JSON.parse(stdout);
}

describe('a VMD server', () => {
  it('does not take more memory at its start than there is', async () => {
    const refused = await stageIn('{ memoryBytes: os.totalmem(), preallocate: true }');
    expect(refused).toMatchObject({
      code: 'NO_MEMORY',
      message: expect.stringMatching(/cannot be taken now, \d+ are/),
    });
  });

  it('refuses at once what the machine could never hold', async () => {
    const refused = await stageIn('{ memoryBytes: 2 ** 50 }');
    expect(refused).toMatchObject({
      code: 'NO_MEMORY',
      message: expect.stringMatching(/this machine has \d+/),
    });
    expect(refused.ms).toBeLessThan(5000);
  });
});
