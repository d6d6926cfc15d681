import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  closeSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { connect as netConnect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { closeDescriptors, FdConnection, FdListener } from '../../src/fd-channel.js';

const bounds = { mostBytes: 1000, mostDescriptors: 2, timeoutMs: 5000 };
const openDescriptors = () => readdirSync('/proc/self/fd').length;

describe('a socket that carries descriptors', () => {
  let folder: string;
  let path: string;
  let listener: FdListener;
  let accepted: FdConnection[];
  let before: number;

  const pair = async (): Promise<[FdConnection, FdConnection]> => {
    const count = accepted.length;
    const client = await FdConnection.connect(path);
    await expect.poll(() => accepted.length).toBeGreaterThan(count);
    return [client, accepted.at(-1) as FdConnection];
  };

  beforeEach(async () => {
    folder = mkdtempSync(join(tmpdir(), 'memferry-fds-'));
    path = join(folder, 'socket');
    accepted = [];
    listener = new FdListener(path, {
      mostConnections: 3,
      onConnection: (connection) => accepted.push(connection),
    });
    // The first event queue's own descriptors stay open.
    const [client, server] = await pair();
    client.close();
    server.close();
    before = openDescriptors();
  });
  afterEach(() => {
    for (const connection of accepted) connection.close();
    listener.close();
    rmSync(folder, { recursive: true });
  });

  it.each<[string, () => unknown]>([
    [
      'throws',
      () => {
        throw new Error('not mine');
      },
    ],
    ['rejects', () => Promise.reject(new Error('not mine'))],
  ])('whoever %s in onConnection has it closed, and others come', async (_, fails) => {
    const other = join(folder, 'other');
    let seen = 0;
    const warned = once(process, 'warning');
    using _failing = new FdListener(other, {
      onConnection: () => {
        seen += 1;
        return fails() as undefined;
      },
    });
    for (let times = 1; times < 3; times++) {
      const client = await FdConnection.connect(other);
      expect((await client.receive(bounds)).bytes).toHaveLength(0);
      client.close();
      expect(seen).toBe(times);
    }
    expect((await warned)[0]).toMatchObject({
      code: 'MEMFERRY_LISTENER',
      message: expect.stringMatching(/^onConnection (threw|rejected): not mine$/),
    });
  });

  it('keeps a process that waits for an answer alive', async () => {
    const library = new URL('../../lib/fd-channel.js', import.meta.url);
    const program = `
      import { FdConnection } from '${library}';
      const connection = await FdConnection.connect('${path}');
      const { bytes } = await connection.receive(${JSON.stringify(bounds)});
      console.log(bytes.toString());
      connection.close();`;
    const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let said = '';
    child.stdout.on('data', (text) => {
      said += text;
    });
    const count = accepted.length;
    await expect.poll(() => accepted.length, { timeout: 10_000 }).toBeGreaterThan(count);
    await new Promise((resolve) => setTimeout(resolve, 300));
    await accepted
      .at(-1)
      ?.send(Buffer.from('an answer'))
      .catch(() => {});
    // 13: Node found nothing left to wait for.
    expect([await new Promise((resolve) => child.once('close', resolve)), said.trim()]).toEqual([
      0,
      'an answer',
    ]);
  });

  it('hands over open files, and knows the peer', async () => {
    const [client, server] = await pair();
    expect(server.peer).toMatchObject({
      pid: process.pid,
      uid: process.getuid?.(),
      pidfd: expect.any(Number),
    });
    writeFileSync(join(folder, 'file'), 'content');
    const file = openSync(join(folder, 'file'), 'r');
    await client.send(Buffer.from('take this'), [file]);
    closeSync(file);
    const piece = await server.receive(bounds);
    expect(piece.bytes.toString()).toBe('take this');
    const [descriptor] = piece.descriptors as [number];
    const content = Buffer.alloc(20);
    expect(readSync(descriptor, content)).toBe(7);
    closeDescriptors(piece.descriptors);
    await server.send(Buffer.from('thanks'));
    expect((await client.receive(bounds)).bytes.toString()).toBe('thanks');
    client.close();
    expect((await server.receive(bounds)).bytes.length).toBe(0);
    await expect(server.send(Buffer.from('x'))).rejects.toMatchObject({ code: 'PEER_LOST' });
    server.close();
    expect(openDescriptors()).toBe(before);
  });

  it('puts pieces together, and closes what came when they are refused', async () => {
    const [client, server] = await pair();
    const whole = server.receiveWhole(bounds, (bytes) => bytes.at(-1) === 33);
    await client.send(Buffer.from('one '), [0]);
    await client.send(Buffer.from('two!'), [0]);
    const piece = await whole;
    expect(piece.bytes.toString()).toBe('one two!');
    expect(piece.descriptors.length).toBe(2);
    closeDescriptors(piece.descriptors);

    const third = server.receiveWhole(bounds, () => false);
    const refused = expect(third).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    await client.send(Buffer.from('a'), [0, 0]);
    await client.send(Buffer.from('b'), [0]);
    await refused;
    const large = server.receiveWhole(bounds, () => false);
    const tooLarge = expect(large).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    await client.send(Buffer.alloc(bounds.mostBytes + 1), [0]);
    await tooLarge;
    const silent = server.receiveWhole({ ...bounds, timeoutMs: 50 }, () => false);
    const lost = expect(silent).rejects.toMatchObject({ code: 'PEER_LOST' });
    await client.send(Buffer.from('a'), [0]);
    await lost;
    client.close();
    server.close();
    expect(openDescriptors()).toBe(before);
  });

  it('closes what arrives when nobody takes it any more', async () => {
    const [client, server] = await pair();
    await client.send(Buffer.from('a'), [0, 0]);
    const waiting = expect(server.receive(bounds)).rejects.toMatchObject({ code: 'CANCELLED' });
    server.close();
    server.close();
    await waiting;
    await expect(server.receive(bounds)).rejects.toMatchObject({ code: 'CANCELLED' });
    client.close();
    await expect.poll(openDescriptors).toBe(before);
  });

  it('turns away one too many, and refuses what makes no sense', async () => {
    const three = [await pair(), await pair(), await pair()];
    const socket = netConnect(path);
    await new Promise((resolve) => socket.once('close', resolve).resume());
    for (const [client, server] of three) {
      client.close();
      server.close();
    }
    await pair();
    expect(() => new FdListener(path, { onConnection: () => {} })).toThrow(
      expect.objectContaining({ code: 'SYSTEM' }),
    );
    // It looked whether somebody listens, by connecting: that comes as a connection that says nothing.
    await expect.poll(() => accepted.length).toBe(6);
    expect(() => new FdListener('x'.repeat(200), { onConnection: () => {} })).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
    );
    expect(statSync(path).mode & 0o777).toBe(0o600);
    const [client, server] = await pair();
    await expect(client.send(Buffer.from('a'), [99999])).rejects.toMatchObject({ code: 'SYSTEM' });
    await expect(client.send(Buffer.alloc(0), [0])).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    const one = server.receive(bounds);
    await expect(server.receive(bounds)).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' });
    await client.send(Buffer.from('fine'));
    expect((await one).bytes.toString()).toBe('fine');
    client.close();
    await expect(FdConnection.connect(join(folder, 'nothing'))).rejects.toMatchObject({ code: 'SYSTEM' });
  });
});
