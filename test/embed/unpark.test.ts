/** A guest that TypeScript parked in the VMD is had back by a C program (examples/embed/unpark.c). */
import { spawn } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterEach, expect, test } from 'vitest';
import { park, Region, stage, type Staging, unpark } from '../../src/index.js';
import { SECRET } from '../support/scenario.js';
import { closeProxies, TcpProxy } from '../support/tcp-proxy.js';

const MIB = 2 ** 20;
const staging: Staging[] = [];
const directory = mkdtempSync(join(tmpdir(), 'memferry-unpark-'));
afterEach(async () => {
  await closeProxies();
  for (const server of staging.splice(0)) await server[Symbol.asyncDispose]();
  rmSync(directory, { recursive: true, force: true });
});

/** In another process, while this one serves the pages. */
function unparkInC(
  ticket: string,
  secret = SECRET,
): Promise<{ status: number | null; stdout: string; stderr: string }> {
  const child = spawn(join(process.env['MEMFERRY_EMBED_PROGRAMS'] ?? '', 'unpark'), [ticket, directory], {
    env: { ...process.env, MEMFERRY_SECRET: secret },
    timeout: 50_000,
  });
  const result = { status: null as number | null, stdout: '', stderr: '' };
  child.stdout.setEncoding('utf8').on('data', (text) => {
    result.stdout += text;
  });
  child.stderr.setEncoding('utf8').on('data', (text) => {
    result.stderr += text;
  });
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (status) => resolve({ ...result, status }));
  });
}

/** At two servers; `through`: the way to the second one. */
async function parkOne(through: (port: number) => Promise<number> = async (port) => port) {
  for (const name of ['I1', 'I2']) staging.push(await stage({ secret: SECRET, memoryBytes: 64 * MIB, name }));
  const region = Region.allocate({ lengthBytes: 8 * MIB });
  const [view] = region.views as [Uint8Array];
  const words = new Uint32Array(view.buffer, view.byteOffset, view.length / 4);
  for (let word = 0; word < words.length; word++) words[word] = Math.imul(word + 1, 2654435761);
  view.fill(0, 40 * 4096, 60 * 4096);
  const content = Buffer.from(view);
  const guest = {
    name: 'parked',
    module: null,
    regions: [{ name: 'memory', region }],
    pause: async () => Uint8Array.of(1, 2, 3),
    unpause: () => {},
  };
  const [first, second] = staging as [Staging, Staging];
  const via = [first.port, await through(second.port)].map((port) => `127.0.0.1:${port}`);
  const { ticket } = await park(guest, { secret: SECRET, via });
  region.close();
  mkdirSync(directory, { recursive: true });
  const path = join(directory, 'ticket');
  writeFileSync(path, JSON.stringify(ticket));
  return { content, ticket, path };
}

test('a server that is away, and has pages that no other has, is waited for', async () => {
  let proxy: TcpProxy | undefined;
  const { content, path } = await parkOne(async (port) => {
    proxy = await TcpProxy.start(port);
    return proxy.port;
  });
  proxy?.cut();
  const had = unparkInC(path);
  await sleep(1500);
  expect(staging[0]?.status().held).toMatchObject([{ phase: 'parked' }]);
  proxy?.heal();
  const { status, stderr } = await had;
  expect(`${status}: ${stderr}`).toBe('0: ');
  expect(content.equals(readFileSync(join(directory, '0')))).toBe(true);
  for (const server of staging) expect(server.status()).toMatchObject({ images: 0 });
});

test('every byte, from two servers, and nobody has it a second time', async () => {
  const { content, ticket, path } = await parkOne();
  const stranger = await unparkInC(path, 'a secret that is none of theirs');
  expect(stranger).toMatchObject({ status: 1, stderr: expect.stringMatching(/^claim: AUTH_FAILED/) });

  const { status, stdout, stderr } = await unparkInC(path);
  expect(`${status}: ${stderr}`).toBe('0: ');
  expect(stdout).toMatch(/^'parked' runs here: 3 bytes of state, its memory begins with 177\n/);
  expect(stdout).toMatch(/every page is here, \d+ by demand\n$/);
  expect(content.equals(readFileSync(join(directory, '0')))).toBe(true);

  const again = await unparkInC(path);
  expect(again).toMatchObject({ status: 1, stderr: expect.stringMatching(/^claim: VMD_(LOST|REFUSED)/) });
  await expect(unpark(ticket, { secret: SECRET })).rejects.toMatchObject({
    code: expect.stringMatching(/^VMD_(LOST|REFUSED)$/),
  });
  for (const server of staging) expect(await server.status()).toMatchObject({ images: 0 });
});
