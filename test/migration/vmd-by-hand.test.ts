/** The commands of the VMD as one types them: servers, a host evicted, a guest parked and claimed, an image dropped. */
import { readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, describe, expect, test } from 'vitest';
import { command as run, counter, forEachTest } from '../support/command-line.js';
import { guestModule } from '../support/guests/by-hand.js';
import { closeProxies, type Point, TcpProxy } from '../support/tcp-proxy.js';
import * as w from '../support/guests/wasm-builder.js';

const place = forEachTest();
const command = (...args: string[]) => run(...args, '--secret-file', place.secretFile);
afterEach(closeProxies);
const ticket = () => join(place.directory, 'ticket');

async function server(name: string, memory = '256Mi') {
  const there = command(
    'stage',
    '--listen',
    '127.0.0.1:0',
    '--memory',
    memory,
    '--name',
    name,
    '--no-announce',
  );
  const { port } = await there.next('listening');
  return { ...there, name, address: `127.0.0.1:${port}` };
}

/** Its answer is its last line. */
async function answer(...args: string[]) {
  const asked = command(...args);
  expect(await asked.closed, asked.errors()).toBe(0);
  return asked.lines.at(-1) as Record<string, unknown>;
}

const held = async (address: string) =>
  (await answer('status', address))['held'] as Record<string, unknown>[];

const startPark = (via: string, ...args: string[]) =>
  command('park', '--ticket', ticket(), '--module', `counter=${counter}`, '--via', via, ...args);
const startUnpark = (...args: string[]) =>
  command('unpark', '--ticket', ticket(), '--module', `counter=${counter}`, ...args);

describe('send through servers', () => {
  test.each(['scatter', 'scatter-hybrid', 'scatter-pre-copy'])(
    '--mode %s: the host is left as soon as it may be, and the guest goes on counting',
    async (mode) => {
      const servers = [await server('one'), await server('two')];
      const there = command(
        'receive',
        ...['--listen', '127.0.0.1:0', '--module', `counter=${counter}`, '--gather-limit', '1Mi'],
        ...['--bandwidth', '1Mi'],
      );
      const { port } = await there.next('listening');
      const here = command(
        'send',
        ...['--to', `127.0.0.1:${port}`, '--module', `counter=${counter}`, '--mode', mode],
        ...['--via', servers.map(({ address }) => address).join(','), '--leave-when-evicted'],
        // The destination takes so much a second of what comes, which these pages packed are little of.
        ...['--compress', 'off'],
      );
      await here.next('started');
      // A page of its own each, so that the servers hold something that takes a while to gather.
      for (let slot = 0; slot < 4096; slot++)
        here.child.stdin.write(`{"add":${slot + 1},"slot":${slot * 512}}\n`);
      for (let slot = 0; slot < 4096; slot++) await here.next('reply');
      here.child.stdin.write('\n');
      const evicted = await here.next('evicted');
      expect(await here.closed, here.errors()).toBe(0);
      expect(evicted).toMatchObject({ mode, evictionMs: expect.any(Number) });
      // The source's process is gone. What it left is with the servers alone; by rounds the destination has kept up.
      if (mode !== 'scatter-pre-copy')
        expect(there.lines.filter(({ type }) => type === 'report')).toEqual([]);
      expect(await there.ask({ add: 1, slot: 4095 * 512 })).toBe(4097);
      expect(await there.next('report')).toMatchObject({ verified: true });
      for (const slot of [0, 1, 77, 2048, 4094]) {
        expect(await there.ask({ add: 0, slot: slot * 512 })).toBe(slot + 1);
      }
      for (const { address } of servers) expect(await held(address)).toEqual([]);
    },
  );

  test('servers that are too small: VMD_CAPACITY, and nothing is left at them', async () => {
    const small = await server('small', '16Mi');
    const there = command('receive', '--listen', '127.0.0.1:0', '--module', `counter=${counter}`);
    const { port } = await there.next('listening');
    const here = command(
      'send',
      ...['--to', `127.0.0.1:${port}`, '--module', `counter=${counter}`, '--mode', 'scatter'],
      ...['--via', small.address],
    );
    here.child.stdin.end();
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: VMD_CAPACITY: [^\n]*\n$/);
    expect(await held(small.address)).toEqual([]);
  });
});

