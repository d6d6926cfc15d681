/**
 * The SQLite guest moves to a host that has its base image, with a log of what was done since: some KB of statements
 * that rewrote tens of MiB. Exactly, and with a replay that diverges on purpose; at 1 Gb/s between network namespaces.
 * And as the source chooses by the rates that it measures: with that log, and with one that takes longer than it is worth.
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
/** After each transaction: half a minute in all. */
const slowRestMs = 100;
/** Surie et al., opportunistic replay: what it saves of the bytes. */
const reachPercent = 80.5;

interface Figures {
  report: MigrationReport;
  logBytes: number;
  /** Of the guest's pages, as a base without replay would have them. */
  equal: boolean;
}

const kinds = ['exact', 'diverging', 'base-alone', 'chosen', 'chosen-slow', 'plain'] as const;
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
    const totals = (kind: Kind): number[] => of(kind).map(({ report }) => report.totalMs);
    for (const kind of ['chosen', 'chosen-slow'] as const) {
      const better = totals('plain').map((ms, i) => Math.min(ms, totals('base-alone')[i] as number));
      const said = of(kind).map(({ report: { base } }) => `${base?.replay} ${base?.replayMs.toFixed(0)} ms`);
      trial.report(
        `${kind}-total`,
        'ms',
        paired(totals(kind), better),
        null,
        `floor: the better of plainly and by the base alone; replay ${said.join(', ')}`,
      );
    }
  } finally {
    lab.close();
  }
}

async function move(from: Host, to: Host, kind: Kind): Promise<Figures> {
  const chooses = kind === 'chosen' || kind === 'chosen-slow';
  const hasLog = kind !== 'plain' && kind !== 'base-alone';
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
      restMs: kind === 'chosen-slow' ? slowRestMs : 0,
    });
    const contents = {
      op: 'all',
      sql: 'SELECT count(*), sum(length(note)), max(note), (SELECT sum(length(data)) FROM filler), (SELECT max(hex(substr(data, 1, 64))) FROM filler) FROM accounts',
    };
    const before = JSON.stringify(await source.call('ask', { request: contents }));
    const report = await source.call<MigrationReport>('migrate', {
      to: { host: to.address, port },
      mode: 'hybrid',
      base: kind === 'plain' ? 'off' : chooses ? 'auto' : 'always',
      ...(hasLog ? { log } : {}),
    });
    await destination.call('arrived');
    const after = JSON.stringify(await destination.call('ask', { request: contents }));
    const checks = await destination.call<string[]>('ask', { request: { op: 'integrity' } });
    const equal = report.verified === true && after === before && checks[0] === 'ok';
    const logBytes = hasLog ? Buffer.byteLength(log) : 0;
    return { report, logBytes, equal };
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
    rmSync(directory, { recursive: true, force: true });
  }
}
