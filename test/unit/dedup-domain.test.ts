import { createHmac } from 'node:crypto';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { dedupOption } from '../../src/cli/leaving-guest.js';
import { modes, resolveMigrateOptions, resolveParkOptions } from '../../src/options.js';
import { dedupDomainKey, domainKey } from '../../src/source/dedup-domain.js';
import { dedupReport } from '../../src/source/dedup-report.js';
import { sealDomainKey, sealSecret, unsealDomainKey, unsealSecret } from '../../src/staging/image-secret.js';
import { connection, FakeServer, imageId, makeImage, newImage } from './fake-stage.js';

const hosts = Buffer.from('the secret of all hosts');
const key = Uint8Array.from({ length: 32 }, (_, at) => 255 - at);
const session = Uint8Array.from({ length: 32 }, (_, at) => at);
const id = Buffer.from(imageId, 'hex');

describe('the key of a deduplication domain', () => {
  let folder: string;
  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'memferry-domain-'));
  });
  afterEach(() => rm(folder, { recursive: true }));

  it('is none without deduplication', async () => {
    expect(await dedupDomainKey(false, hosts)).toBe(null);
  });

  it("is the guest's own, and nobody else's, where no domain is named", async () => {
    const [one, other] = [await dedupDomainKey(true, hosts), await dedupDomainKey(true, hosts)];
    expect(one).toHaveLength(32);
    expect(one).not.toEqual(other);
  });

  it("comes from the domain's name and the hosts' secret, or a secret of its own", async () => {
    const expected = createHmac('sha256', hosts).update('memferry dedup domain').update('web').digest();
    expect(await dedupDomainKey({ domain: 'web' }, hosts)).toEqual(Uint8Array.from(expected));
    expect(await dedupDomainKey({ domain: 'web' }, hosts)).toEqual(domainKey(hosts, 'web'));
    expect(await dedupDomainKey({ domain: 'db' }, hosts)).not.toEqual(domainKey(hosts, 'web'));
    const own = 'sixteen bytes, or more';
    const given = await dedupDomainKey({ domain: 'web', secret: own }, hosts);
    expect(given).toEqual(domainKey(Buffer.from(own), 'web'));
    expect(given).not.toEqual(domainKey(hosts, 'web'));
    const secretFile = join(folder, 'secret');
    await writeFile(secretFile, `${own}\n`, { mode: 0o600 });
    expect(await dedupDomainKey({ domain: 'web', secretFile }, hosts)).toEqual(given);
  });

  it('is not made from what others can read or guess', async () => {
    const secretFile = join(folder, 'open');
    await writeFile(secretFile, 'sixteen bytes, or more', { mode: 0o644 });
    await expect(dedupDomainKey({ domain: 'web', secretFile }, hosts)).rejects.toMatchObject({
      code: 'AUTH_FAILED',
    });
    await expect(dedupDomainKey({ domain: 'web', secret: 'short' }, hosts)).rejects.toMatchObject({
      code: 'INVALID_ARGUMENT',
    });
  });

  it("travels sealed, and is never taken for an image's secret", () => {
    const sealed = sealDomainKey(session, id, key);
    expect(unsealDomainKey(session, id, sealed)).toEqual(key);
    for (const wrong of [
      () => unsealSecret(session, id, sealed),
      () => unsealDomainKey(session, id, sealSecret(session, id, key)),
      () => unsealDomainKey(key, id, sealed),
      () => unsealDomainKey(session, Buffer.alloc(16), sealed),
    ]) {
      expect(wrong).toThrow(expect.objectContaining({ code: 'AUTH_FAILED' }));
    }
  });

  it('reaches every server with the image, and their identities come back', async () => {
    const server = await FakeServer.start();
    const image = newImage({ domainKey: key });
    const set = await makeImage([server.address], connection(), image);
    try {
      expect(server.native.images.get(imageId)?.domainKey).toEqual(key);
      expect(set.domainKey).toEqual(key);
      expect(set.servers[0]?.identity).toBe(server.native.identity());
      const other = '11'.repeat(16);
      const plain = await makeImage([server.address], connection(), newImage({ image: other }));
      expect(server.native.images.get(other)?.domainKey).toBe(null);
      expect(plain.domainKey).toBe(null);
      await plain.close();
    } finally {
      await set.close();
      await server.close();
    }
  });
});

describe('the option', () => {
  const to = '127.0.0.1:1';

  it('is off unless asked for', () => {
    expect(resolveMigrateOptions({ to, mode: 'scatter' }).dedup).toBe(false);
  });

  it('is for all modes, and parks', () => {
    for (const mode of modes) {
      expect(resolveMigrateOptions({ to, mode, dedup: true }).dedup).toBe(true);
      expect(resolveMigrateOptions({ to, mode, dedup: { domain: 'web' } }).dedup).toEqual({ domain: 'web' });
    }
    expect(resolveParkOptions({ dedup: { domain: 'web' } }).dedup).toEqual({ domain: 'web' });
    expect(resolveParkOptions({}).dedup).toBe(false);
    for (const dedup of [{}, { domain: '' }, { domain: 'a', key: 'x' }, 'web', 1]) {
      expect(() => resolveMigrateOptions({ to, mode: 'scatter', dedup: dedup as never })).toThrow(
        expect.objectContaining({ code: 'INVALID_ARGUMENT' }),
      );
    }
  });

  it('comes from the command line', () => {
    expect(dedupOption({})).toBe(undefined);
    expect(dedupOption({ dedup: true })).toBe(true);
    expect(dedupOption({ dedupDomain: 'web' })).toEqual({ domain: 'web' });
    expect(dedupOption({ dedup: true, dedupDomain: 'web', dedupSecretFile: '/s' })).toEqual({
      domain: 'web',
      secretFile: '/s',
    });
    expect(() => dedupOption({ dedup: true, dedupSecretFile: '/s' })).toThrow(/--dedup-domain/);
  });
});

describe('the report', () => {
  const stats = {
    pages: 10,
    refused: 1,
    examined: 30,
    probes: 20,
    overheadBytes: 1000,
    hashMs: 2.5,
    linkBytesPerSecond: null,
  };

  it('takes off what was said', () => {
    expect(dedupReport(stats, 4096)).toEqual({
      pagesDeduplicated: 10,
      bytesSaved: 39_960,
      pagesHashed: 30,
      cpuMs: 2.5,
      probes: 20,
      refused: 1,
    });
    expect(dedupReport({ ...stats, pages: 0 }, 4096).bytesSaved).toBe(-1000);
  });
});