describe('park and unpark', () => {
  test('a guest stands in the VMD with nobody running it, and one claims it, once', async () => {
    const servers = [await server('one'), await server('two')];
    const here = startPark(servers.map(({ address }) => address).join(','));
    await here.next('started');
    expect(await here.ask({ add: 3 })).toBe(3);
    expect(await here.ask({ add: 5, slot: 1_000_000 })).toBe(5);
    here.child.stdin.write('\n');
    const report = await here.next('report');
    expect(await here.closed, here.errors()).toBe(0);
    expect(statSync(ticket()).mode & 0o777).toBe(0o600);
    const { secret, image } = JSON.parse(readFileSync(ticket(), 'utf8'));
    expect(report).toMatchObject({ image, ticket: ticket() });
    expect(JSON.stringify(here.lines)).not.toContain(secret);
    for (const { address } of servers) {
      expect(await held(address)).toMatchObject([{ id: image, kind: 'park', phase: 'parked' }]);
    }

    const there = startUnpark();
    await there.next('resumed');
    expect(await there.ask({ add: 4 })).toBe(7);
    await there.next('report');
    expect(await there.ask({ add: 0, slot: 1_000_000 })).toBe(5);
    expect(await there.ask('history')).toEqual(['created', `moved to process ${there.child.pid}`]);

    const again = startUnpark();
    expect(await again.closed).toBeGreaterThan(0);
    expect(again.errors()).toMatch(/^memferry: [A-Z_]+: [^\n]*\n$/);
    expect(await there.ask({ add: 1 })).toBe(8);
    there.child.kill('SIGINT');
    await there.closed;
  });

  test('a server loses its part while the guest is gathered: told at once, and the other pages still come', async () => {
    const servers = [await server('one'), await server('two')];
    const here = startPark(servers.map(({ address }) => address).join(','));
    await here.next('started');
    const [pages, slotsOfPage] = [2048, 1024];
    for (let page = 0; page < pages; page++)
      here.child.stdin.write(`{"add":${page + 1},"slot":${page * slotsOfPage}}\n`);
    for (let page = 0; page < pages; page++) await here.next('reply');
    here.child.stdin.write('\n');
    const image = (await here.next('report'))['image'] as string;
    expect(await here.closed, here.errors()).toBe(0);

    const there = startUnpark('--once', '--gather-limit', '256Ki');
    await there.next('resumed');
    await answer('drop', servers[1]?.address as string, image);
    const runs = (await there.next('lost'))['runs'] as { first: number; count: number }[];
    const kept = Array.from({ length: pages }, (_, page) => page).filter(
      (page) => !runs.some(({ first, count }) => page >= first && page < first + count),
    );
    expect(kept.length).toBeGreaterThan(0);
    expect(kept.length).toBeLessThan(pages);
    // Here and there, so that most of them still come by themselves.
    for (let turn = 0; turn < 200; turn++) {
      const page = kept[(turn * 7919) % kept.length] as number;
      expect(await there.ask({ add: 0, slot: page * slotsOfPage })).toBe(page + 1);
    }
    expect(await there.closed).toBe(4);
    expect(there.errors()).toMatch(/^memferry: PAGES_LOST: [^\n]*\n$/);
  });

  // Both at once, since each takes half a minute to be in doubt.
  test('a home server that does not answer GRANT is asked until it does, or one gives up', async () => {
    const only = await server('one');
    const inDoubt = async (point: Point, file: string) => {
      const proxy = await TcpProxy.start(Number(only.address.split(':')[1]));
      proxy.at(point, 'cut');
      const here = command(
        ...['park', '--ticket', join(place.directory, file), '--module', `counter=${counter}`],
        ...['--via', `127.0.0.1:${proxy.port}`, '--after-ms', '0'],
      );
      await here.next('in-doubt');
      return { proxy, here };
    };
    const taken = async () => {
      const { proxy, here } = await inDoubt({ on: 'control', direction: 'down', name: 'resumed' }, 'taken');
      proxy.heal();
      const { image } = await here.next('report');
      expect(await here.closed).toBe(0);
      expect(here.errors()).toMatch(/^memferry: MIGRATION_IN_DOUBT: [^\n]* Ctrl-C [^\n]*\n$/);
      expect(await held(only.address)).toContainEqual(
        expect.objectContaining({ id: image, phase: 'parked' }),
      );
    };
    const givenUp = async () => {
      const { here } = await inDoubt({ on: 'control', direction: 'up', name: 'grant' }, 'given-up');
      here.child.kill('SIGINT');
      expect(await here.closed).toBe(4);
      expect(here.errors()).toMatch(/\nmemferry: MIGRATION_IN_DOUBT: [^\n]*\n$/);
      expect(statSync(join(place.directory, 'given-up')).size).toBeGreaterThan(0);
    };
    await Promise.all([taken(), givenUp()]);
  });

  test('interrupted while a guest of WebAssembly waits for a page of a server that says nothing: ends at once', async () => {
    const only = await server('one');
    const wasm = w.wasmModule(
      w.types(w.func([w.I32], [w.I32]), w.func([w.I32, w.I32], [])),
      w.functions(0, 1),
      w.memories([0, 64]),
      w.exports_(['memory', 2, 0], ['load', 0, 0], ['store', 0, 1]),
      w.code([0x20, 0, 0x28, 2, 0], [0x20, 0, 0x20, 1, 0x36, 2, 0]),
    );
    const program = [
      '--ticket',
      ticket(),
      '--module',
      `program=${fileURLToPath(guestModule('program.mjs'))}`,
    ];
    const data = JSON.stringify({ wasm: Buffer.from(wasm).toString('base64') });
    const here = command('park', ...program, '--via', only.address, '--data', data);
    await here.next('started');
    const call = (name: string, ...args: number[]) => JSON.stringify({ op: 'call', name, args });
    for (let page = 0; page < 1024; page++)
      here.child.stdin.write(`${call('store', page * 4096, page + 1)}\n`);
    for (let page = 0; page < 1024; page++) await here.next('reply');
    here.child.stdin.write('\n');
    expect(await here.closed, here.errors()).toBe(0);

    const there = command('unpark', ...program, '--gather-limit', '64Ki');
    await there.next('resumed');
    only.child.kill('SIGSTOP');
    there.child.stdin.write(`${call('load', 1023 * 4096)}\n`);
    await new Promise((resolve) => setTimeout(resolve, 500));
    expect(there.lines.filter(({ type }) => type === 'reply')).toEqual([]);
    const since = performance.now();
    there.child.kill('SIGINT');
    expect(await there.closed, there.errors()).toBe(130);
    expect(performance.now() - since).toBeLessThan(15_000);
  });

  test('it comes back to a host that kept what it was: only what changed comes', async () => {
    const servers = [await server('one'), await server('two')];
    const via = servers.map(({ address }) => address).join(',');
    const copies = join(place.directory, 'copies');
    const here = startPark(via, '--keep-stale-copy', copies);
    await here.next('started');
    expect(await here.ask({ add: 3 })).toBe(3);
    here.child.stdin.write('\n');
    await here.next('report');
    expect(await here.closed, here.errors()).toBe(0);
    const there = startUnpark('--base', copies, '--once');
    await there.next('resumed');
    const report = await there.next('report');
    expect(report).toMatchObject({ verified: true, baseProblem: null });
    expect(report['pagesFromBase']).toBeGreaterThan(0);
    // What prepares the guest touches pages before they are here.
    expect(report['pagesGathered']).toBeLessThan(report['pagesFromBase'] as number);
    expect(await there.closed, there.errors()).toBe(0);
  });

  test.each([
    [['--base', 'vmd:ticket'], '--base:'],
    [['--base-for-any'], '--base-for-any:'],
    [['--base', 'x', '--base-image', 'memory=y'], '--base-image:'],
    [['--base-image', 'elsewhere=y'], 'unpark.base.images:'],
  ])('%j makes no sense, and nothing is claimed', async (flags, about) => {
    const only = await server('one');
    const here = startPark(only.address, '--after-ms', '0');
    expect(await here.closed, here.errors()).toBe(0);
    const there = startUnpark(...flags);
    expect(await there.closed).toBe(2);
    expect(there.errors()).toContain(`memferry: INVALID_ARGUMENT: ${about}`);
    expect(await held(only.address)).toMatchObject([{ phase: 'parked', epoch: 0 }]);
  });

  test('a ticket is never overwritten, and no guest is started for it', async () => {
    const only = await server('one');
    const here = startPark(only.address, '--after-ms', '0');
    expect(await here.closed, here.errors()).toBe(0);
    const before = readFileSync(ticket(), 'utf8');
    const another = startPark(only.address, '--after-ms', '0');
    expect(await another.closed).toBe(2);
    expect(another.errors()).toMatch(/^memferry: INVALID_ARGUMENT: --ticket: [^\n]*\n$/);
    expect(another.lines).toEqual([]);
    expect(readFileSync(ticket(), 'utf8')).toBe(before);
  });

  test('a park that fails leaves no ticket', async () => {
    const here = startPark('127.0.0.1:9', '--after-ms', '0');
    expect(await here.closed).toBe(1);
    expect(here.errors()).toMatch(/^memferry: [A-Z_]+: [^\n]*\n$/);
    expect(() => statSync(ticket())).toThrow(/ENOENT/);
  });

  test('what is dropped is gone: its ticket says so', async () => {
    const only = await server('one');
    const here = startPark(only.address, '--after-ms', '0');
    expect(await here.closed, here.errors()).toBe(0);
    const [image] = await held(only.address);
    const id = image?.['id'] as string;
    expect(await answer('drop', only.address, id)).toMatchObject({
      type: 'dropped',
      image: id,
      server: 'one',
    });
    expect(await held(only.address)).toEqual([]);
    const again = command('drop', only.address, id);
    expect(await again.closed).toBe(1);
    expect(again.errors()).toMatch(/^memferry: VMD_LOST: [^\n]*\n$/);
    const there = startUnpark();
    expect(await there.closed).toBeGreaterThan(0);
    expect(there.errors()).toMatch(/^memferry: [A-Z_]+: [^\n]*\n$/);
  });
});
