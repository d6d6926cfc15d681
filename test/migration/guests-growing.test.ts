/**
 * A guest whose memory grows at the worst of times: in the request that is in progress when the migration begins, and in
 * every request throughout. What it has grown by arrives like everything else.
 */
import { afterEach, expect, test } from 'vitest';
import { park, unpark } from '../../lib/index.js';
import { WorkerGuest, workerGuests } from '../../lib/worker/index.js';
import { endHosts, type Host, type Settled } from '../support/host.js';
import { hosts, listen, migrate, report, SECRET, serversOf, through } from '../support/scenario.js';

afterEach(endHosts);

const url = new URL('../support/guests/grows.mjs', import.meta.url).href;
const modules = { grows: url };
const modes = [
  'stop-and-copy',
  'pre-copy',
  'post-copy',
  'hybrid',
  'scatter',
  'scatter-pre-copy',
  'scatter-hybrid',
];

interface Memory {
  pages: number;
  wrong: number[];
}

const ask = (host: Host, request: object) =>
  host.call<Settled<Memory>>('request', { guest: 'g', request }, 60_000);

test.each(modes.flatMap((mode) => [50, 300].map((busyMs) => [mode, busyMs] as const)))(
  '%s, grows %i ms after the migration was asked for, before it can pause',
  async (mode, busyMs) => {
    const [a, b] = await hosts('a', 'b');
    const servers = await serversOf(mode);
    const port = await listen(b, { modules });
    await a.call('startWorker', { guest: 'g', module: 'grows', url });
    const grown = ask(a, { busyMs });
    await migrate(a, port, { mode, ...through(servers) }, { guest: 'g' });
    expect(await report(a)).toMatchObject({ verified: true, heapBytes: 2 * 65536 });
    expect(await grown).toMatchObject({ ok: true, value: { pages: 2, wrong: [] } });
    await b.untilArrival('main/g', 'complete');
    expect(await ask(b, {})).toMatchObject({ ok: true, value: { pages: 2, wrong: [] } });
    expect(await ask(b, { busyMs: 0 })).toMatchObject({ ok: true, value: { pages: 3, wrong: [] } });
  },
);

test.each(modes)('%s, grows with every request', async (mode) => {
  const [a, b] = await hosts('a', 'b');
  const servers = await serversOf(mode);
  const port = await listen(b, { modules });
  await a.call('startWorker', { guest: 'g', module: 'grows', url });
  let over = false;
  let asked = 0;
  const asking = (async () => {
    for (; !over; asked++) {
      const answer = await ask(a, { busyMs: 2 });
      if (!answer.ok) return answer.error.code;
      expect(answer.value).toEqual({ pages: asked + 2, wrong: [] });
    }
    return null;
  })();
  await migrate(a, port, { mode, maxRounds: 5, ...through(servers) }, { guest: 'g' });
  expect(await report(a)).toMatchObject({ verified: true });
  over = true;
  expect(await asking).toBe('GUEST_MOVED');
  await b.untilArrival('main/g', 'complete');
  expect(await ask(b, {})).toMatchObject({ ok: true, value: { pages: asked + 1, wrong: [] } });
});

test.each(modes)('%s, there and back, grown while it was built, and later', async (mode) => {
  const building = new URL('../support/guests/grows-building.mjs', import.meta.url).href;
  const [a, b] = await hosts('a', 'b');
  const servers = await serversOf(mode);
  const ports = [await listen(a, { modules: { building } }), await listen(b, { modules: { building } })];
  await a.call('startWorker', { guest: 'g', module: 'building', url: building });
  const on = async (host: Host, request: object) =>
    (await host.call<Settled<{ at: number; bytes: number; sum: number }>>('request', {
      guest: 'g',
      request,
    })) as {
      value: { at: number; bytes: number; sum: number };
    };
  expect(await on(a, { add: 5, slot: 7 })).toMatchObject({ value: { at: 65536, bytes: 17 * 65536, sum: 5 } });
  await migrate(a, ports[1] as number, { mode, ...through(servers) }, { guest: 'g', key: 'there' });
  expect(await report(a, 'there')).toMatchObject({ verified: true });
  await b.untilArrival('main/g', 'complete');
  expect(await on(b, { add: 2, slot: 9, grow: 4 })).toMatchObject({
    value: { at: 65536, bytes: 21 * 65536, sum: 7 },
  });
  await migrate(b, ports[0] as number, { mode, ...through(servers) }, { guest: 'g', key: 'back' });
  expect(await report(b, 'back')).toMatchObject({ verified: true });
  await a.untilArrival('main/g', 'complete');
  expect(await on(a, { add: 1, slot: 1023 })).toMatchObject({
    value: { at: 65536, bytes: 21 * 65536, sum: 8 },
  });
});

test('parked and unparked, grown in the request before', async () => {
  const servers = await serversOf('scatter');
  const link = { secret: SECRET };
  const guest = await WorkerGuest.start({ name: 'g', module: { name: 'grows', url: new URL(url) } });
  const grown = guest.request({ busyMs: 200 });
  const { ticket } = await park(guest, { ...link, ...through(servers) });
  expect(await grown).toEqual({ pages: 2, wrong: [] });
  let arrived: WorkerGuest | null = null;
  const accept = workerGuests({
    modules: { grows: new URL(url) },
    onGuest: (each) => {
      arrived = each;
    },
  });
  await using arrival = await unpark(ticket, { ...link, accept });
  await arrival.complete;
  await expect.poll(() => arrived).not.toBeNull();
  expect(await (arrived as unknown as WorkerGuest).request({})).toEqual({ pages: 2, wrong: [] });
  await (arrived as unknown as WorkerGuest).terminate();
});
