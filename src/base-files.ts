/**
 * Bases in files: a guest as it was at some moment, for a destination to start from. A directory holds one base for
 * each guest: its regions as raw images (byte n of the file is byte n of the region), what was offered of it, and its
 * execution state, with which it can be run again to replay a log. Each is written into a folder of its own, and a link
 * of the guest's name is put over the former one's when it is whole: a reader finds one or the other, whoever writes at
 * the same time, and whenever a writer is killed. What such a one leaves goes with the next base of that guest.
 */
import { createHash, randomUUID } from 'node:crypto';
import {
  lstat,
  mkdir,
  open,
  readdir,
  readlink,
  realpath,
  rename,
  rm,
  symlink,
  writeFile,
} from 'node:fs/promises';
import { basename, join } from 'node:path';
import { z } from 'zod';
import { fromNative, MemferryError, nativeAsync } from './errors.js';
import type { Guest, GuestOffer, PausedGuest, RegionBase } from './guest.js';
import { lineageOf, mayBeBase } from './lineage.js';
import { bytes as byteCount, milliseconds, parse, type Same, uint8Array } from './options/fields.js';
import { throwIfCancelled, untilAborted } from './protocol/bounded.js';
import { offerSchema } from './protocol/messages.js';
import { readRegularFile } from './regular-file.js';
import { requireGuest } from './source/check-guest.js';
import { claimRegions } from './source/claim-regions.js';
import { Alarm } from './protocol/timers.js';
import { describeGuest } from './source/stage-image.js';
import { warn } from './tell-listeners.js';

/** Where a base is written, and how large it may be. */
export interface BaseFilesOptions {
  /** A directory of its own; made, mode 0700, where there is none. It has one base for each guest. */
  directory: string;
  /** A guest with more memory than this is not written. */
  maxBytes: number;
}

const optionsSchema = z.strictObject({ directory: z.string().min(1), maxBytes: byteCount });

/** What `saveBase` takes. */
export interface SaveBaseOptions extends BaseFilesOptions {
  /** Aborting it lets the guest run on, and nothing is written. */
  signal?: AbortSignal;
  /**
   * How long the guest may be held, from asking it to pause until it is written, in ms: PAUSE_TIMEOUT, and it runs on.
   * Default 600 000.
   */
  pauseTimeoutMs?: number;
}

const saveSchema = optionsSchema.extend({
  signal: z.instanceof(AbortSignal).optional(),
  pauseTimeoutMs: milliseconds.default(600_000),
});
true satisfies Same<z.input<typeof saveSchema>, SaveBaseOptions>;

const wanted = z.looseObject({
  name: z.string().min(1),
  module: z.looseObject({ name: z.string(), sha256: z.string() }).nullable(),
  lineage: uint8Array.optional(),
});

/** What `readBase` finds. */
export interface BaseFiles {
  /** As the guest was offered then. */
  offer: GuestOffer;
  /** The execution state, with which it can be run again to replay a log. */
  state: Uint8Array;
  /** In the order of the regions, as `ArrivingGuest.bases` takes them. */
  bases: RegionBase[];
}

const manifestSchema = z.strictObject({
  version: z.literal(1),
  /** Of the guest; who cannot show it gets nothing of the base. */
  lineage: z.string().regex(/^[0-9a-f]{64}$/),
  guest: offerSchema.shape.guest,
});
/** Written at a time: some ms. */
const piecePages = 2048;
const mostManifestBytes = 2 ** 20;
/** As much as a destination takes by default, several times. */
const mostStateBytes = 2 ** 30;
/** What has not been touched for so long was left by a writer that ended, whatever is known of its process here. */
const leftMs = 3_600_000;
/** Names of folders that this process is writing. */
const writing = new Set<string>();

/** A guest's name may come from a peer: nothing of it may be a path. */
function folderOf(directory: string, guest: string): string {
  const readable = guest.replace(/[^A-Za-z0-9_-]/g, '_');
  const exact = createHash('sha256').update(guest).digest('hex').slice(0, 16);
  return join(directory, `${readable}-${exact}`);
}

const imageIn = (folder: string, index: number) => join(folder, `${index}.image`);

