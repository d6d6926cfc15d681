/** The commands of docs/firecracker.md as they are written there, with the paths and ports of the test. */
import { execFile } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { expect, test } from 'vitest';
import { migrate, snapshotGuest } from '../../lib/index.js';
import { command, forEachTest } from '../support/command-line.js';
import { FakeFirecracker } from '../support/fake-firecracker.js';
import { makeSnapshot } from '../support/micro-vm.js';

const run = promisify(execFile);
const place = forEachTest();
const guide = readFileSync(fileURLToPath(new URL('../../docs/firecracker.md', import.meta.url)), 'utf8');
const bytes = 16 * 2 ** 20;
const secretFlags = () => ['--secret-file', place.secretFile];

/** The command below the mark. */
function commandAt(mark: string): string {
  const block = new RegExp(`<!-- by hand: ${mark} -->\n\`\`\`console\n\\$ ([^]*?)\`\`\``).exec(guide);
  if (!block) throw new Error(`no command '${mark}' in docs/firecracker.md`);
  return (block[1] ?? '').replaceAll('/run/vm', place.directory).replaceAll('/srv/vm', place.directory);
}

/** What stands behind `memferry` in it. */
function written(mark: string, replaced: Record<string, string> = {}): string[] {
  let text = commandAt(mark).trim();
  for (const [from, to] of Object.entries(replaced)) text = text.replaceAll(from, to);
  const [program, ...rest] = text.split(' ');
  expect(program).toBe('memferry');
  return rest;
}

const memory = () => join(place.directory, 'memory');
const socket = () => join(place.directory, 'uffd.sock');
const snapshot = () => {
  makeSnapshot(memory(), bytes);
  writeFileSync(join(place.directory, 'vmstate'), JSON.stringify({ flags: ['--bytes', bytes], expect: [] }));
};

test('from a file', async () => {
  snapshot();
  const handler = command(...written('file'));
  await handler.next('listening');
  const fake = await new FakeFirecracker(join(place.directory, 'api.sock')).listen();
  fake.mayResumeOnLoad = true;
  try {
    // What the API answers where something is wrong, it would write.
    expect(await run('bash', ['-c', commandAt('load')])).toMatchObject({ stdout: '' });
    expect(fake.running).toBe(true);
    expect(await handler.next('connected')).toMatchObject({
      pid: fake.microVm?.child.pid,
      heapBytes: bytes,
    });
    expect(await fake.microVm?.obey('random 300 1')).toMatchObject({ wrong: 0 });
    fake.microVm?.kill();
    expect(await handler.next('report')).toMatchObject({ end: 'owner-gone', stats: { pagesLost: 0 } });
    handler.child.kill('SIGTERM');
    expect(await handler.closed).toBe(0);
  } finally {
    fake.close();
  }
});

test('into the VMD and from there', async () => {
  snapshot();
  const server = command(
    ...['stage', '--listen', '127.0.0.1:0', '--memory', '64Mi', '--no-announce'],
    ...secretFlags(),
  );
  const { port } = await server.next('listening');
  const parking = command(...written('park', { '127.0.0.1:7070': `127.0.0.1:${port}` }), ...secretFlags());
  expect(await parking.next('report')).toMatchObject({ guest: 'microvm', heapBytes: bytes });
  expect(await parking.closed, parking.errors()).toBe(0);
  const fake = await new FakeFirecracker(join(place.directory, 'api.sock')).listen();
  try {
    const handler = command(...written('vmd'), ...secretFlags());
    await handler.next('granted');
    await expect.poll(() => fake.running).toBe(true);
    expect(await fake.microVm?.obey('verify')).toMatchObject({ wrong: 0 });
    expect(await handler.next('report')).toMatchObject({ guest: 'microvm', heapBytes: bytes });
    fake.microVm?.kill();
    expect(await handler.closed, handler.errors()).toBe(0);
  } finally {
    fake.close();
  }
});

