/** Reading files whose path, and what lies there, is somebody else's. */
import { constants } from 'node:fs';
import { open } from 'node:fs/promises';

/**
 * All of a regular file of at most so many bytes. Rejects at once for anything else: opening a FIFO does not wait for its
 * writer, nor is a device read until memory ends.
 */
export async function readRegularFile(path: string, mostBytes: number): Promise<Buffer> {
  const file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
  try {
    const facts = await file.stat();
    if (!facts.isFile()) throw new Error(`${path} is not a regular file`);
    if (facts.size > mostBytes) throw new Error(`${path} has ${facts.size} bytes, more than ${mostBytes}`);
    return await file.readFile();
  } finally {
    await file.close();
  }
}
