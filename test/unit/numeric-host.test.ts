/** Names that a listener is given. */
import { expect, it } from 'vitest';
import { numericHost } from '../../src/control/numeric-host.js';
import { listen, stage } from '../../src/index.js';

const never = () => Promise.reject(new Error('nobody was to be asked'));
const ask = (host: string, resolve: (name: string) => Promise<{ address: string }>, signal?: AbortSignal) =>
  numericHost(host, 'stage.host', signal, resolve);

it('asks nobody about addresses and localhost', async () => {
  for (const [host, numeric] of [
    ['10.0.0.1', '10.0.0.1'],
    ['0.0.0.0', '0.0.0.0'],
    ['::', '::'],
    ['[::1]', '::1'],
    ['localhost', '127.0.0.1'],
    ['LocalHost', '127.0.0.1'],
  ] as const) {
    expect(await ask(host, never)).toBe(numeric);
  }
});

it('takes the first address of a name, and says so when it has none', async () => {
  expect(await ask('spare1', async () => ({ address: '10.0.0.11' }))).toBe('10.0.0.11');
  const unknown = () => Promise.reject(Object.assign(new Error('getaddrinfo'), { code: 'ENOTFOUND' }));
  await expect(ask('spare9', unknown)).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining("stage.host: 'spare9'"),
    facts: { host: 'spare9' },
  });
  const signal = AbortSignal.abort();
  await expect(ask('slow', () => new Promise(() => {}), signal)).rejects.toMatchObject({ code: 'CANCELLED' });
});

it('is what both kinds of listeners do', async () => {
  const secret = 'a secret that only this test knows';
  const server = await stage({ host: 'LOCALHOST', secret, memoryBytes: 2 ** 24 });
  const listener = await listen({ host: 'LOCALHOST', secret });
  expect(server.host).toBe('LOCALHOST');
  await Promise.all([server.close(), listener.close()]);
  // Whatever address a name has, it is no loopback.
  await expect(stage({ host: 'spare.invalid', secret, memoryBytes: 2 ** 24 })).rejects.toMatchObject({
    code: 'PLAINTEXT_REQUIRED',
  });
  for (const open of [
    () => stage({ host: 'spare.invalid', secret, plaintext: true, memoryBytes: 2 ** 24 }),
    () => listen({ host: 'spare.invalid', secret, plaintext: true }),
  ]) {
    await expect(open()).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
      facts: { host: 'spare.invalid' },
    });
  }
});
