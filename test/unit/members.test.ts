/** Memberships of domains over real control connections, and the options of those who have them. */
import { afterEach, describe, expect, it } from 'vitest';
import { percent } from '../../src/cli/parse-values.js';
import { sampleOptions } from '../../src/cli/send.js';
import type { NativeDirectory } from '../../src/native.js';
import { resolveDistributeOptions, resolveSampleOptions } from '../../src/options.js';
import { Directories } from '../../src/share/directories.js';
import { domainKey } from '../../src/source/dedup-domain.js';
import { StageClient } from '../../src/staging/client.js';
import { memberRoles, stageRoleCount, stageRoles } from '../../src/staging/image-secret.js';
import { connection, FakeServer, secret, until } from './fake-stage.js';

const open: { close(): Promise<unknown> }[] = [];
afterEach(async () => {
  for (const one of open.splice(0).reverse()) await one.close();
});
function owned<T extends { close(): Promise<unknown> }>(one: T): T {
  open.push(one);
  return one;
}
const serve = async (options: Parameters<typeof FakeServer.start>[0] = {}) =>
  owned(await FakeServer.start(options));
const dial = async (server: FakeServer) =>
  owned(await StageClient.dial({ ...connection(), ...server.address }));

const key = Uint8Array.from({ length: 32 }, (_, at) => at);
const id = (number: number) => number.toString(16).padStart(32, '0');
const guest = id(77);

describe('a membership', () => {
  it('is made with the key and the guest, and with the one session whose tokens both ends know', async () => {
    const server = await serve();
    const client = await dial(server);
    const session = await client.join(id(1), key, guest);
    const member = server.native.members.get(id(1));
    expect(Buffer.from(member?.domainKey ?? [])).toEqual(Buffer.from(key));
    expect(Buffer.from(member?.guest ?? []).toString('hex')).toBe(guest);
    expect(session).toMatchObject({ session: 1, identity: server.native.identity() });
    expect(member?.roles).toBe(memberRoles);
    const token = (tokens: Uint8Array | undefined, attempt: number, role: number) =>
      Buffer.from(tokens ?? [])
        .subarray((attempt * stageRoleCount + role) * 32)
        .subarray(0, 32);
    for (const attempt of [0, 63]) {
      expect(token(member?.tokens, attempt, stageRoles.popular)).toHaveLength(32);
      expect(token(member?.tokens, attempt, stageRoles.popular)).toEqual(
        token(session.tokens, attempt, stageRoles.popular),
      );
      expect(token(member?.tokens, attempt, stageRoles.scatter)).not.toEqual(
        token(session.tokens, attempt, stageRoles.scatter),
      );
    }
    await client.join(id(2), key, null);
    expect(server.native.members.get(id(2))?.guest).toBe(null);
    expect(server.staging.status()).toMatchObject({ members: 2, images: 0 });
  });

  it('ends when it is left, and with its connection', async () => {
    const server = await serve();
    const [one, other] = [await dial(server), await dial(server)];
    await one.join(id(1), key, guest);
    await one.join(id(2), key, null);
    await other.join(id(3), key, null);
    expect(await other.leave(id(1))).toBe(false);
    expect(await one.leave(id(1))).toBe(true);
    expect(await one.leave(id(1))).toBe(false);
    expect([...server.native.members.keys()]).toEqual([id(2), id(3)]);
    await one.close();
    await until(() => server.native.members.size === 1);
    expect([...server.native.members.keys()]).toEqual([id(3)]);
  });

  it('is refused by an id that is taken, and beyond so many of one connection', async () => {
    const server = await serve();
    const [one, other] = [await dial(server), await dial(server)];
    await one.join(id(1), key, null);
    await expect(other.join(id(1), key, null)).rejects.toMatchObject({ code: 'VMD_REFUSED' });
    for (let at = 2; at <= 64; at++) await one.join(id(at), key, null);
    await expect(one.join(id(65), key, null)).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    await other.join(id(65), key, null);
  });

  it('is of one of four domains on one connection', async () => {
    const server = await serve();
    const [one, other] = [await dial(server), await dial(server)];
    const keyOf = (domain: number) => new Uint8Array(32).fill(domain);
    for (let at = 1; at <= 8; at++) await one.join(id(at), keyOf(at % 4), null);
    await expect(one.join(id(9), keyOf(9), null)).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    expect(server.native.members.size).toBe(8);
    await one.join(id(10), keyOf(1), null);
    await other.join(id(11), keyOf(9), null);
    // The last one of a domain makes room for another.
    await one.leave(id(2));
    await expect(one.join(id(9), keyOf(9), null)).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
    await one.leave(id(6));
    await one.join(id(9), keyOf(9), null);
  });
});

