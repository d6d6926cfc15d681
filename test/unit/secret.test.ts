/** Where the shared secret comes from, and the files that are not trusted with it. */
import { execFileSync } from 'node:child_process';
import {
  chmod,
  chown,
  link,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { automaticSecretPath, loadSecret, readSecretFile } from '../../src/control/secret.js';

let directory: string;

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'memferry-secret-test-'));
});
afterEach(() => rm(directory, { recursive: true }));

const loopback = { loopback: true };

describe('the automatic secret', () => {
  const load = () => loadSecret({ environment: { XDG_RUNTIME_DIR: directory } }, loopback);
  const path = () => automaticSecretPath({ XDG_RUNTIME_DIR: directory });

  it('is made once, for this user alone', async () => {
    const first = await load();
    expect(Buffer.from(first).toString('latin1')).toMatch(/^[0-9a-f]{64}$/);
    expect(await load()).toEqual(first);
    expect((await stat(path())).mode & 0o777).toBe(0o600);
    expect((await stat(join(directory, 'memferry'))).mode & 0o777).toBe(0o700);
    expect(await readdir(join(directory, 'memferry'))).toEqual(['secret']);
  });

  it('is the same for everyone who makes it at once', async () => {
    const all = await Promise.all(Array.from({ length: 50 }, load));
    expect(new Set(all.map((secret) => Buffer.from(secret).toString('hex'))).size).toBe(1);
    expect(await readdir(join(directory, 'memferry'))).toEqual(['secret']);
  });

  it('lies below the temporary directory when there is no runtime directory', () => {
    const uid = process.geteuid?.();
    expect(automaticSecretPath({})).toBe(join(tmpdir(), `memferry-${uid}`, 'secret'));
    expect(automaticSecretPath({ XDG_RUNTIME_DIR: '' })).toBe(join(tmpdir(), `memferry-${uid}`, 'secret'));
    expect(automaticSecretPath({ XDG_RUNTIME_DIR: 'relative' })).toBe(
      join(tmpdir(), `memferry-${uid}`, 'secret'),
    );
  });

  it('is not read from a directory that others can use', async () => {
    await load();
    await chmod(join(directory, 'memferry'), 0o755);
    await expect(load()).rejects.toMatchObject({
      code: 'AUTH_FAILED',
      message: expect.stringMatching(/chmod 700/),
    });
  });

  it('is not read through a symbolic link, of the file or of its directory', async () => {
    await mkdir(join(directory, 'elsewhere'), { mode: 0o700 });
    await symlink(join(directory, 'elsewhere'), join(directory, 'memferry'));
    await expect(load()).rejects.toMatchObject({
      code: 'AUTH_FAILED',
      message: expect.stringMatching(/not a directory/),
    });
    await rm(join(directory, 'memferry'));
    await mkdir(join(directory, 'memferry'), { mode: 0o700 });
    await writeFile(join(directory, 'target'), 'x'.repeat(64), { mode: 0o600 });
    await symlink(join(directory, 'target'), path());
    await expect(load()).rejects.toMatchObject({
      code: 'AUTH_FAILED',
      message: expect.stringMatching(/symbolic link/),
    });
  });

  it.skipIf(process.geteuid?.() !== 0)(
    'is not read when it belongs to somebody else (needs root)',
    async () => {
      await load();
      await chown(path(), 12345, 12345);
      await expect(load()).rejects.toMatchObject({
        code: 'AUTH_FAILED',
        message: expect.stringMatching(/user 12345/),
      });
      await chown(join(directory, 'memferry'), 12345, 12345);
      await expect(load()).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    },
  );

  it('is for loopback only', async () => {
    await expect(loadSecret({}, { loopback: false })).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  });
});

describe("a secret file of one's own", () => {
  const file = async (content: string | Buffer, mode = 0o600) => {
    const path = join(directory, 'mine');
    await writeFile(path, content);
    await chmod(path, mode);
    return path;
  };

  it('gives its text without the white space at the end', async () => {
    const path = await file('sixteen bytes or more \n\r\n');
    expect(Buffer.from(await readSecretFile(path)).toString()).toBe('sixteen bytes or more');
    const viaFile = await loadSecret({ secretFile: path }, { loopback: false });
    const direct = await loadSecret({ secret: 'sixteen bytes or more' }, { loopback: false });
    expect(Buffer.from(viaFile)).toEqual(Buffer.from(direct));
  });

  for (const mode of [0o640, 0o604, 0o660, 0o606, 0o610, 0o777]) {
    it(`is refused with mode 0${mode.toString(8)}`, async () => {
      const path = await file('x'.repeat(32), mode);
      await expect(readSecretFile(path)).rejects.toMatchObject({
        code: 'AUTH_FAILED',
        message: expect.stringMatching(/chmod 600/),
        facts: { path },
      });
    });
  }

  it('is taken with mode 0400', async () => {
    expect(await readSecretFile(await file('x'.repeat(32), 0o400))).toHaveLength(32);
  });

  it('is refused when it is too short, too long, a directory, a FIFO, or not there', async () => {
    await expect(readSecretFile(await file('short\n'))).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await expect(readSecretFile(await file('x'.repeat(4097)))).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    await expect(readSecretFile(directory)).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    await expect(readSecretFile(join(directory, 'nothing'))).rejects.toMatchObject({
      code: 'AUTH_FAILED',
      message: expect.stringMatching(/ENOENT/),
    });
    const fifo = join(directory, 'fifo');
    execFileSync('mkfifo', ['-m', '600', fifo]);
    await expect(readSecretFile(fifo)).rejects.toMatchObject({
      message: expect.stringMatching(/not a regular file/),
    });
  });

  it('is refused through a symbolic link, and read through a hard one', async () => {
    const path = await file('x'.repeat(32));
    await symlink(path, join(directory, 'soft'));
    await link(path, join(directory, 'hard'));
    await expect(readSecretFile(join(directory, 'soft'))).rejects.toMatchObject({ code: 'AUTH_FAILED' });
    expect(await readSecretFile(join(directory, 'hard'))).toHaveLength(32);
    expect((await readFile(path)).length).toBe(32);
  });
});

it('a secret given directly must be long enough', async () => {
  await expect(loadSecret({ secret: 'fifteen bytes..' }, loopback)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
  });
  expect(await loadSecret({ secret: new Uint8Array(16) }, loopback)).toHaveLength(16);
});
