import { createServer, type Server, type Socket } from 'node:net';
import { afterEach, describe, expect, test } from 'vitest';
import { GuestFinder, type HostAddress } from '../../src/demo/guest-finder.js';
import { LatencyRecord } from '../../src/demo/latency.js';
import { compareLedger } from '../../src/demo/ledger.js';
import { type LineReply, type LineRequest, receiveLines, sendLine } from '../../src/demo/lines.js';

type Answer = (request: LineRequest, socket: Socket) => LineReply | null;

const open: { server: Server; sockets: Set<Socket> }[] = [];

async function host(answer: Answer): Promise<HostAddress> {
  const sockets = new Set<Socket>();
  const server = createServer((socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    receiveLines(socket, (message) => {
      const reply = answer(message as LineRequest, socket);
      if (reply) sendLine(socket, reply);
    });
  });
  open.push({ server, sockets });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  return { host: '127.0.0.1', port: (server.address() as { port: number }).port };
}

afterEach(async () => {
  for (const { server, sockets } of open.splice(0)) {
    for (const socket of sockets) socket.destroy();
    await new Promise((resolve) => server.close(resolve));
  }
});

const elsewhere: Answer = ({ number }) => ({ number, elsewhere: true });

describe('finding the guest', () => {
  test('at the other host, and going there first from then on', async () => {
    const asked: [number, number] = [0, 0];
    const a = await host((request, socket) => {
      asked[0]++;
      return elsewhere(request, socket);
    });
    const b = await host(({ number, request }) => {
      asked[1]++;
      return { number, value: request };
    });
    const finder = new GuestFinder([a, b]);
    expect(await finder.request('one')).toBe('one');
    expect(await finder.request('two')).toBe('two');
    expect(asked).toEqual([1, 2]);
    expect(finder.resent).toBe(1);
    finder.close();
  });

  test('while it is on its way: asks until somebody has it', async () => {
    let refusals = 0;
    const a = await host(elsewhere);
    const b = await host((request, socket) =>
      ++refusals < 5 ? elsewhere(request, socket) : { number: request.number, value: 'here' },
    );
    const finder = new GuestFinder([a, b]);
    expect(await finder.request('x')).toBe('here');
    finder.close();
  });

  test('sends the same request again when the connection was cut before an answer', async () => {
    const seen: unknown[] = [];
    const a = await host(({ number, request }, socket) => {
      seen.push(request);
      if (seen.length > 1) return { number, value: 'done' };
      socket.destroy();
      return null;
    });
    const finder = new GuestFinder([a]);
    expect(await finder.request({ id: 7 })).toBe('done');
    expect(seen).toEqual([{ id: 7 }, { id: 7 }]);
    finder.close();
  });

  test('gives the guest its own errors back, and does not ask again', async () => {
    let asked = 0;
    const a = await host(({ number }) => {
      asked++;
      return { number, error: { code: 'SQLITE_FULL', message: 'full' } };
    });
    const finder = new GuestFinder([a]);
    await expect(finder.request('x')).rejects.toMatchObject({ code: 'SQLITE_FULL', message: 'full' });
    expect(asked).toBe(1);
    finder.close();
  });

  test('ends when nobody has the guest, and when a host never answers', async () => {
    const finder = new GuestFinder([await host(elsewhere), await host(elsewhere)]);
    await expect(finder.request('x', 50)).rejects.toMatchObject({ code: 'PEER_LOST' });
    finder.close();
    const silent = new GuestFinder([await host(() => null)]);
    await expect(silent.request('x', 50)).rejects.toMatchObject({ code: 'PEER_LOST' });
    silent.close();
  });
});

test('a host that sends no JSON is cut off', async () => {
  const a = await host((_, socket) => {
    socket.write('not json\n');
    return null;
  });
  const finder = new GuestFinder([a]);
  await expect(finder.request('x', 200)).rejects.toMatchObject({ code: 'PEER_LOST' });
  finder.close();
});

describe('the ledger', () => {
  test('is whole when every acknowledged write is there and the sum fits', () => {
    expect(compareLedger(['a', 'b'], ['a', 'b', 'c'], [3, 3])).toEqual({ lost: 0, duplicated: 0 });
  });
  test('shows a lost write', () => {
    expect(compareLedger(['a', 'b'], ['a'], [1, 1])).toEqual({ lost: 1, duplicated: 0 });
  });
  test('shows a write that was applied in part', () => {
    expect(compareLedger(['a', 'b'], ['a', 'b'], [2, 1])).toEqual({ lost: 1, duplicated: 0 });
  });
  test('shows a write that was applied twice', () => {
    expect(compareLedger(['a', 'b'], ['a', 'b'], [2, 3])).toEqual({ lost: 0, duplicated: 1 });
    expect(compareLedger(['a'], ['a', 'a'], [1, 1])).toEqual({ lost: 0, duplicated: 1 });
  });
});

describe('latency', () => {
  test('the gap is the longest wait or the longest silence', () => {
    const record = new LatencyRecord();
    record.answered(0, 1);
    record.answered(1, 3);
    record.answered(40, 41);
    expect(record.take()).toMatchObject({ answered: 3, maxMs: 2, longestGapMs: 38 });
    record.answered(41, 91);
    expect(record.take()).toMatchObject({ answered: 1, longestGapMs: 50, p50Ms: 50 });
  });
  test('a silence that spans two takes belongs to the second', () => {
    const record = new LatencyRecord();
    record.answered(0, 1);
    record.take();
    record.answered(99, 101);
    expect(record.take().longestGapMs).toBe(100);
  });
  test('nothing is no figure', () => {
    expect(new LatencyRecord().take()).toEqual({
      answered: 0,
      p50Ms: 0,
      p99Ms: 0,
      maxMs: 0,
      longestGapMs: 0,
    });
  });
});
