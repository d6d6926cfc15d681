/** One whole migration between two fresh processes, through the public API. */
import type { MigrationReport, Mode } from 'memferry';
import type { GuestParameters } from './guest-source.js';
import { Peer } from './processes.js';

export interface MigrationFigures {
  report: MigrationReport;
  /** Peaks beyond the region and an idle process. */
  extraBytes: { source: number; destination: number };
}

export async function migrateOnce(parameters: GuestParameters & { mode: Mode }): Promise<MigrationFigures> {
  const { lengthBytes, mode } = parameters;
  const source = Peer.start('support/guest-source');
  const destination = Peer.start('support/guest-destination');
  try {
    const [port] = await Promise.all([
      destination.call<number>('listen'),
      source.call('makeGuest', parameters),
    ]);
    const report = await source.call<MigrationReport>('migrate', { port, mode });
    return {
      report,
      extraBytes: {
        source: await source.call<number>('extraBytes'),
        destination: await destination.call<number>('extraBytes', { lengthBytes }),
      },
    };
  } finally {
    await Promise.all([source.stop(), destination.stop()]);
  }
}
