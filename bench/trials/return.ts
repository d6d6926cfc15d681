/**
 * A guest comes back to a host that kept a stale copy of it, with a fifth of its pages changed. Between network
 * namespaces at 1 Gb/s and over loopback at full speed; the floor is the same trip without a base, right before or
 * after. Also with nothing alike any more: then the base must cost nothing.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { MigrationReport, Mode } from 'memferry';
import { type Host, Lab, labObstacle } from '../lab/namespaces.js';
import { Peer } from '../support/processes.js';
import { atMost, atMostTimesFloor } from '../support/result.js';
import { paired, type Trial } from '../support/trial.js';

const lengthBytes = 512 * 2 ** 20;

interface Places {
  a: { namespace: string | null; address: string };
  b: { namespace: string | null; address: string };
}

const loopback: Places = {
  a: { namespace: null, address: '127.0.0.1' },
  b: { namespace: null, address: '127.0.0.1' },
};

export async function run(trial: Trial): Promise<void> {
  const obstacle = labObstacle();
  if (obstacle === null) {
    const lab = Lab.open({ hosts: 2, rate: '1gbit' });
    try {
      const [a, b] = lab.hosts as [Host, Host];
      await measure(trial, '1gbit', { a, b }, 3, 1.02);
    } finally {
      lab.close();
    }
  } else {
    trial.skip('1gbit', obstacle);
  }
  // A second of sending has no room for a second look at anything: it steps aside.
  await measure(trial, 'loopback', loopback, 5, 1.05);
}

async function measure(
  trial: Trial,
  name: string,
  places: Places,
  samples: number,
  cost: number,
): Promise<void> {
  for (const mode of ['hybrid', 'post-copy'] as const) {
    for (const percent of [20, 100]) {
      const based: MigrationReport[] = [];
      const plain: MigrationReport[] = [];
      for (let round = trial.samples(samples); round > 0; round--) {
        const directory = mkdtempSync(join(tmpdir(), 'memferry-return-'));
        try {
          const both = [
            async () => based.push(await back(places, mode, percent, directory, 'auto')),
            async () => plain.push(await back(places, mode, percent, directory, 'off')),
          ];
          for (const one of round % 2 === 0 ? both : both.reverse()) await one();
        } finally {
          rmSync(directory, { recursive: true, force: true });
        }
      }
      const label = `${name}-${mode}-${percent}`;
      const bytes = based.map(
        ({ bytesOnWire, heapBytes, base }) => (100 * (bytesOnWire + hashBytes(base))) / heapBytes,
      );
      const bases = based.map(({ base }) => base);
      const notes =
        `${bases.map((base) => `${base?.reason} after ${(base?.waitMs ?? 0).toFixed(0)}+${(base?.compareMs ?? 0).toFixed(0)} ms`).join(', ')}; ` +
        `CPU ${bases.map((base) => `${base?.sourceCpuMs.toFixed(0)}+${base?.destinationCpuMs.toFixed(0)}`).join(', ')} ms`;
      trial.report(
        `${label}-bytes`,
        '%',
        bytes.map((value) => ({ value, floor: null })),
        name === '1gbit' && percent === 20 ? atMost(22, '% of the heap') : null,
        notes,
      );
      const times = (all: MigrationReport[]) => all.map(({ totalMs }) => totalMs);
      trial.report(
        `${label}-total`,
        'ms',
        paired(times(based), times(plain)),
        atMostTimesFloor(percent === 20 && name === '1gbit' ? 0.35 : cost, 'the same without a base'),
      );
      trial.report(
        `${label}-downtime`,
        'ms',
        paired(
          based.map(({ downtimeMs }) => downtimeMs),
          plain.map(({ downtimeMs }) => downtimeMs),
        ),
        null,
      );
    }
  }
}

/** What came the other way; what went with the pages is counted there. */
function hashBytes(base: MigrationReport['base']): number {
  return base?.bytesExchanged ?? 0;
}

/** There and back; the report of the way back. */
async function back(
  places: Places,
  mode: Mode,
  percent: number,
  directory: string,
  base: 'auto' | 'off',
): Promise<MigrationReport> {
  const a = Peer.start('support/base-host', { namespace: places.a.namespace });
  const b = Peer.start('support/base-host', { namespace: places.b.namespace });
  try {
    const [portB] = await Promise.all([
      b.call<number>('listen', { host: places.b.address, directory: null }),
      a.call('makePlain', { lengthBytes }),
    ]);
    await a.call('migrate', {
      to: { host: places.b.address, port: portB },
      mode: 'stop-and-copy',
      keepStaleCopy: { directory, maxBytes: lengthBytes },
    });
    await b.call('arrived');
    await b.call('change', { percent });
    await a.call('forget');
    const port = await a.call<number>('listen', { host: places.a.address, directory });
    return await b.call<MigrationReport>('migrate', { to: { host: places.a.address, port }, mode, base });
  } finally {
    await Promise.all([a.stop(), b.stop()]);
  }
}
