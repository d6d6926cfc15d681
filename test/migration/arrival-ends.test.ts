/**
 * An arrival whose source never says goodbye comes to an end, however it came to be alone: nothing is held of it. One that
 * is closed with its source still there lets that end well.
 */
import { afterEach, describe, expect, test } from 'vitest';
import { arrivalOver } from '../../lib/arrivals.js';
import { type Arrival, type Listening, listen, migrate, Region, stage } from '../../lib/index.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const secret = 'a secret that only this test knows';
const lengthBytes = 4 * 2 ** 20;
const recoverTimeoutMs = 1000;

const open: (() => unknown)[] = [];
afterEach(async () => {
  for (const close of open.splice(0).reverse()) await close();
  await closeProxies();
});

/** At the source: nothing writes its memory. */
function still() {
  const region = Region.allocate({ lengthBytes });
  for (const view of region.views) view.fill(7);
  return {
    ...{ name: 'still', module: null, regions: [{ name: 'memory', region }] },
    ...{ pause: async () => Buffer.from('state'), unpause: () => {} },
  };
}

/** At the destination. */
function received(bytes: number) {
  const region = Region.allocate({ lengthBytes: bytes });
  return {
    regions: [region],
    ...{ prepare: async () => {}, resume: () => {}, abandon: () => {} },
  };
}

/** The codes of the process's warnings from here on. */
function warningsHere(): () => (string | undefined)[] {
  const codes: (string | undefined)[] = [];
  const note = (warning: Error & { code?: string }) => codes.push(warning.code);
  process.on('warning', note);
  open.push(() => process.off('warning', note));
  return () => codes;
}

async function start(
  options: { mode: 'post-copy' | 'scatter'; verify: boolean; bandwidth?: number; gatherLimit?: number },
  via: string[] = [],
  lost?: () => void,
): Promise<{
  arrival: Arrival;
  proxy: TcpProxy;
  migration: ReturnType<typeof migrate>;
  listening: Listening;
}> {
  const { mode, verify, bandwidth = 0, gatherLimit = 0 } = options;
  // What is silent here is not noticed as such: it is not that which ends an arrival.
  const peerTimeoutMs = 60_000;
  const listening = await listen({
    port: 0,
    secret,
    peerTimeoutMs,
    recoverTimeoutMs,
    bandwidth,
    gatherLimit,
    ...(lost ? { accept: () => ({ ...received(lengthBytes), lost }) } : {}),
  });
  open.push(() => listening.close());
  const proxy = await TcpProxy.start(listening.port);
  const guest = still();
  const to = `127.0.0.1:${proxy.port}`;
  const migration = migrate(guest, {
    ...{ to, mode, verify, secret, recoverTimeoutMs, inDoubtTimeoutMs: 2000 },
    ...(via.length > 0 ? { via } : {}),
  });
  migration.done.catch(() => {});
  migration.evicted.catch(() => {});
  open.push(() => migration[Symbol.asyncDispose]());
  const { value: arrival } = await listening[Symbol.asyncIterator]().next();
  arrival.complete.catch(() => {});
  return { arrival, proxy, migration, listening };
}

