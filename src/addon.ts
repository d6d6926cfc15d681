/**
 * Finds and loads the native addon, once and not before something needs it: importing memferry works on every
 * system, and each call that needs the addon says what is missing.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { isMainThread } from 'node:worker_threads';

import { memferryError } from './errors.js';
import type { NativeAddon } from './native.js';

const packageRoot = join(dirname(fileURLToPath(import.meta.url)), '..');

/** Where a build leaves the addon: node-gyp's two configurations. */
const BUILT = ['build/Release/memferry.node', 'build/Debug/memferry.node'];

let loaded: NativeAddon | null = null;

/**
 * The addon. Throws UNSUPPORTED_PLATFORM on a system other than Linux, ADDON_MISSING when it is not built or
 * does not load. MEMFERRY_ADDON in the environment names another build of it (cmake-js's, a sanitizer's).
 */
export function loadAddon(): NativeAddon {
  if (loaded === null) {
    const fresh = load(process.platform, process.env['MEMFERRY_ADDON']);
    process.once('exit', () => {
      fresh.closeEngines();
      if (isMainThread) fresh.retireAllRegions();
    });
    loaded = fresh;
  }
  return loaded;
}

/** Exported for its tests; use `loadAddon()`. */
export function load(platform: string, override: string | undefined): NativeAddon {
  if (platform !== 'linux') {
    throw memferryError(
      'UNSUPPORTED_PLATFORM',
      `memferry needs Linux (x86-64 or arm64): it moves memory with userfaultfd and PAGEMAP_SCAN, which ` +
        `${platform} does not have`,
      { facts: { platform } },
    );
  }
  const tried = override ? [override] : BUILT.map((path) => join(packageRoot, path));
  const path = tried.find((candidate) => existsSync(candidate));
  if (path === undefined) {
    throw memferryError(
      'ADDON_MISSING',
      `the native addon is not built: run "npm run build:addon" in ${packageRoot} (or "npm rebuild memferry" ` +
        `in the package that depends on it); it needs a C++20 compiler, make, Python 3 and the headers of xxHash, lz4 and zstd`,
      { facts: { tried } },
    );
  }
  try {
    return createRequire(import.meta.url)(path) as NativeAddon;
  } catch (cause) {
    throw memferryError(
      'ADDON_MISSING',
      `the native addon ${path} does not load (${cause instanceof Error ? cause.message : String(cause)}): ` +
        `build it again with "npm run build:addon"`,
      { cause, facts: { path } },
    );
  }
}
