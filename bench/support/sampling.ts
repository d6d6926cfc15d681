/**
 * Page distribution up to a primed share: guests on hosts of their own (a process each), started from base images, are
 * sampled in the background; VMD servers count; a share is filled.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Distribution, distribute, type SamplingStats, stage, type Staging } from 'memferry';
import { loadAddon } from '../../lib/addon.js';
import type { NativeShare } from '../../lib/native.js';
import { domainKey } from '../../lib/source/dedup-domain.js';
import { Peer } from './processes.js';

const secret = 'the hosts of a trial in a lab of its own';
const domain = 'trial';
const pageBytes = 4096;

export interface FleetOptions {
  hosts: number;
  /** Of each host, one from each image. */
  images: number;
  lengthBytes: number;
  /** Of each guest, the same in all that started from its image. */
  imageBytes: number;
  budgetBytes: number;
  /** As `sampleGuest` has them. */
  cpuShare?: number;
  passIntervalMs?: number;
  servers?: number;
}

export interface HostFigures {
  /** Of one core, by the sampling threads' CPU time, over the time in which they sampled. */
  share: number;
  pagesHashed: number;
}

export interface FleetFigures {
  /** From the first guest's sampling on until every page that is in two guests is in the share. */
  primedMs: number;
  hosts: HostFigures[];
  pagesInShare: number;
  /** All that went over the network for it: reports, pages to servers, pages to the share. */
  bytesOnWire: number;
}

/** A fleet that is being sampled, and a share that is filled from it. */
export class SampledFleet {
  readonly directory = mkdtempSync(join(tmpdir(), 'memferry-share-'));
  readonly sharePath = join(this.directory, 'share');
  readonly domainKey = domainKey(Buffer.from(secret), domain);
  readonly #peers: Peer[] = [];
  readonly #servers: Staging[] = [];
  #share: NativeShare | null = null;
  #distribution: Distribution | null = null;

  constructor(private readonly options: FleetOptions) {}

  async start(): Promise<void> {
    const { hosts, images, lengthBytes, imageBytes, budgetBytes, servers = 2 } = this.options;
    for (let at = 0; at < servers; at++) {
      this.#servers.push(await stage({ secret, memoryBytes: 16 * 2 ** 20 + 12 * images * imageBytes }));
    }
    for (let host = 0; host < hosts; host++) {
      const peer = Peer.start('support/sampled-host');
      this.#peers.push(peer);
      for (let image = 0; image < images; image++) {
        const own = 1000 + host * images + image;
        await peer.call('start', { lengthBytes, imageBytes, image: 1 + image, own });
      }
    }
    this.#share = loadAddon().openShare({
      path: this.sharePath,
      key: this.domainKey,
      budgetBytes,
    });
  }

  /** Until what the images have is in the share, and then for a while longer, so that the rates are those of rest. */
  async prime(longerMs = 0, timeoutMs = 300_000): Promise<FleetFigures> {
    const { images, imageBytes, cpuShare, passIntervalMs } = this.options;
    const share = this.#share as NativeShare;
    const via = this.#servers.map(({ host, port }) => `${host}:${port}`);
    const connection = { via, secret, dedup: { domain } };
    const began = performance.now();
    const sample = { ...connection, ...given({ cpuShare, passIntervalMs }) };
    await Promise.all(this.#peers.map((peer) => peer.call('sample', sample)));
    this.#distribution = await distribute({ native: share }, { ...connection, intervalMs: 1000 });
    const wanted = (images * imageBytes) / pageBytes;
    while (share.stats().pages < wanted) {
      if (performance.now() - began > timeoutMs) {
        throw new Error(`${share.stats().pages} of ${wanted} pages after ${timeoutMs} ms`);
      }
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    const primedMs = performance.now() - began;
    if (longerMs > 0) await new Promise((resolve) => setTimeout(resolve, longerMs));
    const figures = await Promise.all(this.#peers.map((peer) => peer.call<SamplingStats[]>('stats')));
    const sampledMs = performance.now() - began;
    const sum = (of: SamplingStats[], each: (stats: SamplingStats) => number) =>
      of.reduce((total, one) => total + each(one), 0);
    return {
      primedMs,
      hosts: figures.map((of) => ({
        share: sum(of, ({ cpuMs }) => cpuMs) / sampledMs,
        pagesHashed: sum(of, ({ pagesHashed }) => pagesHashed),
      })),
      pagesInShare: share.stats().pages,
      bytesOnWire:
        sum(figures.flat(), ({ bytesOnWire }) => bytesOnWire) + this.#distribution.stats().bytesOnWire,
    };
  }

  async stop(): Promise<void> {
    await this.#distribution?.close();
    this.#share?.close();
    await Promise.all(this.#peers.map((peer) => peer.stop()));
    await Promise.all(this.#servers.map((server) => server.close()));
    rmSync(this.directory, { recursive: true, force: true });
  }
}

function given(options: Record<string, number | undefined>): Record<string, number> {
  return Object.fromEntries(
    Object.entries(options).filter((entry): entry is [string, number] => entry[1] !== undefined),
  );
}
