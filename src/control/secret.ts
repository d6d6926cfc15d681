/**
 * The shared secret that both sides of a migration must know, and the file it comes from. On loopback one file
 * a user is made automatically: whoever can read it is that user, which is all that loopback can ask for.
 */
import { randomBytes } from 'node:crypto';
import { constants } from 'node:fs';
import { type FileHandle, link, lstat, mkdir, open, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { MemferryError } from '../errors.js';

export const MIN_SECRET_BYTES = 16;
const MAX_FILE_BYTES = 4096;
const AUTOMATIC_BYTES = 32;

export interface SecretChoice {
  /** The secret itself. */
  secret?: Uint8Array | string | undefined;
  /** A file that holds it; white space at its end does not count. */
  secretFile?: string | undefined;
  /** Where the automatic file is looked for; for tests. */
  environment?: { XDG_RUNTIME_DIR?: string | undefined };
}

/**
 * The secret as bytes. With neither a secret nor a file the automatic one is read, or made: then `loopback` must
 * hold, because a peer on another machine cannot have it.
 */
export async function loadSecret(
  choice: SecretChoice,
  { loopback }: { loopback: boolean },
): Promise<Uint8Array> {
  if (choice.secret !== undefined) {
    const bytes = typeof choice.secret === 'string' ? Buffer.from(choice.secret, 'utf8') : choice.secret;
    return longEnough(bytes, 'the secret');
  }
  if (choice.secretFile !== undefined) return readSecretFile(choice.secretFile);
  if (!loopback) {
    throw new MemferryError(
      'INVALID_ARGUMENT',
      'an address other than loopback needs a secret that both sides have been given: secret or secretFile',
    );
  }
  const path = automaticSecretPath(choice.environment);
  await makeSecretFile(path);
  return readSecretFile(path);
}

export function automaticSecretPath(
  environment: { XDG_RUNTIME_DIR?: string | undefined } = { XDG_RUNTIME_DIR: process.env['XDG_RUNTIME_DIR'] },
): string {
  const runtime = environment.XDG_RUNTIME_DIR;
  // A relative XDG_RUNTIME_DIR is invalid by its specification, and would depend on the working directory.
  if (runtime?.startsWith('/')) return join(runtime, 'memferry', 'secret');
  return join(tmpdir(), `memferry-${ownUid()}`, 'secret');
}

/** Reads a secret that nobody else can have read or put there. Throws AUTH_FAILED, saying what to do about it. */
export async function readSecretFile(path: string): Promise<Uint8Array> {
  // NONBLOCK: opening a FIFO that was put there must not wait for its writer.
  const flags = constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK;
  let file: FileHandle;
  try {
    file = await open(path, flags);
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code;
    const what = code === 'ELOOP' ? 'is a symbolic link' : `cannot be opened (${code ?? 'unknown error'})`;
    throw refused(path, what, error);
  }
  try {
    // The open file is checked, not the path: what is read is what was looked at.
    const facts = await file.stat();
    if (!facts.isFile()) throw refused(path, 'is not a regular file');
    if (facts.uid !== ownUid()) throw refused(path, `belongs to user ${facts.uid}, not to ${ownUid()}`);
    if ((facts.mode & 0o077) !== 0) {
      throw refused(path, `can be used by others (mode 0${(facts.mode & 0o777).toString(8)}); chmod 600 it`);
    }
    const buffer = Buffer.alloc(MAX_FILE_BYTES + 1);
    let length = 0;
    while (length < buffer.length) {
      const { bytesRead } = await file.read(buffer, length, buffer.length - length, length);
      if (bytesRead === 0) break;
      length += bytesRead;
    }
    if (length > MAX_FILE_BYTES) throw refused(path, `is longer than ${MAX_FILE_BYTES} bytes`);
    let end = length;
    while (end > 0 && [0x20, 0x09, 0x0a, 0x0d].includes(buffer[end - 1] as number)) end--;
    return longEnough(Uint8Array.from(buffer.subarray(0, end)), path);
  } finally {
    await file.close();
  }
}

/**
 * Makes the automatic file unless it is there: written under another name, then linked to its own. So it is
 * never seen half written, and of two processes that make it at once one wins and both read the winner's.
 */
async function makeSecretFile(path: string): Promise<void> {
  const directory = dirname(path);
  try {
    await mkdir(directory, { mode: 0o700 });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw refused(directory, 'cannot be made', error);
  }
  const facts = await lstat(directory);
  if (!facts.isDirectory()) throw refused(directory, 'is not a directory');
  if (facts.uid !== ownUid()) throw refused(directory, `belongs to user ${facts.uid}, not to ${ownUid()}`);
  if ((facts.mode & 0o077) !== 0) throw refused(directory, 'can be used by others; chmod 700 it');

  try {
    await lstat(path);
    return;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw refused(path, 'cannot be looked at', error);
  }
  const unfinished = join(directory, `.secret-${process.pid}-${randomBytes(6).toString('hex')}`);
  const file = await open(unfinished, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o600);
  try {
    try {
      await file.writeFile(`${randomBytes(AUTOMATIC_BYTES).toString('hex')}\n`);
      await file.sync();
    } finally {
      await file.close();
    }
    await link(unfinished, path).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'EEXIST') throw refused(path, 'cannot be made', error);
    });
  } finally {
    await unlink(unfinished);
  }
}

function longEnough(bytes: Uint8Array, what: string): Uint8Array {
  if (bytes.length >= MIN_SECRET_BYTES) return bytes;
  throw new MemferryError(
    'INVALID_ARGUMENT',
    `${what} has ${bytes.length} bytes; at least ${MIN_SECRET_BYTES} are needed`,
  );
}

function ownUid(): number {
  return process.geteuid?.() ?? -1;
}

function refused(path: string, what: string, cause?: unknown): MemferryError {
  return new MemferryError('AUTH_FAILED', `secret file: ${path} ${what}`, { cause, facts: { path } });
}
