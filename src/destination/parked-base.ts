/**
 * A parked guest as a base: its pages are read from the VMD, and what the arriving guest has in common with it need not
 * come from the source. Nothing is claimed and nothing dissolved: to the image this is one more reader, who has its
 * secret. It is gathered as by `unpark`, into memory of its own, and copied from there; so it takes that memory once
 * more while it lasts. An image is read for one arrival at a time: its servers take few connections for it, and an
 * `unpark` finds some left. What cannot be read costs the base, not the migration. JavaScript thread.
 */
import { randomBytes } from 'node:crypto';
import { loadAddon } from '../addon.js';
import { MemferryError, native, nativeAsync } from '../errors.js';
import type { RegionBase } from '../guest.js';
import { parseAddress } from '../options.js';
import { untilAborted } from '../protocol/bounded.js';
import { deferred } from '../protocol/deferred.js';
import { encodingFlags, packedByServers } from '../protocol/encodings.js';
import type { ImageInfo } from '../protocol/stage-messages.js';
import { Region } from '../region.js';
import type { ParkTicket } from '../source/park.js';
import type { ImageSetConnection } from '../staging/image-member.js';
import { openParkedImage } from '../staging/image-opening.js';
import { DestinationEngine } from './engine.js';

export interface ParkedBaseConfig {
  connection: ImageSetConnection;
  /** Of the image, at most. */
  maxBytes: number;
  /** For a server that is cut to come back, in ms. */
  recoverTimeoutMs: number;
  /** Bytes a second; 0 for no limit. */
  gatherLimit: number;
}

/** Of these nothing changes any more. */
const final: ReadonlySet<ImageInfo['phase']> = new Set(['parked', 'claimed', 'resumed']);
/** Some ms each, so that it can be called off in between. */
const pieceBytes = 8 * 2 ** 20;
const lookEveryMs = 20;
/** Images that are being read. */
const beingRead = new Set<string>();

/** One reading of a parked image, for one arrival. */
export class ParkedBase {
  readonly #memory = new Map<string, Region>();
  #gathered: Promise<void> | null = null;

  constructor(
    private readonly ticket: ParkTicket,
    private readonly config: ParkedBaseConfig,
  ) {}

  /** For regions of these names; one that the parked guest has not starts from nothing. */
  bases(names: readonly string[]): RegionBase[] {
    return names.map((name) => ({
      fill: async (region, { signal, progress }) => {
        this.#gathered ??= this.#gather(signal, progress);
        await this.#gathered;
        const from = this.#memory.get(name);
        if (from) await copy(from, region, signal);
      },
    }));
  }

  /** Lets go of what was read. Nothing may be filling any more. */
  close(): void {
    for (const region of this.#memory.values()) region.close();
    this.#memory.clear();
  }

  async #gather(signal: AbortSignal, progress: (fraction: number) => void): Promise<void> {
    const { image } = this.ticket;
    if (beingRead.has(image)) {
      throw new MemferryError('VMD_REFUSED', 'the parked image is being read for another arrival', {
        facts: { reason: 'busy' },
      });
    }
    beingRead.add(image);
    try {
      await this.#read(signal, progress);
    } finally {
      beingRead.delete(image);
    }
  }

  async #read(signal: AbortSignal, progress: (fraction: number) => void): Promise<void> {
    const { image, secret } = this.ticket;
    const images = await openParkedImage(
      parseAddress(this.ticket.home),
      { ...this.config.connection, signal },
      { image, secret: Buffer.from(secret, 'hex'), access: 'read' },
    );
    let engine: DestinationEngine | null = null;
    let look: NodeJS.Timeout | undefined;
    try {
      const regions = this.#allocate(images.info);
      const lost = deferred<never>();
      lost.promise.catch(() => {}); // it may be over already
      engine = new DestinationEngine(
        {
          regions: regions.map((region) => region.native),
          migration: Buffer.from(image, 'hex'),
          channels: 1,
          // Nobody dials: there is no source.
          tokens: randomBytes(2 * 32),
          discardFirst: false,
          pagingFromStart: true,
          mayPage: true,
          keepPageHashes: false,
          recoverTimeoutMs: this.config.recoverTimeoutMs,
          lossGraceMs: 250,
          servers: images.servers,
          gatherLimit: this.config.gatherLimit,
          bandwidth: 0,
          sourceless: true,
          encodings: encodingFlags(packedByServers),
        },
        {
          paused: () => {},
          recovered: () => {},
          lost: (_, why) =>
            lost.reject(new MemferryError('PAGES_LOST', `the parked image is not whole: ${why}`)),
          restHere: () => {},
          failed: (error) => lost.reject(error),
        },
      );
      const { receiver } = engine;
      const pages = regions.reduce((sum, region) => sum + region.pages, 0);
      look = setInterval(() => progress(1 - receiver.stats().pagesMissing / pages), lookEveryMs);
      await untilAborted(Promise.race([engine.complete, lost.promise]), signal);
    } finally {
      clearInterval(look);
      engine?.close(new MemferryError('CANCELLED', 'the parked image is not read any more'));
      await images.close();
    }
  }

  #allocate(info: ImageInfo | null): Region[] {
    if (!info || !final.has(info.phase)) {
      throw new MemferryError('VMD_REFUSED', `an image that is ${info?.phase ?? 'not there'} is no base`, {
        facts: { reason: 'not-parked' },
      });
    }
    const { pageSize } = loadAddon();
    const bytes = info.regions.reduce((sum, { pages }) => sum + pages * info.pageSize, 0);
    const { maxBytes } = this.config;
    if (info.pageSize !== pageSize || bytes > maxBytes || info.regions.some(({ pages }) => pages === 0)) {
      throw new MemferryError(
        'LIMIT_EXCEEDED',
        `the parked image has ${bytes} bytes; ${maxBytes} may be read`,
        {
          facts: { bytes, limit: maxBytes },
        },
      );
    }
    return info.regions.map(({ name, pages }) => {
      const region = Region.allocate({ lengthBytes: pages * pageSize });
      this.#memory.get(name)?.close();
      this.#memory.set(name, region);
      return region;
    });
  }
}

async function copy(from: Region, to: Region, signal: AbortSignal): Promise<void> {
  const most = Math.max(1, Math.floor(pieceBytes / to.pageSize));
  const source = native(() => from.native);
  for (let first = 0; first < to.pages && !signal.aborted; first += most) {
    await nativeAsync(() => to.native.fillFrom(source, first, Math.min(most, to.pages - first)));
  }
}
