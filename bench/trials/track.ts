/**
 * Scan and re-arm of 1 GiB through a tracker, against the bare PAGEMAP_SCAN; and what the first write to a
 * page costs its writer while the tracker watches, against bare asynchronous write-protection.
 */
import { loadAddon } from '../support/addon.js';
import { shuffledPages } from '../support/memory.js';
import { runFloor } from '../support/processes.js';
import { atMostTimesFloor } from '../support/result.js';
import { median } from '../support/statistics.js';
import { interleave, type Trial } from '../support/trial.js';

const lengthBytes = 2 ** 30;
const tracker = 'uffd-wp-async';
/** The median of so many scans is one sample, on both sides. */
const scans = 11;

export async function run(trial: Trial): Promise<void> {
  const addon = loadAddon();
  const probe = addon.probeTrackers().find((entry) => entry.name === tracker);
  if (probe === undefined || !probe.available) {
    trial.skip(tracker, probe?.reason ?? 'not in this build');
    return;
  }
  const region = addon.allocate(lengthBytes);
  const words = new Uint32Array(region.buffers()[0] as ArrayBuffer);
  const pages = region.pages();
  const wordsPerPage = region.pageSize / words.BYTES_PER_ELEMENT;
  const writeAll = (): void => {
    for (let at = 0; at < words.length; at += wordsPerPage) words[at] = (words[at] as number) + 1;
  };
  writeAll();
  const tracked = addon.makeTracker(tracker, region, 'anywhere', false);
  tracked.arm();

  const cases: { name: string; dirty: number }[] = [
    { name: 'clean', dirty: 0 },
    { name: 'dirty-1-percent-scattered', dirty: Math.floor(pages / 100) },
    { name: 'all-dirty', dirty: pages },
  ];
  let seed = 1;
  for (const { name, dirty } of cases) {
    const ours = (): number => {
      const figures: number[] = [];
      for (let i = 0; i < scans; i++) {
        if (dirty === pages) {
          writeAll();
        } else {
          for (const page of shuffledPages(pages, seed++).subarray(0, dirty))
            words[page * wordsPerPage] = seed;
        }
        const start = process.hrtime.bigint();
        const runs = tracked.collect();
        figures.push(Number(process.hrtime.bigint() - start) / 1e6);
        let found = 0;
        for (let run = 1; run < runs.length; run += 2) found += runs[run] as number;
        if (found !== dirty) throw new Error(`wrote ${dirty} pages, the tracker found ${found}`);
      }
      return median(figures);
    };
    const floor = async (): Promise<number> => {
      const args = ['--bytes', lengthBytes, '--dirty', dirty === pages ? 'all' : dirty, '--scans', scans];
      return median((await runFloor<{ scanMs: number[] }>('scan_floor', args)).scanMs);
    };
    tracked.collect();
    trial.report(
      `scan-${name}`,
      'ms',
      await interleave(trial.samples(5), ours, floor),
      atMostTimesFloor(1.2, 'the bare ioctl'),
    );
  }

  const slowdown = (): number => {
    const figures: number[] = [];
    for (let i = 0; i < scans; i++) {
      tracked.collect();
      const start = process.hrtime.bigint();
      writeAll();
      figures.push(Number(process.hrtime.bigint() - start) / pages);
    }
    return median(figures);
  };
  const floorOf = (writer: 'tracked' | 'free') => async (): Promise<number> => {
    const args = ['--bytes', lengthBytes, '--writer', writer, '--scans', scans];
    return median((await runFloor<{ nsPerPage: number[] }>('scan_floor', args)).nsPerPage);
  };
  const untracked = await floorOf('free')();
  trial.report(
    'writer-first-write-to-a-page',
    'ns',
    await interleave(trial.samples(5), slowdown, floorOf('tracked')),
    atMostTimesFloor(1.2, 'the bare ioctl'),
    `${untracked.toFixed(0)} ns where nothing is tracked`,
  );
  tracked.close();
  region.close();
}
