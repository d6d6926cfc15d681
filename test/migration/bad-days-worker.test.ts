/**
 * A lost page under a live worker: WebAssembly gets a RuntimeError, that guest ends, and everybody else in the
 * process goes on. And no end of a worker or a process waits for a page that will not come.
 */
import { afterEach, describe, expect, test } from 'vitest';
import * as w from '../support/guests/wasm-builder.js';
import { endHosts, type Host, type Settled } from '../support/host.js';
import { failure, hosts, listen, migrate, report } from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

afterEach(async () => {
  await closeProxies();
  await endHosts();
});

const url = new URL('../support/guests/program.mjs', import.meta.url).href;
/** `load(address)` and `store(address, value)` over 4 MiB. */
const program = w.wasmModule(
  w.types(w.func([w.I32], [w.I32]), w.func([w.I32, w.I32], [])),
  w.functions(0, 1),
  w.memories([0, 64]),
  w.exports_(['memory', 2, 0], ['load', 0, 0], ['store', 0, 1]),
  w.code([0x20, 0, 0x28, 2, 0], [0x20, 0, 0x20, 1, 0x36, 2, 0]),
);
const data = { wasm: Buffer.from(program).toString('base64') };
const valueAt = (page: number) => page * 7 + 1;

function call(host: Host, name: string, args: number[], guest = 'w'): Promise<Settled<number>> {
  return host.call('request', { guest, request: { op: 'call', name, args } });
}

/** `before`: what the destination is to have by then; the source asks by itself soon after GRANT, whatever is held. */
async function begin(recoverTimeoutMs: number, before: (b: Host) => Promise<void> = async () => {}) {
  const [a, b] = await hosts('a', 'b');
  await before(b);
  const port = await listen(b, { modules: { program: url }, options: { recoverTimeoutMs } });
  const proxy = await TcpProxy.start(port);
  await a.call('startWorker', { guest: 'w', module: 'program', url, options: { data } });
  for (let page = 0; page < 1024; page += 8) {
    expect(await call(a, 'store', [page * 4096, valueAt(page)])).toMatchObject({ ok: true });
  }
  const held = proxy.at({ on: 'control', direction: 'down', name: 'resumed' }, 'hold');
  await migrate(a, proxy.port, { mode: 'post-copy', recoverTimeoutMs }, { guest: 'w' });
  await held.reached;
  return { a, b, proxy, held };
}

test('moves while it is asked, and every value is right', async () => {
  const { a, b, held } = await begin(20_000);
  expect(await call(b, 'load', [512 * 4096])).toEqual({ ok: true, value: valueAt(512) });
  held.release();
  expect(await report(a)).toMatchObject({ verified: true });
  for (let page = 0; page < 1024; page += 8) {
    expect(await call(b, 'load', [page * 4096])).toEqual({ ok: true, value: valueAt(page) });
  }
});

test('a lost page is a RuntimeError in WebAssembly, ends that guest, and only that one', async () => {
  const { a, b, proxy, held } = await begin(1500, async (there) => {
    await there.call('startWorker', { guest: 'neighbour', module: 'program', url, options: { data } });
    expect(await call(there, 'store', [4096, 99], 'neighbour')).toMatchObject({ ok: true });
  });
  const cut = proxy.at({ on: 'data', direction: 'up', name: 'pages' }, 'cut');
  held.release();
  await cut.reached;
  expect(await b.untilArrival('main/w', 'complete')).toMatchObject({
    ok: false,
    error: { code: 'PAGES_LOST' },
  });
  const event = await b.until('pages-lost', (seen) => seen.event === 'pages-lost');
  const runs = event['pages'] as { region: number; first: number; count: number }[];
  const lost = [...Array(1024).keys()].filter(
    (page) => page % 8 === 0 && runs.some(({ first, count }) => page >= first && page < first + count),
  );
  expect(lost.length).toBeGreaterThan(0);

  const read = await call(b, 'load', [(lost[0] as number) * 4096]);
  expect(read.ok).toBe(false);
  await b.until('the guest ended', (seen) => seen.event === 'ended' && seen['guest'] === 'w');
  expect(await b.call('workerStatus', { guest: 'w' })).toBe('lost');
  expect(await call(b, 'load', [4096], 'neighbour')).toEqual({ ok: true, value: 99 });
  expect(b.alive).toBe(true);
  await failure(a);
});

describe('an end while the worker waits for a page', () => {
  test.each(['terminate', 'exit'])('by %s is not held up', async (how) => {
    const { b, proxy, held } = await begin(60_000);
    const cut = proxy.at({ on: 'data', direction: 'up', name: 'pages' }, 'cut');
    held.release();
    await cut.reached;
    await b.untilState('arrival', 'main/w', 'postcopy-paused');
    const reading = call(b, 'load', [1016 * 4096]).then(
      ({ ok }) => ok,
      () => false,
    );
    await b.call('inventory');
    const since = performance.now();
    if (how === 'terminate') {
      // Giving the arrival up poisons what is missing and wakes the worker, which can be ended then.
      await b.call('disposeArrival', { key: 'main/w' });
      await b.call('terminateWorker', { guest: 'w' });
    } else {
      await b.call('exit', { code: 7 });
      expect(await b.exited).toEqual({ code: 7, signal: null });
    }
    expect(performance.now() - since).toBeLessThan(20_000);
    expect(await reading).toBe(false);
  });
});
