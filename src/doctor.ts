/** What this machine offers to memferry: the facts behind `memferry doctor`. */
import { arch, release, version } from 'node:os';

import { loadAddon } from './addon.js';
import { native } from './errors.js';
import type { NativeFeature } from './native.js';
import { type TrackerProbe, trackers } from './trackers.js';

/** What this machine offers, as plain data. */
export interface Doctor {
  /** The kernel's release, as `uname -r` says it. */
  kernel: string;
  /** How it was built, as `uname -v` says it. */
  kernelVersion: string;
  /** As Node names it: `x64`, `arm64`. */
  arch: string;
  /** Node's version, `v20.19.0`. */
  node: string;
  /** In bytes. */
  pageSize: number;
  /** Which code hashes pages here. */
  hash: string;
  /** Best first, each tried out just now. */
  trackers: TrackerProbe[];
  /** Of the kernel and of this process, each tried out just now. */
  features: NativeFeature[];
}

/** Tries out what this machine offers: trackers, and features for paging. @throws UNSUPPORTED_PLATFORM, ADDON_MISSING */
export function doctor(): Doctor {
  const addon = loadAddon();
  return {
    kernel: release(),
    kernelVersion: version(),
    arch: arch(),
    node: process.version,
    pageSize: addon.pageSize,
    hash: addon.hashImplementation(),
    trackers: trackers(),
    features: native(() => addon.probeFeatures()),
  };
}
