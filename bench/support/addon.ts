/** The addon itself, for trials that measure the engine below the public API. */
import { createRequire } from 'node:module';
import { join } from 'node:path';
import type { NativeAddon } from '../../lib/native.js';
import { repositoryRoot } from './paths.js';

export function loadAddon(): NativeAddon {
  const require = createRequire(import.meta.url);
  return require(join(repositoryRoot, 'build', 'Release', 'memferry.node')) as NativeAddon;
}
