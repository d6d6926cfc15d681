/**
 * A guest of QEMU whose RAM is reserved huge pages of 2 MiB: one journey through every mode, from huge pages to huge pages,
 * to ordinary ones and back, every byte verified, and the guest checks its own memory on its way. Then what goes wrong with
 * its pages on their way.
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { forEachTest } from '../support/command-line.js';
import { HugePagePool } from '../support/huge-pages.js';
import { destinationOf, sourceOf, stageFor } from '../support/qemu/commands.js';
import { guestArguments, problemOf, Qemu, qemuObstacle } from '../support/qemu/rig.mjs';

const memoryMb = 160;
/** Of two QEMUs, the one that is left and the one that is reached. */
const WANTED = 2 * (memoryMb / 2) + 4;

const pool = new HugePagePool();
let obstacle = qemuObstacle();
if (!obstacle) {
  obstacle = pool.reserve(WANTED);
  if (obstacle) pool.restore();
}
if (obstacle) console.warn(`skipped: guests of QEMU's in huge pages: ${obstacle}`);

type AQemu = InstanceType<typeof Qemu>;

describe.skipIf(obstacle !== null)('a guest of QEMU in huge pages', () => {
  const place = forEachTest();
  let hugetlbfs = '';
  let here: AQemu;
  /** What the guest wrote where it was before. */
  const before: string[] = [];

  const backends = () => ({
    memfd: `memory-backend-memfd,id=ram0,size=${memoryMb}M,share=on,hugetlb=on,hugetlbsize=2M`,
    // All of them taken, and touched, before the guest comes.
    preallocated: `memory-backend-memfd,id=ram0,size=${memoryMb}M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on`,
    file: `memory-backend-file,id=ram0,size=${memoryMb}M,share=on,mem-path=${hugetlbfs}`,
    ordinary: null,
  });
  type Kind = keyof ReturnType<typeof backends>;
  /** In a mount namespace of its own where it needs a mount. */
  const start = (kind: Kind, incoming: boolean) =>
    Qemu.start({
      args: guestArguments({ memoryMb, backend: backends()[kind] }),
      incoming,
      prefix: kind === 'file' ? ['unshare', '-m', 'sh', '-c', mounting(), 'sh'] : [],
    });
  const mounting = () => `mount -t hugetlbfs -o pagesize=2M none ${hugetlbfs} && exec "$@"`;

  beforeAll(async () => {
    hugetlbfs = mkdtempSync(join(tmpdir(), 'memferry-hugetlbfs-'));
    here = await start('memfd', false);
    await here.ticks(20, 120_000);
  }, 240_000);
  afterAll(async () => {
    await here?.stop();
    rmSync(hugetlbfs, { recursive: true });
    pool.restore();
  });

  const account = () => problemOf([...before, here.serial]);

  test.each([
    ['hybrid', 'memfd'],
    ['post-copy', 'preallocated'],
    ['scatter', 'file'],
    ['scatter-pre-copy', 'memfd'],
    ['scatter-hybrid', 'ordinary'],
    ['pre-copy', 'file'],
    ['stop-and-copy', 'memfd'],
  ] as const)('%s, to a QEMU with %s', async (mode, kind) => {
    const there = await start(kind, true);
    const destination = destinationOf(there, place.secretFile);
    const { port } = await destination.next('listening');
    const via = mode.startsWith('scatter') ? ['--via', await stageFor(place.secretFile)] : [];
    const source = sourceOf(here, port, place.secretFile, '--mode', mode, ...via);
    const [report] = await Promise.all([source.next('report'), destination.next('report')]);
    expect([await source.closed, await destination.closed]).toEqual([0, 0]);
    await here.ended;
    before.push(here.serial);
    here.kill();
    here = there;
    await here.ticks(40);
    expect(account()).toBeNull();
    expect(report).toMatchObject({ mode, state: 'completed', verified: true, heapBytes: memoryMb * 2 ** 20 });
  });

  test('the QEMU there is killed in the rounds: the guest runs on', async () => {
    const there = await start('memfd', true);
    try {
      const destination = destinationOf(there, place.secretFile);
      const { port } = await destination.next('listening');
      const source = sourceOf(here, port, place.secretFile, '--mode', 'hybrid', '--bandwidth', '2M');
      await destination.next('arrival');
      there.process.kill('SIGKILL');
      expect(await source.closed).toBe(1);
      expect(await destination.closed).not.toBe(0);
      await here.ticks(20);
      expect(account()).toBeNull();
    } finally {
      await there.stop();
    }
  });

  test('its pager is killed with pages on their way: the guest waits, and never reads zeros', async () => {
    const there = await start('memfd', true);
    try {
      const destination = destinationOf(there, place.secretFile);
      const { port } = await destination.next('listening');
      sourceOf(here, port, place.secretFile, '--mode', 'post-copy', '--bandwidth', '8M');
      await destination.next('resumed');
      destination.child.kill('SIGKILL');
      await destination.closed;
      // It stands within a bound: a second without a word, of a guest that says several.
      let said = there.serial;
      let saidAt = performance.now();
      for (const end = saidAt + 20_000; performance.now() < saidAt + 1000; ) {
        await new Promise((resolve) => setTimeout(resolve, 50));
        if (there.serial === said) continue;
        said = there.serial;
        saidAt = performance.now();
        expect(saidAt, 'the guest goes on without its pages').toBeLessThan(end);
      }
      const whole = said.slice(0, said.lastIndexOf('\n') + 1);
      expect(problemOf([...before, here.serial, whole])).toBeNull();
    } finally {
      await there.stop();
    }
  });
});
