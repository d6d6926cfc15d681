/** Image files of a guest's regions, as bases that are right, or nearly. */
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Host } from './host.js';

const PAGE = 4096;
/** Where in a page a byte is changed. */
const AT = 17;

/** Of each region as it is now (the guest may be writing); gives their paths. */
export async function saveImages(
  host: Host,
  directory: string,
  regions: number,
  guest = 'g',
): Promise<string[]> {
  const paths = Array.from({ length: regions }, (_, index) => join(directory, `${index}.image`));
  await host.call('saveRegions', { guest, paths });
  return paths;
}

/** Changes one byte of every n-th page. */
export async function change(path: string, every: number): Promise<void> {
  const bytes = await readFile(path);
  for (let at = AT; at < bytes.length; at += every * PAGE) bytes[at] = (bytes[at] as number) ^ 0x5a;
  await writeFile(path, bytes);
}

/** The same, and the log that makes it equal again, as hosts of the tests apply it. */
export async function changeWithLog(path: string, every: number): Promise<Uint8Array> {
  const right = await readFile(path);
  await change(path, every);
  const entry = 5; // u32 offset, u8 value
  const log = Buffer.alloc(Math.ceil((right.length - AT) / (every * PAGE)) * entry);
  for (let i = 0; i * entry < log.length; i++) {
    const at = AT + i * every * PAGE;
    log.writeUInt32LE(at, i * entry);
    log.writeUInt8(right[at] as number, i * entry + 4);
  }
  return new Uint8Array(log);
}
