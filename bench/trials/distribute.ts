/**
 * Popular pages at the destination before the guests come (Qazi et al.): eight guests of four hosts, that began as one of
 * two images of real programs and have made a fifth of it their own, move to a host whose page share was primed with
 * these images. What they send, over their own pages; the same in turns without a share as a check.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type DistributionStats, type MigrationReport, type Mode, type SamplingStats, stage } from 'memferry';
import type { Primed } from '../support/distribute-destination.js';
import type { Leaving, Made, OwnedGuest } from '../support/distribute-source.js';
import { repositoryRoot } from '../support/paths.js';
import { Peer } from '../support/processes.js';
import { writePythonHeap, writeSqliteHeap } from '../support/real-heaps.js';
import { atMost } from '../support/result.js';
import type { Trial } from '../support/trial.js';

const hosts = 4;
const guestsAHost = 2;
/** Pages in a thousand of a guest that are not as in its image. */
const own = 200;
const pageBytes = 4096;
/** Of each guest: eight at once share a link of 2 Gb/s. Loopback itself is faster than any hash. */
const bandwidth = 32e6;
const budgetBytes = 512 * 2 ** 20;
const domain = 'distribute';
/** Of each VMD server that counts. */
const memoryBytes = 1024 * 2 ** 20;
const longestPrimeMs = 240_000;
const modes: Mode[] = ['pre-copy', 'post-copy'];

export async function run(trial: Trial): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'memferry-distribute-'));
  try {
    const images = [join(folder, 'sqlite'), join(folder, 'python')];
    await writeSqliteHeap(join(repositoryRoot, 'node_modules'), images[0] as string);
    await writePythonHeap(images[1] as string);
    for (const mode of modes) {
      const samples: { value: number; floor: null }[] = [];
      const notes: string[] = [];
      for (let sample = 0; sample < trial.samples(3); sample++) {
        const figures = await distribute(images, mode);
        samples.push({ value: figures.bytes / figures.ownBytes, floor: null });
        const percent = (pages: number): string => ((100 * pages) / figures.content).toFixed(1);
        notes.push(
          `${percent(figures.referred)} % as references, ${percent(figures.looked)} % looked at, ` +
            `${figures.refused} refused, ${figures.cpuMs.toFixed(0)} ms of hashing`,
        );
      }
      trial.report(
        `${mode}, bytes`,
        'times own pages',
        samples,
        atMost(1.05, 'times own pages'),
        notes.join('; '),
      );
    }
    await reportSampled(trial, images);
  } finally {
    rmSync(folder, { recursive: true });
  }
}

/** The same, but for the share: nobody has primed it, but what the guests have in common was found and brought there. */
async function reportSampled(trial: Trial, images: string[]): Promise<void> {
  const all: (Figures & Sampled)[] = [];
  for (let sample = 0; sample < trial.samples(1); sample++) {
    const servers = [await stage({ memoryBytes }), await stage({ memoryBytes })];
    try {
      const via = servers.map(({ host, port }) => `${host}:${port}`);
      const sampled: Sampled = { cpuPercent: 0, primedMs: 0 };
      const figures = await distribute(images, 'pre-copy', async (sources, destination) => {
        Object.assign(sampled, await findAndBring(via, sources, destination));
      });
      all.push({ ...figures, ...sampled });
    } finally {
      await Promise.all(servers.map((server) => server.close()));
    }
  }
  const samples = (of: (figures: Figures & Sampled) => number) =>
    all.map((figures) => ({ value: of(figures), floor: null }));
  trial.report(
    'sampling, the busiest host',
    '% of a core',
    samples(({ cpuPercent }) => cpuPercent),
    atMost(2, '% of a core'),
  );
  trial.report(
    'sampling, until the share has it all',
    's',
    samples(({ primedMs }) => primedMs / 1000),
    null,
  );
  // What one guest alone has left as it was in its image is no part of the share: some 3 % of its own.
  trial.report(
    'sampled, bytes',
    'times own pages',
    samples(({ bytes, ownBytes }) => bytes / ownBytes),
    atMost(1.1, 'times own pages'),
  );
}