describe('a source that is cut off for good', () => {
  const over = (arrival: Arrival) =>
    Promise.race([
      arrivalOver(arrival.regions[0] as Region).then(() => 'over'),
      new Promise((resolve) => setTimeout(resolve, 20 * recoverTimeoutMs, 'held for ever')),
    ]);

  test('its pages are lost, and the rest is let go of', async () => {
    const { arrival, proxy } = await start({ mode: 'post-copy', verify: true, bandwidth: 1e6 });
    await arrival.resumed;
    proxy.cut();
    await expect(arrival.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
    expect(await over(arrival)).toBe('over');
  });

  test.each([true, false])('every page comes from servers (verify: %s)', async (verify) => {
    const server = await stage({ secret, memoryBytes: 4 * lengthBytes, name: 'I1' });
    open.push(() => server.close());
    // The little that the direct way takes comes before the cut.
    const { arrival, proxy, migration } = await start(
      { mode: 'scatter', verify, bandwidth: 1e6, gatherLimit: 2e6 },
      [`127.0.0.1:${server.port}`],
    );
    await migration.evicted;
    proxy.cut();
    expect(await arrival.complete).toMatchObject({ verified: verify ? true : null, notRunning: null });
    expect(await over(arrival)).toBe('over');
  });
});

describe('a listener that is closed as soon as every page is here', () => {
  /** Slow enough to be stopped at a point that is named when it has begun. */
  const bandwidth = 20e6;
  const lastWord = { on: 'control', direction: 'up', name: 'evicted' } as const;

  test.each([true, false])('still takes the last word of the source (verify: %s)', async (verify) => {
    const { arrival, proxy, migration, listening } = await start({ mode: 'post-copy', verify, bandwidth });
    const evicted = proxy.at(lastWord, 'hold');
    await evicted.reached;
    if (!verify) await arrival.complete;
    const closed = listening.close();
    await new Promise((resolve) => setTimeout(resolve, 200));
    evicted.release();
    await closed;
    expect(await migration.done).toMatchObject({ state: 'completed' });
    expect(await arrival.complete).toMatchObject({ verified: verify ? true : null });
  });

  test('lets the servers let go of the image', async () => {
    const servers = await Promise.all(
      ['I1', 'I2'].map((name) => stage({ secret, memoryBytes: 4 * lengthBytes, name })),
    );
    for (const server of servers) open.push(() => server.close());
    const { arrival, migration, listening } = await start(
      { mode: 'scatter', verify: true, bandwidth: 1e6, gatherLimit: 4e6 },
      servers.map(({ port }) => `127.0.0.1:${port}`),
    );
    await migration.evicted;
    await arrival.complete;
    await listening.close();
    for (const server of servers) expect(server.status().held).toEqual([]);
  });

  test('does not wait for a silent one for long', async () => {
    const { arrival, proxy, listening } = await start({ mode: 'post-copy', verify: false, bandwidth });
    const evicted = proxy.at(lastWord, 'hold');
    await evicted.reached;
    await arrival.complete;
    const started = performance.now();
    await listening.close();
    expect(performance.now() - started).toBeLessThan(20_000);
  });
});

test('a listener is closed when the guests that it abandons are', async () => {
  let abandoned = false;
  const listening = await listen({
    ...{ port: 0, secret, recoverTimeoutMs },
    accept: () => ({
      ...received(lengthBytes),
      abandon: async () => {
        await new Promise((resolve) => setTimeout(resolve, 300));
        abandoned = true;
      },
    }),
  });
  open.push(() => listening.close());
  const migration = migrate(still(), {
    ...{ to: `127.0.0.1:${listening.port}`, secret, recoverTimeoutMs, holdSwitchover: true },
  });
  migration.done.catch(() => {});
  migration.evicted.catch(() => {});
  open.push(() => migration[Symbol.asyncDispose]());
  const { value: arrival } = await listening[Symbol.asyncIterator]().next();
  arrival.complete.catch(() => {});
  await listening.close();
  expect(abandoned).toBe(true);
  await expect(migration.done).rejects.toThrow();
});

test.each([
  [
    'throws',
    () => {
      throw new Error('not now');
    },
  ],
  ['never ends', () => new Promise<void>(() => {})],
])(
  'an offer that is declined, and a guest whose abandon %s: the source hears why, and the next is taken',
  async (_, abandon) => {
    let short = true;
    const warnings = warningsHere();
    const listening = await listen({
      ...{ port: 0, secret, recoverTimeoutMs, maxMigrations: 1, prepareTimeoutMs: 500 },
      accept: () => ({ ...received(short ? 4096 : lengthBytes), abandon }),
    });
    open.push(() => listening.close());
    const go = () => {
      const migration = migrate(still(), { to: `127.0.0.1:${listening.port}`, secret, recoverTimeoutMs });
      migration.evicted.catch(() => {});
      return migration;
    };
    await expect(go().done).rejects.toMatchObject({ code: 'NO_MEMORY' });
    expect(warnings()).toContain('MEMFERRY_ABANDON_THREW');
    short = false;
    const arrived = listening[Symbol.asyncIterator]().next();
    await go().done;
    expect(await (await arrived).value.complete).toMatchObject({ verified: true });
  },
);

test.each([
  ['no JSON', 1n, 'INVALID_ARGUMENT'],
  ['longer than there may be', 'x'.repeat(200 * 1024), 'INVALID_ARGUMENT'],
])('a guest whose description is %s is told so at once', async (_, description, code) => {
  const listening = await listen({ port: 0, secret });
  open.push(() => listening.close());
  const migration = migrate({ ...still(), description }, { to: `127.0.0.1:${listening.port}`, secret });
  migration.evicted.catch(() => {});
  await expect(migration.done).rejects.toMatchObject({ code });
});

test('what lost() of a guest throws ends nothing: the pages are poisoned, and the process lives on', async () => {
  const warnings = warningsHere();
  const lost = () => {
    throw new Error('not now');
  };
  const { arrival, proxy, migration } = await start(
    { mode: 'post-copy', verify: false, bandwidth: 1e6 },
    [],
    lost,
  );
  await arrival.resumed;
  proxy.cut();
  await expect(arrival.complete).rejects.toMatchObject({ code: 'PAGES_LOST' });
  await expect(migration.done).rejects.toThrow();
  expect(warnings()).toContain('MEMFERRY_LOST_THREW');
});

test('a listener whose signal is aborted already says so as a listener does', async () => {
  const signal = AbortSignal.abort(new Error('by Ctrl-C'));
  await expect(listen({ port: 0, secret, signal })).rejects.toMatchObject({ code: 'CANCELLED' });
  await expect(stage({ secret, memoryBytes: 64 * 2 ** 20, signal })).rejects.toMatchObject({
    code: 'CANCELLED',
  });
});