/** Writes a paused guest, or one that has left. @throws INVALID_ARGUMENT, LIMIT_EXCEEDED, SYSTEM, PAGES_LOST */
export async function writeBase(
  guest: Guest,
  { state, stillPaused }: Pick<PausedGuest, 'state' | 'stillPaused'>,
  options: BaseFilesOptions,
  signal: AbortSignal = new AbortController().signal,
): Promise<void> {
  const regions = guest.regions.map(({ region }) => region);
  const lengths = regions.map((region) => region.lengthBytes);
  const bytes = lengths.reduce((sum, length) => sum + length, 0);
  const { directory, maxBytes } = options;
  if (bytes > maxBytes) {
    throw new MemferryError('LIMIT_EXCEEDED', `the guest has ${bytes} bytes; ${maxBytes} may be kept`, {
      facts: { bytes, limit: maxBytes },
    });
  }
  const folder = folderOf(directory, guest.name);
  const made = `${folder}.${process.pid}.${randomUUID()}`;
  const link = `${made}.link`;
  writing.add(basename(made));
  try {
    // Others may not read what a guest had in memory.
    await mkdir(directory, { recursive: true, mode: 0o700 });
    await removeLeftovers(directory, folder);
    await mkdir(made, { mode: 0o700 });
    for (const [index, region] of regions.entries()) {
      const path = imageIn(made, index);
      const file = await open(path, 'wx', 0o600);
      await file.truncate(lengths[index]).finally(() => file.close());
      for (let first = 0; first < region.pages; first += piecePages) {
        throwIfCancelled(signal);
        const count = Math.min(piecePages, region.pages - first);
        await nativeAsync(() => region.native.save(path, first, count));
      }
    }
    await writeFile(join(made, 'state'), state, { mode: 0o600 });
    await untilAborted(Promise.resolve(stillPaused?.()), signal);
    const lineage = Buffer.from(lineageOf(regions)).toString('hex');
    const manifest = { version: 1, lineage, guest: describeGuest(guest, lengths) };
    await writeFile(join(made, 'base.json'), JSON.stringify(manifest), { mode: 0o600 });
    await symlink(basename(made), link);
    const former = await readlink(folder).catch(() => null);
    await rename(link, folder).catch(async (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EISDIR') throw error;
      // A folder where the link is to be.
      await rm(folder, { recursive: true });
      await rename(link, folder);
    });
    if (former !== null) await rm(join(directory, former), { recursive: true, force: true }).catch(() => {});
  } catch (error) {
    await rm(made, { recursive: true, force: true }).catch(() => {});
    throw writeFailed(error, directory);
  } finally {
    writing.delete(basename(made));
    await rm(link, { force: true }).catch(() => {});
  }
}

/** Of this guest: what the link does not lead to, and nobody may be writing any more, here or on another host. */
async function removeLeftovers(directory: string, folder: string): Promise<void> {
  for (const name of await readdir(directory)) {
    const [, written, pid] = /^(.*\.(\d+)\.[0-9a-f-]{36})(?:\.link)?$/.exec(name) ?? [];
    if (!written?.startsWith(`${basename(folder)}.`) || writing.has(written)) continue;
    const path = join(directory, name);
    const ours = Number(pid) === process.pid;
    if (!ours && (isAlive(Number(pid)) || (await ageMs(path)) < leftMs)) continue;
    // Now: it may have become the base meanwhile.
    if ((await readlink(folder).catch(() => null)) === written) continue;
    await rm(path, { recursive: true, force: true });
  }
}

async function ageMs(path: string): Promise<number> {
  return lstat(path).then(
    ({ mtimeMs }) => Date.now() - mtimeMs,
    () => 0, // somebody else has removed it
  );
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'ESRCH';
  }
}

/** What the guest itself says (`stillPaused`) passes unchanged. */
function writeFailed(error: unknown, directory: string): unknown {
  if (error instanceof MemferryError || typeof Object(error).syscall !== 'string') return error;
  const { facts, message } = fromNative(error);
  return new MemferryError('SYSTEM', `no base can be written to ${directory}: ${message}`, {
    cause: error,
    facts,
  });
}

/**
 * The base of the guest that is offered, or null when there is none that can be used. Whoever offers a guest learns
 * what equals its base, so a base is for the same guest only: the same name, module and lineage. `anySource`: the
 * lineage does not matter. Any host with the shared secret can have the base then (docs/security.md).
 * @throws INVALID_ARGUMENT
 */
