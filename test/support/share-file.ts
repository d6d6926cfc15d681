/** What a page share's file holds, read by its layout alone (native/share/share_format.h). */
import { createHmac } from 'node:crypto';
import { readFileSync } from 'node:fs';

const pageBytes = 4096;
const entryBytes = 48;
const groupSlots = Math.floor(pageBytes / entryBytes);

export interface SharedPage {
  /** 64 hex digits. */
  digest: string;
  score: number;
  bytes: Buffer;
}

export function readShare(path: string): SharedPage[] {
  const file = readFileSync(path);
  const pages: SharedPage[] = [];
  for (let group = 0; ; group++) {
    const index = (1 + group * (1 + groupSlots)) * pageBytes;
    if (index + pageBytes > file.length) return pages;
    for (let slot = 0; slot < groupSlots; slot++) {
      const entry = index + slot * entryBytes;
      if (file.readBigUInt64LE(entry + 40) !== 1n) continue;
      const page = index + (1 + slot) * pageBytes;
      pages.push({
        digest: file.toString('hex', entry, entry + 32),
        score: file.readDoubleLE(entry + 32),
        bytes: file.subarray(page, page + pageBytes),
      });
    }
  }
}

export function digestOf(key: Uint8Array, page: Uint8Array): string {
  return createHmac('sha256', key).update(page).digest('hex');
}
