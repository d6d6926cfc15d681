/**
 * Popular pages at the destination before the guests come (Qazi et al.): eight guests of four hosts, that began as one of
 * two images of real programs and have made a fifth of it their own, move to a host whose page share was primed with
 * these images. What they send, over their own pages; the same in turns without a share as a check.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { MigrationReport, Mode } from 'memferry';
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
    // Here: sampling and spreading, that is what primes the share by itself (`sampling, CPU`: at most 2 % of a core).
  } finally {
    rmSync(folder, { recursive: true });
  }
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

async function distribute(images: string[], mode: Mode): Promise<Figures> {
  const destination = Peer.start('support/distribute-destination');
  const sources = Array.from({ length: hosts }, () => Peer.start('support/distribute-source'));
  const file = join('/dev/shm', `memferry-distribute-${process.pid}`);
  try {
    const primed: Primed = { domain, file, budgetBytes, images };
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