interface Sampled {
  /** Of one core, on the host where the sampling threads took most. */
  cpuPercent: number;
  primedMs: number;
}

/** Until the share has not grown for a while, though every guest was gone over again. */
async function findAndBring(via: string[], sources: Peer[], destination: Peer): Promise<Sampled> {
  const began = performance.now();
  await Promise.all(sources.map((source) => source.call('sample', { via, domain })));
  await destination.call('spread', { via, domain });
  const passes = async (): Promise<number> => {
    const stats = await Promise.all(sources.map((source) => source.call<SamplingStats[]>('sampled')));
    return Math.min(...stats.flat().map((each) => each.passes));
  };
  let grown = { atMs: began, pages: 0, passes: 0 };
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    const { pagesHeld } = await destination.call<DistributionStats>('spreading');
    const now = performance.now();
    if (pagesHeld > grown.pages) grown = { atMs: now, pages: pagesHeld, passes: await passes() };
    else if (grown.pages > 0 && now - grown.atMs > 5000 && (await passes()) >= grown.passes + 2) break;
    if (now - began > longestPrimeMs) throw new Error(`the share still grows: ${grown.pages} pages`);
  }
  const figures = await Promise.all(sources.map((source) => source.call<SamplingStats[]>('sampled')));
  const cpuMs = figures.map((host) => host.reduce((sum, each) => sum + each.cpuMs, 0));
  return {
    cpuPercent: (100 * Math.max(...cpuMs)) / (performance.now() - began),
    primedMs: grown.atMs - began,
  };
}

interface Figures {
  bytes: number;
  ownBytes: number;
  /** Pages that are not zeros. */
  content: number;
  referred: number;
  looked: number;
  refused: number;
  cpuMs: number;
}

/** `prime`: how the share gets what the guests have in common; without it, it has the images from the beginning. */
async function distribute(
  images: string[],
  mode: Mode,
  prime?: (sources: Peer[], destination: Peer) => Promise<void>,
): Promise<Figures> {
  const destination = Peer.start('support/distribute-destination');
  const sources = Array.from({ length: hosts }, () => Peer.start('support/distribute-source'));
  const file = join('/dev/shm', `memferry-distribute-${process.pid}`);
  try {
    const primed: Primed = { domain, file, budgetBytes, images: prime ? [] : images };
    await destination.call('prime', primed);
    const port = await destination.call<number>('listen', { domain, file });
    const figures: Figures = {
      bytes: 0,
      ownBytes: 0,
      content: 0,
      referred: 0,
      looked: 0,
      refused: 0,
      cpuMs: 0,
    };
    const leaving: { source: Peer; name: string }[] = [];
    for (const [host, source] of sources.entries()) {
      for (let guest = 0; guest < guestsAHost; guest++) {
        const name = `guest-${host}-${guest}`;
        const seed = 1 + host * guestsAHost + guest;
        const owned: OwnedGuest = { name, image: images[guest % images.length] as string, own, seed };
        figures.ownBytes += (await source.call<Made>('make', owned)).ownPages * pageBytes;
        leaving.push({ source, name });
      }
    }
    await prime?.(sources, destination);
    const reports = await Promise.all(
      leaving.map(({ source, name }) => {
        const parameters: Leaving = { name, port, mode, bandwidth, domain };
        return source.call<MigrationReport>('leave', parameters);
      }),
    );
    for (const { bytesOnWire, pagesSent, dedup } of reports) {
      figures.bytes += bytesOnWire;
      figures.content += pagesSent + (dedup?.pagesDeduplicated ?? 0);
      figures.referred += dedup?.pagesDeduplicated ?? 0;
      figures.looked += dedup?.pagesHashed ?? 0;
      figures.refused += dedup?.refused ?? 0;
      figures.cpuMs += dedup?.cpuMs ?? 0;
    }
    return figures;
  } finally {
    await destination.call('end').catch(() => {});
    await Promise.all([destination, ...sources].map((peer) => peer.stop()));
  }
}
