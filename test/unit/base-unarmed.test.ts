/** Memory that no tracker can watch has no comparison with a base, and moves all the same. */
import { afterEach, expect, test, vi } from 'vitest';
import { DirtyTracker, type Guest, listen, migrate, Region } from '../../lib/index.js';

afterEach(() => vi.restoreAllMocks());

test.each(['post-copy', 'stop-and-copy'] as const)(
  '%s: a tracker that cannot be armed, and a base',
  async (mode) => {
    vi.spyOn(DirtyTracker.prototype, 'arm').mockImplementation(() => {
      throw new Error('not this memory');
    });
    const lengthBytes = 300 * 4096;
    const here = Region.allocate({ lengthBytes });
    const there = Region.allocate({ lengthBytes });
    const [view] = here.views as [Uint8Array];
    view.fill(7);
    (there.views[0] as Uint8Array).fill(7);
    const guest: Guest = {
      name: 'g',
      regions: [{ name: 'r', region: here }],
      module: null,
      pause: async () => new Uint8Array(0),
      unpause: () => {},
    };
    await using listening = await listen({
      host: '127.0.0.1',
      port: 0,
      accept: async () => ({
        regions: [there],
        bases: [{ fill: async () => {} }],
        prepare: async () => {},
        resume: () => {},
        abandon: () => {},
      }),
    });
    const migration = migrate(guest, { to: `127.0.0.1:${listening.port}`, mode });
    const report = await migration.done;
    expect(report).toMatchObject({ state: 'completed', verified: true });
    expect(report.base).toMatchObject({ used: false, reason: 'no-tracker' });
    expect((there.views[0] as Uint8Array).every((byte) => byte === 7)).toBe(true);
    await migration[Symbol.asyncDispose]();
    here.close();
    there.close();
  },
  20_000,
);
