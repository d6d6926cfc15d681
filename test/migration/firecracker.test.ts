/** Restoring microVMs lazily from a snapshot file, against a program that plays Firecracker's part byte for byte. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type MemferryError, type MicroVm, type SnapshotServer, serveSnapshot } from '../../lib/index.js';
import { buildMicroVm, FakeMicroVm, makeSnapshot } from '../support/micro-vm.js';

const bytes = 32 * 2 ** 20;
const pages = bytes / 4096;
const hugePages = '/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages';
const openDescriptors = () => readdirSync('/proc/self/fd').length;

describe('a page-fault handler for Firecracker', () => {
  let folder: string;
  let snapshot: string;
  let socketPath: string;
  let server: SnapshotServer | null = null;
  let fakes: FakeMicroVm[];
  let microVms: MicroVm[];
  let refused: MemferryError[];

  const serve = async (options: Partial<Parameters<typeof serveSnapshot>[0]> = {}) => {
    server = await serveSnapshot({
      socketPath,
      snapshot,
      onMicroVm: (microVm) => {
        microVms.push(microVm);
      },
      onRefused: (error) => refused.push(error),
      ...options,
    });
  };
  const start = (...flags: (string | number)[]) => {
    const fake = new FakeMicroVm(['--socket', socketPath, '--bytes', bytes, ...flags]);
    fakes.push(fake);
    return fake;
  };
  const loaded = async (...flags: (string | number)[]) => {
    const fake = start(...flags);
    expect(await fake.answer()).toEqual({ loaded: true });
    return fake;
  };

  beforeAll(() => {
    buildMicroVm();
  });
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'memferry-firecracker-'));
    snapshot = join(folder, 'memory');
    socketPath = join(folder, 'socket');
    makeSnapshot(snapshot, bytes);
    fakes = [];
    microVms = [];
    refused = [];
  });
  afterEach(async () => {
    for (const fake of fakes) fake.kill();
    await server?.close();
    server = null;
    rmSync(folder, { recursive: true });
  });

  it('serves every byte: at random, in sequence, in two regions, as each release asks', async () => {
    await serve();
    for (const flags of [
      ['--fields', 'both'],
      ['--fields', 'page_size', '--regions', 2],
      ['--fields', 'page_size_kib', '--pieces'],
      ['--fields', 'none', '--close-after'],
      ['--fields', 'both', '--regions', 2, '--pieces', 1],
    ]) {
      const fake = await loaded(...flags);
      expect(await fake.obey('random 2000 1')).toMatchObject({ wrong: 0, count: 2000 });
      await fake.obey('sequential');
      expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
      const microVm = microVms.at(-1) as MicroVm;
      expect(microVm.pid).toBe(fake.child.pid);
      await fake.obey('exit').catch(() => {});
      // Every page is there before its owner goes: which of both is told first depends on who looks when.
      const { end, stats } = await microVm.ended;
      expect(['complete', 'owner-gone']).toContain(end);
      expect(stats).toMatchObject({ pagesInstalled: pages, pagesLost: 0 });
    }
    expect(refused).toEqual([]);
    await expect.poll(() => server?.microVms.size).toBe(0);
  });

  it('gives zeros for what the balloon took, with several CPUs faulting meanwhile', async () => {
    await serve({ prePaging: 'sequential' });
    const fake = await loaded();
    expect(await fake.obey('random 500 2')).toMatchObject({ wrong: 0 });
    await fake.obey('remove 100 300');
    await fake.obey('write 150 10 7');
    await fake.obey('remove 152 4');
    expect(await fake.obey('threads 2 1500')).toMatchObject({ wrong: 0 });
    await fake.obey('sequential');
    expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
    expect(microVms[0]?.stats().removeEvents).toBeGreaterThanOrEqual(2);
  });

  it('brings everything when told to, and goes', async () => {
    await serve({ prePaging: 'all' });
    const fake = await loaded();
    await fake.obey('remove 5 5');
    expect(await microVms[0]?.ended).toMatchObject({ end: 'complete' });
    await server?.close();
    expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
    await fake.obey('remove 50 5');
    expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
  });

  it('serves pages of 2 MiB whole', async (context) => {
    const former = readFileSync(hugePages, 'utf8').trim();
    try {
      writeFileSync(hugePages, String(Math.max(Number(former), bytes / 2 ** 21 + 2)));
    } catch {
      return context.skip('huge pages cannot be reserved here');
    }
    try {
      await serve();
      const fake = start('--page-size', 2 ** 21);
      const first = await fake.answer().catch(() => null);
      if (!first) return context.skip(`no huge pages to be had: ${fake.errors}`);
      expect(await fake.obey('random 3000 1')).toMatchObject({ wrong: 0 });
      await fake.obey('remove 512 512');
      expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
      expect(microVms[0]?.memory.pageSize).toBe(2 ** 21);
      fake.kill();
      await microVms[0]?.ended;
    } finally {
      writeFileSync(hugePages, former);
    }
  });

  it('serves on where its owner throws at being told', async () => {
    const warnings: string[] = [];
    const onWarning = ({ message }: Error) => warnings.push(message);
    process.on('warning', onWarning);
    try {
      const boom = () => {
        throw new Error('not now');
      };
      await serve({ onRefused: boom, onMicroVm: boom });
      const stranger = connect(socketPath);
      stranger.end('no mappings');
      await expect.poll(() => warnings.join()).toContain('onRefused threw: not now');
      const fake = await loaded();
      expect(await fake.obey('random 100 1')).toMatchObject({ wrong: 0 });
      expect(warnings.join()).toContain('onMicroVm threw: not now');
    } finally {
      process.off('warning', onWarning);
    }
  });

  it('restores several microVMs at once from one file', async () => {
    await serve();
    const clones = await Promise.all([loaded(), loaded(), loaded()]);
    for (const clone of clones)
      await clone.obey(`write ${clones.indexOf(clone)} 5 ${clones.indexOf(clone) + 1}`);
    const verified = await Promise.all(clones.map((clone) => clone.obey('verify')));
    expect(verified.map(({ wrong }) => wrong)).toEqual([0, 0, 0]);
    expect(new Set(microVms.map(({ pid }) => pid)).size).toBe(3);
  });

  it('says so to whoever runs it when a microVM is one too many', async () => {
    await serve({ mostMicroVms: 2 });
    const fake = await loaded('--fields', 'both');
    await loaded('--fields', 'both');
    start('--fields', 'both');
    await expect.poll(() => refused.length).toBe(1);
    expect(refused[0]).toMatchObject({ code: 'LIMIT_EXCEEDED', message: '2 microVMs are served already' });
    // There is room again.
    fake.kill();
    await expect.poll(() => server?.microVms.size).toBe(1);
    const next = await loaded('--fields', 'both');
    expect(await next.obey('random 100 1')).toMatchObject({ wrong: 0 });
  });

  it('tracks writes through the descriptor of a fork that asks for it', async () => {
    await serve();
    for (const flags of [['--fork'], ['--fork', '--memfd']]) {
      const fake = await loaded(...flags);
      expect(await fake.obey('random 500 3')).toMatchObject({ wrong: 0 });
      expect(microVms.at(-1)?.tracksWrites).toBe(true);
      // Not all of it is there.
      expect(() => microVms.at(-1)?.toRegion()).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
      fake.kill();
      await microVms.at(-1)?.ended;
    }
  });

  // How soon: SnapshotPagerTest.TheOwnersDeathIsNoticedAtOnce, where only the pidfd can tell.
  it('ends when the microVM dies', async () => {
    await serve();
    const fake = await loaded();
    const before = performance.now();
    fake.kill();
    expect(await microVms[0]?.ended).toMatchObject({ end: 'owner-gone' });
    expect(performance.now() - before).toBeLessThan(15_000);
  });

  it('lets a microVM fail rather than read zeros when it is closed', async () => {
    await serve({ prePaging: 'none' });
    const fake = await loaded();
    await fake.obey('random 100 4');
    await server?.close();
    expect(await microVms[0]?.ended).toMatchObject({ end: 'closed' });
    await fake.obey('verify').catch(() => {});
    expect(await fake.exit).toMatchObject({ signal: 'SIGBUS' });
  });

  // Firecracker has a duplicate of the userfaultfd, so that nothing becomes zeros with the handler's end.
  it('lets a microVM wait rather than read zeros when it is killed', async () => {
    const main = fileURLToPath(new URL('../../lib/cli/main.js', import.meta.url));
    const flags = ['--socket', socketPath, '--snapshot', snapshot, '--pre-paging', 'none', '--json'];
    const handler = spawn(process.execPath, [main, 'firecracker', ...flags], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const died = once(handler, 'exit');
    try {
      await once(handler.stdout, 'data');
      const fake = await loaded();
      expect(await fake.obey('random 100 4')).toMatchObject({ wrong: 0 });
      handler.kill('SIGKILL');
      await died;
      const answer = fake.obey('verify').catch(() => null);
      // Every missing page holds it, and none reads as anything: it is seen to wait in the kernel.
      const waits = () => readFileSync(`/proc/${fake.child.pid}/wchan`, 'utf8');
      await expect.poll(waits, { timeout: 20_000 }).toContain('userfault');
      fake.kill();
      expect(await answer).toBeNull();
      expect(await fake.exit).toMatchObject({ signal: 'SIGKILL' });
    } finally {
      handler.kill('SIGKILL');
    }
  });

  it('reports what a snapshot that shrank has lost before it fails', async () => {
    await serve({ prePaging: 'none' });
    const fake = await loaded();
    truncateSync(snapshot, bytes / 2);
    const lost = expect(microVms[0]?.ended).rejects.toMatchObject({ code: 'PAGES_LOST' });
    await fake.obey('verify').catch(() => {});
    await lost;
    expect(await fake.exit).toMatchObject({ signal: 'SIGBUS' });
  });

  it('refuses what makes no sense, leaves no descriptor open, and serves the next one', async () => {
    // Silence, and what is never whole.
    await serve({ handshakeTimeoutMs: 300 });
    const silent = connect(socketPath);
    silent.on('error', () => {});
    const unfinished = [
      () => null,
      () => start('--message', '[{"size":'),
      () => start('--message', 'nonsense'),
    ];
    for (const say of unfinished) {
      const fake = say();
      await expect.poll(() => refused.length).toBe(1);
      expect(refused.pop()).toMatchObject({ code: 'PEER_LOST' });
      fake?.kill();
      await fake?.exit;
    }
    silent.destroy();
    await server?.close();
    await serve();
    const good = await loaded();
    good.kill();
    await microVms[0]?.ended;
    const before = openDescriptors();
    const odd = { base_host_virt_addr: 2 ** 40, size: 4096, offset: 0, page_size: 4096 };
    const hostile: [string, (string | number)[]][] = [
      ['PROTOCOL_ERROR', ['--no-descriptor']],
      ['PROTOCOL_ERROR', ['--message', '[]']],
      ['PROTOCOL_ERROR', ['--message', '[{"base_host_virt_addr":4096}]']],
      ['SYSTEM', ['--plain-file']],
      ['LIMIT_EXCEEDED', ['--third-descriptor']],
      // The memfd where the userfaultfd should be.
      ['SYSTEM', ['--fork', '--memfd', '--swapped']],
      // It ends in the middle of its message, with its descriptor on the way.
      ['PROTOCOL_ERROR', ['--die-early']],
      ['PROTOCOL_ERROR', ['--message', JSON.stringify([{ ...odd, page_size: 0 }])]],
      ['PROTOCOL_ERROR', ['--message', JSON.stringify([{ ...odd, page_size: 4097 }])]],
      ['PROTOCOL_ERROR', ['--message', JSON.stringify([odd, { ...odd, offset: 4096 }])]],
      ['INVALID_ARGUMENT', ['--message', JSON.stringify([{ ...odd, offset: bytes }])]],
      ['INVALID_ARGUMENT', ['--message', JSON.stringify([{ ...odd, offset: 2 ** 52 }])]],
      // Memory that is not its: nothing outside of what the userfaultfd serves is touched.
      [
        'INVALID_ARGUMENT',
        ['--message', '[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096}]'],
      ],
    ];
    for (const [code, flags] of hostile) {
      const fake = start(...flags);
      await expect.poll(() => refused.length).toBe(1);
      expect(refused.pop(), flags.join(' ')).toMatchObject({ code });
      fake.kill();
      await fake.exit;
    }
    // The snapshot is shorter than the memory.
    truncateSync(snapshot, bytes - 4096);
    const short = start();
    await expect.poll(() => refused.length).toBe(1);
    expect(refused.pop()).toMatchObject({ code: 'INVALID_ARGUMENT' });
    short.kill();
    await short.exit;
    makeSnapshot(snapshot, bytes);
    // An end without a word.
    await start('--early-close').exit;
    const flood = connect(socketPath);
    flood.on('error', () => {});
    flood.write(`[${' '.repeat(3 * 2 ** 20)}`);
    await expect.poll(() => refused.length).toBe(1);
    expect(refused.pop()).toMatchObject({ code: 'LIMIT_EXCEEDED' });
    flood.destroy();
    await expect.poll(openDescriptors).toBeLessThanOrEqual(before);
    const fake = await loaded();
    expect(await fake.obey('verify')).toMatchObject({ wrong: 0 });
  });

  it('says what is wrong with its own options', async () => {
    await expect(serve({ snapshot: join(folder, 'nothing') })).rejects.toMatchObject({ code: 'SYSTEM' });
    await expect(serve({ snapshot: folder })).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await expect(serve({ prePaging: 'some' as never })).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await serve();
    await expect(serveSnapshot({ socketPath, snapshot })).rejects.toMatchObject({ code: 'SYSTEM' });
  });
});
