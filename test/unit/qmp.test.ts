/** The QMP client against servers that behave, and against ones that do not. */
import { mkdtempSync, rmSync } from 'node:fs';
import { createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, test } from 'vitest';
import { Qmp } from '../../src/qemu/qmp.js';

const greeting =
  '{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": []}}';

let directory: string;
let path: string;
let server: Server;
const sockets = new Set<Socket>();

beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'qmp-test-'));
  path = join(directory, 'qmp');
});
afterEach(async () => {
  for (const socket of sockets) socket.destroy();
  sockets.clear();
  await new Promise((resolve) => (server?.listening ? server.close(resolve) : resolve(null)));
  rmSync(directory, { recursive: true, force: true });
});

interface Asked {
  execute: string;
  arguments: Record<string, unknown>;
  id: number;
}

/** `answer` gives what is written for a command; `hello` is written at once. */
async function serve(
  answer: (asked: Asked, socket: Socket) => string | null,
  hello = `${greeting}\r\n`,
): Promise<void> {
  server = createServer((socket) => {
    sockets.add(socket);
    socket.on('error', () => {});
    socket.write(hello);
    let text = '';
    socket.setEncoding('utf8').on('data', (piece) => {
      text += piece;
      for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n')) {
        const asked = JSON.parse(text.slice(0, end)) as Asked;
        text = text.slice(end + 1);
        const said = answer(asked, socket);
        if (said !== null) socket.write(said);
      }
    });
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
}

const ok = ({ id }: Asked, value: unknown = {}) => `${JSON.stringify({ return: value, id })}\r\n`;
const wellBehaved = (asked: Asked) => ok(asked, asked.execute === 'echo' ? asked.arguments : {});

test('greets, asks, and gives each answer to its question, in whatever order they come', async () => {
  const held: Asked[] = [];
  await serve((asked) => {
    if (asked.execute !== 'echo') return ok(asked);
    held.push(asked);
    return held.length < 3
      ? null
      : held
          .reverse()
          .map((one) => ok(one, one.arguments))
          .join('');
  });
  await using qmp = await Qmp.connect(path);
  expect(qmp.version).toBe('7.2.22');
  const answers = await Promise.all([1, 2, 3].map((n) => qmp.execute('echo', { n })));
  expect(answers).toEqual([{ n: 1 }, { n: 2 }, { n: 3 }]);
});

test('lines come in pieces, several in one, and with events between', async () => {
  await serve((asked, socket) => {
    if (asked.execute === 'qmp_capabilities') return ok(asked);
    const text = `{"event": "STOP", "timestamp": {}}\r\n\r\n${ok(asked, 'ä')}{"event": "MIGRATION", "data": {"status": "completed"}}\r\n`;
    const bytes = Buffer.from(text);
    for (const [i, byte] of bytes.entries()) setTimeout(() => socket.write(Buffer.of(byte)), i / 10);
    return null;
  });
  await using qmp = await Qmp.connect(path);
  const seen: string[] = [];
  qmp.on('event', ({ name }) => seen.push(name));
  const completed = qmp.event(({ data }) => data['status'] === 'completed', 'the end');
  expect(await qmp.execute('query')).toBe('ä');
  expect(await completed).toEqual({ name: 'MIGRATION', data: { status: 'completed' } });
  expect(seen).toEqual(['STOP', 'MIGRATION']);
});

test("a refusal has QEMU's own words", async () => {
  await serve((asked) =>
    asked.execute === 'cont'
      ? `${JSON.stringify({ id: asked.id, error: { class: 'GenericError', desc: 'Migration is not finalized yet' } })}\n`
      : ok(asked),
  );
  await using qmp = await Qmp.connect(path);
  await expect(qmp.execute('cont')).rejects.toMatchObject({
    code: 'QEMU_REFUSED',
    message: 'QEMU refuses cont: Migration is not finalized yet',
    facts: { command: 'cont', class: 'GenericError' },
  });
  // And is still there.
  expect(await qmp.execute('stop')).toEqual({});
});

test('nobody listens', async () => {
  await expect(Qmp.connect(path)).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
});

test('a server that another client holds says nothing', async () => {
  await serve(wellBehaved, '');
  await expect(Qmp.connect(path, { timeoutMs: 100 })).rejects.toMatchObject({ code: 'CONNECT_FAILED' });
});

test.each([
  ['no JSON', 'SSH-2.0-OpenSSH\r\n'],
  ['another greeting', '{"hello": 1}\n'],
  ['a version that is none', '{"QMP": {"version": {"qemu": {"major": "7"}}}}\n'],
  ['a line without an end', 'x'.repeat(1_100_000)],
  ['depths', `${'['.repeat(400_000)}\n`],
])('it is no QMP: %s', async (_, hello) => {
  await serve(wellBehaved, hello);
  await expect(Qmp.connect(path)).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
});

test.each([
  ['an answer nobody asked for', () => '{"return": {}, "id": 999}\n'],
  ['an answer without a number', () => '{"return": {}}\n'],
  ['an answer to the same twice', (asked: Asked) => ok(asked) + ok(asked)],
  ['a line that is too long', () => `{"return": "${'x'.repeat(1_100_000)}"}\n`],
  ['no JSON', () => '}\n'],
])('one that breaks the rules is let go of: %s', async (_, answer) => {
  await serve((asked) => (asked.execute === 'break' ? answer(asked) : ok(asked)));
  await using qmp = await Qmp.connect(path);
  await qmp.execute('break').catch(() => {});
  expect((await qmp.closed).code).toBe('PROTOCOL_ERROR');
  await expect(qmp.execute('stop')).rejects.toMatchObject({ code: 'PROTOCOL_ERROR' });
});

test('a QEMU that ends fails what waits for it', async () => {
  await serve((asked, socket) => {
    if (asked.execute === 'quit') socket.destroy();
    return asked.execute === 'qmp_capabilities' ? ok(asked) : null;
  });
  await using qmp = await Qmp.connect(path);
  const waiting = qmp.event(() => false, 'an event');
  const asked = qmp.execute('never');
  await expect(qmp.execute('quit')).rejects.toMatchObject({ code: 'PEER_LOST' });
  await expect(asked).rejects.toMatchObject({ code: 'PEER_LOST' });
  await expect(waiting).rejects.toMatchObject({ code: 'PEER_LOST' });
});

test('one that hangs is waited for so long; its late answer disturbs nobody', async () => {
  let late: (() => void) | null = null;
  await serve((asked, socket) => {
    if (asked.execute !== 'slow') return wellBehaved(asked);
    late = () => socket.write(ok(asked));
    return null;
  });
  await using qmp = await Qmp.connect(path);
  await expect(qmp.execute('slow', {}, { timeoutMs: 50 })).rejects.toMatchObject({
    code: 'PEER_LOST',
    facts: { command: 'slow' },
  });
  (late as (() => void) | null)?.();
  expect(await qmp.execute('echo', { a: 1 })).toEqual({ a: 1 });
});

test('questions that are not answered are bounded', async () => {
  await serve((asked) => (asked.execute === 'qmp_capabilities' ? ok(asked) : null));
  await using qmp = await Qmp.connect(path);
  const asked = Array.from({ length: 64 }, () =>
    qmp.execute('x', {}, { timeoutMs: 10_000 }).catch((e) => e.code),
  );
  await expect(qmp.execute('x')).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
  await qmp.close();
  expect(new Set(await Promise.all(asked))).toEqual(new Set(['CANCELLED']));
});

test('what is cancelled ends at once', async () => {
  await serve((asked) => (asked.execute === 'qmp_capabilities' ? ok(asked) : null));
  await using qmp = await Qmp.connect(path);
  const abort = new AbortController();
  const asked = qmp.execute('x', {}, { signal: abort.signal });
  abort.abort();
  await expect(asked).rejects.toMatchObject({ code: 'CANCELLED' });
  await expect(Qmp.connect(path, { signal: abort.signal })).rejects.toMatchObject({ code: 'CANCELLED' });
});
