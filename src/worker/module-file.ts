/** The file that runs a guest: found by URL, known by its SHA-256. */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';

import { memferryError } from '../errors.js';

/** 64 hex digits. Only files have a content that can be checked before it runs. */
export async function sha256OfModule(url: URL): Promise<string> {
  if (url.protocol !== 'file:') {
    throw memferryError('INVALID_ARGUMENT', `a guest's module is a file: URL, not ${url.protocol}`);
  }
  try {
    return createHash('sha256')
      .update(await readFile(url))
      .digest('hex');
  } catch (cause) {
    throw memferryError('INVALID_ARGUMENT', `the guest's module ${url.pathname} cannot be read`, { cause });
  }
}
