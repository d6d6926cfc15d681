/** The file that claims a parked guest: what it says is used, and what is none is refused by its path. */
import { execFileSync } from 'node:child_process';
import { fstatSync } from 'node:fs';
import { type FileHandle, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test, vi } from 'vitest';
import { newTicketFile, ticketFrom, writeTicket } from '../../src/cli/ticket.js';

let directory = '';
beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'memferry-ticket-'));
});
afterEach(() => rm(directory, { recursive: true, force: true }));

const bare = { image: 'ab'.repeat(16), secret: 'cd'.repeat(32), home: '127.0.0.1:7000' };
const guest = { name: 'g', module: { name: 'm', sha256: '0A'.repeat(32) }, lineage: 'ef'.repeat(32) };

async function written(value: unknown): Promise<string> {
  const path = join(directory, 'ticket.json');
  await writeFile(path, typeof value === 'string' ? value : JSON.stringify(value));
  return path;
}

test.each([bare, { ...bare, guest }, { ...bare, guest: { ...guest, module: null } }])(
  'a ticket is what was written: %j',
  async (ticket) => expect(await ticketFrom(await written(ticket))).toEqual(ticket),
);

test.each([
  'no JSON at all',
  {},
  { ...bare, secret: 'cd' },
  { ...bare, image: 'zz'.repeat(16) },
  { ...bare, guest: { ...guest, lineage: '' } },
  { ...bare, guest: { ...guest, module: { name: 'm' } } },
  'x'.repeat(2 ** 20 + 1),
])('anything else is refused: %j', async (value) => {
  const path = await written(value);
  await expect(ticketFrom(path)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  await expect(ticketFrom(path)).rejects.toThrow(path);
});

test('a file that is not there', async () => {
  await expect(ticketFrom(join(directory, 'none'))).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
});

test('it is written whole, however little a write takes, and its name is on the disk before anybody relies on it', async () => {
  const path = join(directory, 'ticket');
  const file = await newTicketFile(path);
  const write = file.write.bind(file);
  file.write = ((bytes: Buffer, from: number, length: number, at: number) =>
    write(bytes, from, Math.min(length, 10), at)) as FileHandle['write'];
  const synced: string[] = [];
  const sync = vi.spyOn(Object.getPrototypeOf(file) as FileHandle, 'sync');
  sync.mockImplementation(async function (this: FileHandle) {
    synced.push(fstatSync(this.fd).isDirectory() ? 'directory' : await readFile(path, 'utf8'));
  });
  try {
    // Of a park that failed, and was longer.
    await writeTicket(file, path, { ...bare, home: `${bare.home}0` });
    synced.length = 0;
    await writeTicket(file, path, bare);
  } finally {
    sync.mockRestore();
    await file.close();
  }
  expect(await ticketFrom(path)).toEqual(bare);
  expect(synced).toEqual([`${JSON.stringify(bare)}\n`, 'directory']);
});

test('what is no file is refused at once', async () => {
  const fifo = join(directory, 'fifo');
  execFileSync('mkfifo', [fifo]);
  for (const path of [fifo, directory, '/dev/zero', join(directory, 'nothing')]) {
    await expect(ticketFrom(path)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
  }
});
