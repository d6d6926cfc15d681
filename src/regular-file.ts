/** Reading files whose path, and what lies there, is somebody else's. */
import { closeSync, constants, fstatSync, openSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { memferryError, native } from './errors.js';

/** Of a file that says that it is empty. */
const leastRead = 65_536;
const readOnly = constants.O_RDONLY | constants.O_NONBLOCK;

/**
 * A descriptor of a file with pages from `offsetBytes` on. `what`: whose option it is.
 * @throws INVALID_ARGUMENT: no regular file, or it ends before; SYSTEM
 */
export function openPages(path: string, offsetBytes: number, what: string): number {
  const file = native(() => openSync(path, readOnly));
  try {
    const info = fstatSync(file);
    if (!info.isFile())
      throw memferryError('INVALID_ARGUMENT', `${what}: snapshot: ${path} is not a regular file`);
    if (offsetBytes < info.size) return file;
    const size = `the snapshot has ${info.size} bytes`;
    throw memferryError('INVALID_ARGUMENT', `${what}: offsetBytes is ${offsetBytes}, and ${size}`);
  } catch (error) {
    closeSync(file);
    throw error;
  }
}

/**
 * All of a regular file of at most so many bytes. Rejects at once for anything else: opening a FIFO does not wait for its
 * writer, nor is a device read until memory ends.
 */
export async function readRegularFile(path: string, mostBytes: number): Promise<Buffer> {
  const file = await open(path, readOnly);
  try {
    const facts = await file.stat();
    if (!facts.isFile()) throw new Error(`${path} is not a regular file`);
    if (facts.size > mostBytes) throw new Error(`${path} has ${facts.size} bytes, more than ${mostBytes}`);
    // One that grows, or does not say how long it is.
    const bytes = Buffer.alloc(Math.min(mostBytes, Math.max(facts.size, leastRead)) + 1);
    let length = 0;
    while (length < bytes.length) {
      const { bytesRead } = await file.read(bytes, length, bytes.length - length, length);
      if (bytesRead === 0) return bytes.subarray(0, length);
      length += bytesRead;
    }
    throw new Error(`${path} has more than ${length - 1} bytes`);
  } finally {
    await file.close();
  }
}