describe('directories', () => {
  const user = () => ({
    told: [] as NativeDirectory[][],
    lost: [] as boolean[],
    setDirectories(directories: NativeDirectory[]) {
      this.told.push(directories);
      this.lost = directories.map(() => false);
    },
    stats() {
      return { lost: this.lost };
    },
  });
  const keys = { secret: Buffer.from(secret), domainKey: domainKey(Buffer.from(secret), 'd') };
  const options = (...servers: { port: number }[]) =>
    resolveSampleOptions({
      via: servers.map(({ port }) => `127.0.0.1:${port}`),
      dedup: { domain: 'd' },
      secret,
      connectTimeoutMs: 1000,
    });

  it('are joined as they answer, and again when they were lost', async () => {
    const servers = [await serve(), await serve()];
    const native = user();
    const all = owned(
      new Directories(options(...servers.map(({ address }) => address)), keys, guest, native),
    );
    await until(() => native.told.at(-1)?.length === 2);
    const before = native.told.at(-1);
    await servers[1]?.restart();
    native.lost = [false, true];
    await until(() => native.told.at(-1)?.length === 1);
    expect(all.status.map(({ connected }) => connected)).toEqual([true, false]);
    await until(() => native.told.at(-1)?.length === 2);
    const after = native.told.at(-1);
    expect(after?.[0]).toBe(before?.[0]);
    expect(Buffer.from(after?.[1]?.member ?? [])).not.toEqual(Buffer.from(before?.[1]?.member ?? []));
    expect(all.status).toMatchObject([{ connected: true }, { connected: true, problem: null }]);
  });

  it('that do not answer are no error, and said', async () => {
    const server = await serve();
    const { port } = server.address;
    await server.staging.close();
    const native = user();
    const all = owned(new Directories(options({ port }), keys, guest, native));
    await until(() => all.status[0]?.problem !== null);
    expect(all.status).toMatchObject([{ address: `127.0.0.1:${port}`, connected: false }]);
    expect(native.told).toEqual([]);
  });

  it('are let go of in the middle of joining', async () => {
    const server = await serve();
    const all = new Directories(options(server.address), keys, guest, user());
    await all.close();
    await until(() => server.native.members.size === 0);
  });
});

describe('options', () => {
  it('need servers that are addresses, and a domain', () => {
    const good = { via: ['h:1'], dedup: { domain: 'd' } };
    expect(resolveSampleOptions(good)).toMatchObject({ cpuShare: 0.01, passIntervalMs: 10_000 });
    expect(resolveDistributeOptions(good)).toMatchObject({ intervalMs: 30_000, bandwidth: 0 });
    for (const bad of [
      { ...good, via: [] },
      { ...good, via: ['nowhere'] },
      { via: ['h:1'] },
      { ...good, cpuShare: 0 },
      { ...good, cpuShare: 1.5 },
      { ...good, unknown: 1 },
    ]) {
      expect(() => resolveSampleOptions(bad as never)).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
    }
  });

  it('of the command line', () => {
    expect(sampleOptions({})).toBe(null);
    expect(sampleOptions({ sample: true, via: ['h:1'], dedupDomain: 'd' })).toMatchObject({
      via: ['h:1'],
      dedup: { domain: 'd' },
    });
    expect(() => sampleOptions({ sample: true, via: ['h:1'] })).toThrow('--dedup-domain');
    expect(percent('12.5%')).toBe(12.5);
    for (const bad of ['', '-1', '101', 'half']) expect(() => percent(bad)).toThrow();
  });
});
