/**
 * The SQLite guest moves to a host that has its base image, with a log of what was done since: some KB of statements
 * that rewrote tens of MiB. Exactly, and with a replay that diverges on purpose; at 1 Gb/s between network namespaces.
 * Every run ends with both digests compared and the database's own check.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { MigrationReport } from 'memferry';
import { type Host, Lab, labObstacle } from '../lab/namespaces.js';
import { Peer } from '../support/processes.js';
import { paired, type Trial } from '../support/trial.js';

const databaseBytes = 256 * 2 ** 20;
const transactions = 300;
const rows = 4000;
/** Surie et al., opportunistic replay: what it saves of the bytes. */
const reachPercent = 80.5;

interface Figures {
  report: MigrationReport;
  logBytes: number;
  /** Of the guest's pages, as a base without replay would have them. */
  equal: boolean;
}

const kinds = ['exact', 'diverging', 'base-alone', 'plain'] as const;
type Kind = (typeof kinds)[number];

export async function run(trial: Trial): Promise<void> {
  const obstacle = labObstacle();
  if (obstacle !== null) {
    trial.skip('1gbit', obstacle);
    return;
  }
  const lab = Lab.open({ hosts: 2, rate: '1gbit' });
  try {
    const [a, b] = lab.hosts as [Host, Host];
    const all = new Map<Kind, Figures[]>(kinds.map((kind) => [kind, []]));
    for (let round = trial.samples(3); round > 0; round--) {
      for (const kind of kinds) all.get(kind)?.push(await move(a, b, kind));
    }
    const of = (kind: Kind): Figures[] => all.get(kind) as Figures[];
    const plain = of('plain');
    for (const kind of ['exact', 'diverging', 'base-alone'] as const) {
      const figures = of(kind);
      const saved = figures.map(({ report, logBytes }, i) => {
        const sent = report.bytesOnWire + (report.base?.bytesExchanged ?? 0) + logBytes;
        return 100 * (1 - sent / (plain[i] as Figures).report.bytesOnWire);
      });
      const bases = figures.map(({ report }) => report.base);
      trial.report(
        `${kind}-saved`,
        '%',
        saved.map((value) => ({ value, floor: null })),
        kind === 'base-alone'
          ? null
          : { words: `at least ${reachPercent} %`, met: ({ value }) => value >= reachPercent },
        `log ${figures.map(({ logBytes }) => logBytes).join(', ')} bytes; replay ${bases
          .map((base) => base?.replayMs.toFixed(0))
          .join(', ')} ms; pages sent ${figures.map(({ report }) => report.pagesSent).join(', ')}`,
      );
      trial.report(
        `${kind}-equal`,
        'of 1',
        figures.map(({ equal }) => ({ value: equal ? 1 : 0, floor: null })),
        { words: 'the state equal to the byte', met: () => figures.every(({ equal }) => equal) },
      );
      trial.report(
        `${kind}-total`,
        'ms',
        paired(
          figures.map(({ report }) => report.totalMs),
          plain.map(({ report }) => report.totalMs),
        ),
        null,
      );
    }
  } finally {
    lab.close();
  }
}

async function move(from: Host, to: Host, kind: Kind): Promise<Figures> {
  const directory = mkdtempSync(join(tmpdir(), 'memferry-replay-'));
  const source = Peer.start('support/base-host', { namespace: from.namespace });
  const destination = Peer.start('support/base-host', { namespace: to.namespace });
  try {
    await source.call('makeSqlite', { databaseBytes, directory });
    const log = await source.call<string>('work', { transactions, rows });
    const port = await destination.call<number>('listen', {
      host: to.address,
      directory,
      diverge: kind === 'diverging',
    });
    const contents = {
      op: 'all',
      sql: 'SELECT count(*), sum(length(note)), max(note), (SELECT sum(length(data)) FROM filler), (SELECT max(hex(substr(data, 1, 64))) FROM filler) FROM accounts',
    };
    const before = JSON.stringify(await source.call('ask', { request: contents }));
    const report = await source.call<MigrationReport>('migrate', {
      to: { host: to.address, port },
      mode: 'hybrid',
      base: kind === 'plain' ? 'off' : 'always',
      ...(kind === 'exact' || kind === 'diverging' ? { log } : {}),
    });
    await destination.call('arrived');
    const after = JSON.stringify(await destination.call('ask', { request: contents }));
    const checks = await destination.call<string[]>('ask', { request: { op: 'integrity' } });
    const equal = report.verified === true && after === before && checks[0] === 'ok';
    const logBytes = kind === 'exact' || kind === 'diverging' ? Buffer.byteLength(log) : 0;
    return { report, logBytes, equal };
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
    rmSync(directory, { recursive: true, force: true });
  }
}