test('a VMD server loses its part: told at once, the other pages still come, and the exit code says it', async () => {
  snapshot();
  const startServer = async () => {
    const flags = ['stage', '--listen', '127.0.0.1:0', '--memory', '64Mi', '--no-announce'];
    return `127.0.0.1:${(await command(...flags, ...secretFlags()).next('listening'))['port']}`;
  };
  const servers = [await startServer(), await startServer()];
  const parking = command(...written('park', { '127.0.0.1:7070': servers.join(',') }), ...secretFlags());
  const { image } = await parking.next('report');
  expect(await parking.closed, parking.errors()).toBe(0);
  const fake = await new FakeFirecracker(join(place.directory, 'api.sock')).listen();
  try {
    const handler = command(...written('vmd'), ...secretFlags(), '--gather-limit', '1Mi');
    await handler.next('granted');
    const dropping = command('drop', servers[1] as string, image as string, ...secretFlags());
    expect(await dropping.closed, dropping.errors()).toBe(0);
    const runs = (await handler.next('lost'))['runs'] as { first: number; count: number }[];
    expect(await handler.closed).toBe(4);
    expect(handler.errors()).toMatch(/^memferry: PAGES_LOST: [^\n]*\n$/);
    // Nobody serves it any more: what was not lost is there.
    let next = 0;
    let kept = 0;
    for (const { first, count } of [...runs, { first: bytes / 4096, count: 0 }]) {
      if (first > next)
        expect(await fake.microVm?.obey(`verify ${next} ${first - next}`)).toMatchObject({ wrong: 0 });
      kept += first - next;
      next = first + count;
    }
    expect(kept).toBeGreaterThan(0);
    expect(kept).toBeLessThan(bytes / 4096);
  } finally {
    fake.close();
  }
});

test('from a running migration', async () => {
  snapshot();
  const fake = await new FakeFirecracker(join(place.directory, 'api.sock')).listen();
  try {
    const handler = command(
      ...written('listen', { '127.0.0.1:7071': '127.0.0.1:0' }),
      ...secretFlags(),
      '--once',
    );
    const { port } = await handler.next('listening');
    using guest = await snapshotGuest('box', { memory: memory(), state: join(place.directory, 'vmstate') });
    const migration = migrate(guest, {
      to: `127.0.0.1:${port}`,
      mode: 'post-copy',
      secretFile: place.secretFile,
    });
    await handler.next('granted');
    expect(await fake.microVm?.obey('verify')).toMatchObject({ wrong: 0 });
    await migration.done;
    expect(await handler.next('report')).toMatchObject({ guest: 'box' });
    expect(await handler.closed, handler.errors()).toBe(0);
    // It is over, and the guest goes on by itself.
    expect(await fake.microVm?.obey('verify')).toMatchObject({ wrong: 0 });
  } finally {
    fake.close();
  }
});

test('no migration comes, and the handler that waits for it --once is interrupted', async () => {
  const handler = command(
    ...written('listen', { '127.0.0.1:7071': '127.0.0.1:0' }),
    ...secretFlags(),
    '--once',
  );
  await handler.next('listening');
  handler.child.kill('SIGTERM');
  expect(await handler.closed).toBe(130);
  expect(handler.errors()).toMatch(/^memferry: CANCELLED: [^\n]*\n$/);
});

test('says what is missing', async () => {
  for (const flags of [
    [],
    ['--from-vmd', 'nothing', '--snapshot', 'nothing'],
    ['--from-vmd', 'nothing'],
    ['--snapshot', 'nothing', '--mode', '9'],
    ['--snapshot', 'nothing', '--pre-paging', 'some'],
  ]) {
    const handler = command('firecracker', '--socket', socket(), ...flags);
    expect(await handler.closed, flags.join(' ')).toBe(2);
    expect(handler.errors()).toContain('memferry: INVALID_ARGUMENT');
  }
});
