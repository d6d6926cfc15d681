import { existsSync, mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Share } from '../../lib/index.js';
import { budgetOf } from '../../src/cli/share.js';
import { resolveListenOptions, resolveShareOptions } from '../../src/options.js';
import { agreeOnReferences, OfferedReferences } from '../../src/protocol/references.js';
import { shareDirectory, sharePath } from '../../src/share/share-path.js';
import { domainKey } from '../../src/source/dedup-domain.js';
import { command, forEachTest } from '../support/command-line.js';

const pageBytes = 4096;
const secret = 'a secret of sixteen bytes, or more';
const invalid = expect.objectContaining({ code: 'INVALID_ARGUMENT' });

/** Pages of zeros in between: those are nobody's. */
function image(path: string, pages: number): void {
  const bytes = Buffer.alloc(pages * pageBytes + 100);
  for (let page = 0; page < pages; page++)
    if (page % 4 !== 3) bytes.fill(page + 1, page * pageBytes, (page + 1) * pageBytes);
  writeFileSync(path, bytes);
}

describe('a page share', () => {
  let folder: string;
  let file: string;
  const options = () => ({ budgetBytes: 2 ** 20, dedup: { domain: 'd' }, secret, file });
  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'memferry-share-'));
    file = join(folder, 'share');
    image(join(folder, 'image'), 40);
  });
  afterEach(() => rmSync(folder, { recursive: true }));

  it('takes the pages of files within its budget, and gives back what is above a smaller one', async () => {
    await using share = await Share.open(options());
    expect(share.path).toBe(file);
    expect(await share.fill(join(folder, 'image'))).toEqual({
      pages: 40,
      zero: 10,
      inserted: 30,
      there: 0,
      noRoom: 0,
    });
    expect(
      await share.fill(join(folder, 'image'), {
        score: 2,
        offsetBytes: 4 * pageBytes,
        lengthBytes: 8 * pageBytes,
      }),
    ).toMatchObject({ pages: 8, zero: 2, there: 6 });
    expect(share.stats()).toMatchObject({ pages: 30, bytesUsed: 32 * pageBytes, budgetBytes: 2 ** 20 });
    await share.setBudget(8 * pageBytes);
    // Those with the better score stay.
    expect(share.stats()).toMatchObject({ pages: 6, bytesUsed: 8 * pageBytes, evicted: 24 });
    expect(statSync(file).blocks * 512).toBeLessThanOrEqual(8 * pageBytes);
    expect(await share.fill(join(folder, 'image'), { score: 3, lengthBytes: 2 * pageBytes })).toMatchObject({
      inserted: 2,
    });
    expect(share.stats().pages).toBe(6);
    await expect(share.setBudget(-1)).rejects.toEqual(invalid);
    await expect(share.fill(join(folder, 'nothing'))).rejects.toMatchObject({ code: 'SYSTEM' });
    await expect(share.fill(folder)).rejects.toMatchObject({ code: 'SYSTEM' });
  });

  it('has one writer, and outlives it', async () => {
    const first = await Share.open(options());
    await first.fill(join(folder, 'image'));
    await expect(Share.open(options())).rejects.toMatchObject({ code: 'SYSTEM' });
    await first.close();
    await first.close();
    await using second = await Share.open(options());
    expect(second.stats()).toMatchObject({ pages: 30, unverified: 30 });
    await second.close({ discard: true });
    expect(existsSync(file)).toBe(false);
  });

  it('of another domain is emptied, and a file of something else is left alone', async () => {
    const first = await Share.open(options());
    await first.fill(join(folder, 'image'));
    await first.close();
    await using other = await Share.open({ ...options(), dedup: { domain: 'e' } });
    expect(other.stats().pages).toBe(0);
    await expect(Share.open({ ...options(), file: join(folder, 'image') })).rejects.toEqual(invalid);
    expect(statSync(join(folder, 'image')).size).toBe(40 * pageBytes + 100);
  });

  it('finds out what is not there any more', async () => {
    await using share = await Share.open(options());
    await share.fill(join(folder, 'image'));
    truncateSync(file, 12 * pageBytes);
    expect(await share.native.verify(100)).toBe(false);
    expect(share.stats()).toMatchObject({ pages: 10, dropped: 20 });
  });

  it('has options that are checked', () => {
    for (const wrong of [
      {},
      { budgetBytes: 1 },
      { budgetBytes: -1, dedup: { domain: 'd' } },
      { budgetBytes: 1, dedup: true },
    ]) {
      expect(() => resolveShareOptions(wrong as never)).toThrow(invalid);
    }
    expect(() => resolveListenOptions({ share: file })).toThrow(invalid);
    expect(() => resolveListenOptions({ share: file, dedup: true })).toThrow(invalid);
    expect(resolveListenOptions({ share: 'auto', dedup: { domain: 'd' } })).toMatchObject({ share: 'auto' });
    expect(resolveListenOptions({}).dedup).toBe(false);
  });
});