export async function readBase(
  directory: string,
  offer: Pick<GuestOffer, 'name' | 'module' | 'lineage'>,
  options: { anySource?: boolean | undefined } = {},
): Promise<BaseFiles | null> {
  if (typeof directory !== 'string' || directory === '')
    throw new MemferryError('INVALID_ARGUMENT', 'readBase: expected the path of a directory');
  parse(wanted, offer, 'readBase: offer');
  const { anySource = false } = Object(options) as typeof options;
  try {
    // Once: what is read and filled from here on is all of one base, or not there any more.
    const folder = await realpath(folderOf(directory, offer.name));
    const manifest = await readRegularFile(join(folder, 'base.json'), mostManifestBytes);
    const { guest, lineage } = manifestSchema.parse(JSON.parse(manifest.toString('utf8')));
    const known = { name: guest.name, module: guest.module, lineage: Buffer.from(lineage, 'hex') };
    if (!mayBeBase(known, offer, { anySource })) return null;
    const { buffer, byteOffset, byteLength } = await readRegularFile(join(folder, 'state'), mostStateBytes);
    const state = new Uint8Array(buffer, byteOffset, byteLength);
    const bases = guest.regions.map((_, index) => ({ path: imageIn(folder, index) }));
    return { offer: { ...guest, description: guest.description }, state, bases };
  } catch {
    return null;
  }
}

/**
 * A base of a guest that runs here: pauses it, writes it, and lets it run on. `pauseMs`: how long it stood.
 * @throws what `pause` throws, INVALID_ARGUMENT, GUEST_BUSY (it has left), REGION_CLOSED, REGION_BUSY (it is moving),
 * LIMIT_EXCEEDED, SYSTEM, PAUSE_TIMEOUT, CANCELLED
 */
export async function saveBase(guest: Guest, options: SaveBaseOptions): Promise<{ pauseMs: number }> {
  const { pauseTimeoutMs, signal: given, ...where } = parse(saveSchema, options, 'saveBase');
  requireGuest(guest);
  throwIfCancelled(given);
  const started = performance.now();
  const release = claimRegions(guest);
  const limit = new AbortController();
  const signal = given ? AbortSignal.any([given, limit.signal]) : limit.signal;
  const alarm = new Alarm(pauseTimeoutMs, () =>
    limit.abort(
      new MemferryError('PAUSE_TIMEOUT', `guest '${guest.name}' was held for ${pauseTimeoutMs} ms`),
    ),
  );
  try {
    const paused = await pauseOrLeave(guest, signal, release);
    try {
      await writeBase(guest, paused instanceof Uint8Array ? { state: paused } : paused, where, signal);
    } finally {
      try {
        await guest.unpause();
      } finally {
        release();
      }
    }
  } finally {
    alarm.stop();
  }
  return { pauseMs: performance.now() - started };
}

/** A pause that was given up may succeed all the same: until that is known nobody else may move the guest. */
async function pauseOrLeave(
  guest: Guest,
  signal: AbortSignal,
  release: () => void,
): Promise<Uint8Array | PausedGuest> {
  const pausing = (async () => guest.pause({ signal }))();
  let failed = false;
  pausing.catch(() => {
    failed = true;
    release();
  });
  try {
    return await untilAborted(pausing, signal);
  } catch (error) {
    if (!failed) {
      pausing
        .then(
          async () => guest.unpause(),
          () => {}, // it never stood
        )
        .catch((cause) => warn(`guest '${guest.name}' may stand`, cause, 'MEMFERRY_UNPAUSE_FAILED'))
        .finally(release);
    }
    throw error;
  }
}

/**
 * The copy that a source keeps of a guest that has left. A disk that is full costs the copy, never the migration,
 * which is over: a warning says so.
 */
export async function keepStaleCopy(
  guest: Guest,
  state: Uint8Array,
  options: BaseFilesOptions,
): Promise<boolean> {
  try {
    await writeBase(guest, { state }, options);
    return true;
  } catch (error) {
    process.emitWarning(`no stale copy of guest '${guest.name}' was kept: ${String(error)}`, {
      code: 'MEMFERRY_NO_STALE_COPY',
    });
    return false;
  }
}