describe('the place of a share', () => {
  it("follows from the domain's key, or is named", () => {
    const [one, other] = [domainKey(Buffer.from(secret), 'a'), domainKey(Buffer.from(secret), 'b')];
    expect(sharePath('/x', one)).toBe('/x');
    expect(sharePath(null, one)).toBe(sharePath(null, one));
    expect(sharePath(null, one)).not.toBe(sharePath(null, other));
    expect(sharePath(null, one).startsWith(`${shareDirectory()}/share-`)).toBe(true);
    expect(basename(sharePath(null, one))).not.toContain(Buffer.from(one).toString('hex').slice(0, 8));
  });
});

describe('agreeing on references', () => {
  const session = Uint8Array.from({ length: 32 }, (_, at) => at);
  const id = Uint8Array.from({ length: 16 }, (_, at) => at + 100);
  const hosts = Buffer.from(secret);
  const key = domainKey(hosts, 'd');

  it('needs the same key on both sides, and shows it to neither', async () => {
    const ours = await OfferedReferences.make({ domain: 'd' }, hosts, session, id);
    expect(JSON.stringify(ours.offer)).not.toContain(Buffer.from(key).toString('hex'));
    const theirs = agreeOnReferences(ours.offer, key, session, id);
    expect(theirs).toMatchObject({ key, ofDomain: true });
    expect(ours.agreed).toBe(false);
    ours.answered(theirs?.proof ?? null);
    expect(ours.agreed).toBe(true);
    // The source's own proof, reflected, is none.
    ours.answered(ours.offer.proof);
    expect(ours.agreed).toBe(false);
    ours.answered(null);
    expect(ours.agreed).toBe(false);
    ours.answered('00');
    expect(ours.agreed).toBe(false);
  });

  it('is for one session, migration and domain', async () => {
    const { offer } = await OfferedReferences.make({ domain: 'd' }, hosts, session, id);
    expect(agreeOnReferences(null, key, session, id)).toBe(null);
    expect(agreeOnReferences(offer, null, session, id)).toBe(null);
    expect(agreeOnReferences(offer, domainKey(hosts, 'e'), session, id)).toBe(null);
    expect(agreeOnReferences(offer, key, session.toReversed(), id)).toBe(null);
    expect(agreeOnReferences(offer, key, session, id.toReversed())).toBe(null);
  });

  it("has a guest's own domain too", async () => {
    const ours = await OfferedReferences.make(true, hosts, session, id);
    const theirs = agreeOnReferences(ours.offer, key, session, id);
    expect(theirs?.ofDomain).toBe(false);
    expect(theirs?.key).toEqual(ours.key);
    expect(agreeOnReferences(ours.offer, null, session, id)?.key).toEqual(ours.key);
    ours.answered(theirs?.proof ?? null);
    expect(ours.agreed).toBe(true);
    expect(() => agreeOnReferences(ours.offer, key, session.toReversed(), id)).toThrow(
      expect.objectContaining({ code: 'AUTH_FAILED' }),
    );
  });
});

describe('memferry share', () => {
  const place = forEachTest();

  it('is told its budget in one way', () => {
    const path = join(place.directory, 'budget');
    writeFileSync(path, '3Mi\n');
    expect(budgetOf({ budget: 5 })).toBe(5);
    expect(budgetOf({ budgetFile: path })).toBe(3 * 2 ** 20);
    expect(() => budgetOf({})).toThrow(invalid);
    expect(() => budgetOf({ budget: 5, budgetFile: path })).toThrow(invalid);
    expect(() => budgetOf({ budgetFile: '/nope' })).toThrow(
      expect.objectContaining({
        code: 'INVALID_ARGUMENT',
        message: expect.stringMatching(/^--budget-file: \/nope: ENOENT/),
      }),
    );
  });

  it('names the file whose budget is none', async () => {
    const path = join(place.directory, 'budget');
    writeFileSync(path, 'abc');
    const share = command('share', '--dedup-domain', 'd', '--budget-file', path);
    expect(await share.closed).toBe(2);
    expect(share.errors()).toBe(
      `memferry: INVALID_ARGUMENT: --budget-file: ${path}: write bytes, as 65536, 100M or 1.5Gi.\n`,
    );
  });

  it('fills, reports, follows its budget and ends with a signal', async () => {
    const from = join(place.directory, 'image');
    const budget = join(place.directory, 'budget');
    const file = join(place.directory, 'share');
    image(from, 40);
    writeFileSync(budget, '1Mi');
    const args = ['share', '--dedup-domain', 'd', '--secret-file', place.secretFile, '--file', file];
    const share = command(...args, '--budget-file', budget, '--from', from, '--discard');
    expect(await share.next('sharing')).toMatchObject({ path: file });
    expect(await share.next('filled')).toMatchObject({ path: from, inserted: 30 });
    expect(await share.next('stats')).toMatchObject({ budgetBytes: 2 ** 20 });
    writeFileSync(budget, String(6 * pageBytes));
    share.child.kill('SIGHUP');
    for (;;) {
      const stats = await share.next('stats');
      if (stats['budgetBytes'] !== 6 * pageBytes) continue;
      expect(stats).toMatchObject({ pages: 4, bytesUsed: 6 * pageBytes });
      break;
    }
    // It goes on: a signal that ends other commands has another meaning here.
    expect(await share.next('stats')).toMatchObject({ pages: 4 });
    share.child.kill('SIGINT');
    await share.closed;
    expect(existsSync(file)).toBe(false);
  });
});
