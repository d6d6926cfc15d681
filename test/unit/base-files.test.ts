/** Bases in files: what is written is what was there, and a guest's name never leads out of the directory. */
import { execFileSync, spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import {
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Guest, Region, readBase, saveBase } from '../../lib/index.js';
import { lineageOf } from '../../lib/lineage.js';

let directory = '';
const regions: Region[] = [];
beforeEach(() => {
  directory = mkdtempSync(join(tmpdir(), 'memferry-base-'));
});
afterEach(() => {
  for (const region of regions.splice(0)) region.close();
  rmSync(directory, { recursive: true, force: true });
});

/** Pages of zeros, untouched pages and others, in two regions. */
function guest(name: string, steps: string[] = []): Guest & { bytes(): Buffer[] } {
  const made = [5000, 64].map((pages) => Region.allocate({ lengthBytes: pages * 4096 }));
  regions.push(...made);
  for (const [index, region] of made.entries()) {
    const [view] = region.views as [Uint8Array];
    for (let page = 0; page < region.pages; page++) {
      if (page % 3 === 1) view.fill(0, page * 4096, (page + 1) * 4096);
      else if (page % 3 === 2) view[page * 4096 + ((page * 97) % 4096)] = 1 + index + (page % 200);
    }
  }
  return {
    name,
    regions: made.map((region, index) => ({ name: `r${index}`, region })),
    module: null,
    description: { of: name },
    pause: async () => {
      steps.push('pause');
      return new Uint8Array([1, 2, 3]);
    },
    unpause: () => void steps.push('unpause'),
    bytes: () => made.map((region) => Buffer.from(region.views[0] as Uint8Array)),
  };
}

/** As a host of this guest would offer it. */
const offerOf = ({ name, module, regions: of }: Guest) => ({
  name,
  module,
  lineage: lineageOf(of.map(({ region }) => region)),
});

const options = () => ({ directory, maxBytes: 2 ** 30 });

test('a base of a running guest is that guest, and the guest runs on', async () => {
  const steps: string[] = [];
  const of = guest('one', steps);
  await saveBase(of, options());
  expect(steps).toEqual(['pause', 'unpause']);
  const found = await readBase(directory, offerOf(of));
  expect(found?.state).toEqual(new Uint8Array([1, 2, 3]));
  expect(found?.offer).toMatchObject({ name: 'one', module: null, description: { of: 'one' } });
  const paths = found?.bases.map((base) => (base as { path: string }).path) ?? [];
  expect(paths.map((path, index) => readFileSync(path).equals(of.bytes()[index] as Buffer))).toEqual([
    true,
    true,
  ]);
  // And back into memory.
  const back = Region.allocate({ lengthBytes: 5000 * 4096 });
  regions.push(back);
  expect(await back.native.fill(paths[0] as string, 0, 0, 5000)).toBe(5000 * 4096);
  expect(Buffer.from(back.views[0] as Uint8Array).equals(of.bytes()[0] as Buffer)).toBe(true);
  expect(await back.digest()).toBe(await of.regions[0]?.region.digest());
  // Nobody else's business.
  for (const path of paths) expect(statSync(path).mode & 0o077).toBe(0);
});

test('a later one takes the place of an earlier one, and nothing is left of that', async () => {
  const of = guest('one');
  await saveBase(of, options());
  const [, second] = of.regions as [unknown, { region: Region }];
  (second.region.views[0] as Uint8Array).fill(9);
  await saveBase(of, options());
  const found = await readBase(directory, offerOf(of));
  const [, image1] = (found?.bases ?? []) as { path: string }[];
  const image = readFileSync(image1?.path ?? '');
  expect(image.equals(of.bytes()[1] as Buffer)).toBe(true);
  // A folder, and the link to it.
  expect(readdirSync(directory)).toHaveLength(2);
});

test('a budget that is exceeded leaves what was there', async () => {
  const steps: string[] = [];
  const of = guest('one', steps);
  const tooLittle = saveBase(of, { directory, maxBytes: 5063 * 4096 });
  await expect(tooLittle).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' });
  expect(steps).toEqual(['pause', 'unpause']);
  expect(readdirSync(directory)).toEqual([]);
});

test('a guest that somebody has let run in its pause leaves what was there', async () => {
  const of = guest('one');
  const stillPaused = async () => {
    throw new Error('it runs');
  };
  of.pause = async () => ({ state: new Uint8Array([1]), stillPaused });
  await expect(saveBase(of, options())).rejects.toThrow('it runs');
  expect(readdirSync(directory)).toEqual([]);
});

describe('names', () => {
  test.each(['..', '../../outside', '/etc/passwd', 'a/b', 'ü'.repeat(64), '\0', '.'])(
    '%j stays inside',
    async (name) => {
      const of = guest(name);
      await saveBase(of, options());
      expect((await readBase(directory, offerOf(of)))?.offer.name).toBe(name);
      expect(readdirSync(directory)).toHaveLength(2);
    },
  );

  test('that look alike are two', async () => {
    const of = guest('a/b');
    await saveBase(of, options());
    expect(await readBase(directory, { ...offerOf(of), name: 'a?b' })).toBeNull();
  });
});

test('whoever offers a guest of that name, and is no host of it, gets nothing', async () => {
  const of = { ...guest('one'), module: { name: 'm', sha256: 'ab'.repeat(32) } };
  await saveBase(of, options());
  const offer = offerOf(of);
  expect(await readBase(directory, offer)).not.toBeNull();
  const others = [
    { ...offer, lineage: undefined },
    { ...offer, lineage: new Uint8Array(32) },
    { ...offer, lineage: offer.lineage.subarray(1) },
    { ...offer, lineage: offerOf(guest('one')).lineage },
    { ...offer, module: null },
    { ...offer, module: { name: 'm', sha256: 'cd'.repeat(32) } },
    { ...offer, module: { name: 'n', sha256: 'ab'.repeat(32) } },
  ];
  for (const other of others) expect(await readBase(directory, other)).toBeNull();
  // Where the owner wants it so, and only as to the lineage.
  const any = await Promise.all(others.map((other) => readBase(directory, other, { anySource: true })));
  expect(any.map((found) => found !== null)).toEqual([true, true, true, true, false, false, false]);
});

test('a guest that is moving is not written', async () => {
  const steps: string[] = [];
  const of = guest('one', steps);
  const native = of.regions[1]?.region.native;
  expect(native?.claim()).toBe(true);
  await expect(saveBase(of, options())).rejects.toMatchObject({ code: 'REGION_BUSY' });
  expect(steps).toEqual([]);
  native?.release();
  await saveBase(of, options());
});

test('what was spoilt is no base', async () => {
  const of = guest('one');
  expect(await readBase(directory, offerOf(of))).toBeNull();
  await saveBase(of, options());
  expect(await readBase(directory, offerOf(of))).not.toBeNull();
  const [folder] = readdirSync(directory).filter((name) => !name.includes('.'));
  const manifest = join(directory, folder as string, 'base.json');
  for (const spoilt of ['', '{', '{"version":2}', ' '.repeat(2 ** 20 + 1)]) {
    writeFileSync(manifest, spoilt);
    expect(await readBase(directory, offerOf(of))).toBeNull();
  }
});

test('a region is filled only inside, from files only, as far as they go', async () => {
  const region = Region.allocate({ lengthBytes: 4 * 4096 });
  regions.push(region);
  const file = join(directory, 'short');
  writeFileSync(file, Buffer.alloc(4096 + 10, 7));
  expect(await region.native.fill(file, 0, 1, 3)).toBe(4096 + 10);
  const view = region.views[0] as Uint8Array;
  expect([view[4095], view[4096], view[8191], view[8192 + 9], view[8192 + 10]]).toEqual([0, 7, 7, 7, 0]);
  await expect(region.native.fill(file, 0, 1, 4)).rejects.toThrow();
  await expect(region.native.fill(directory, 0, 0, 1)).rejects.toThrow();
  await expect(region.native.fill(join(directory, 'none'), 0, 0, 1)).rejects.toThrow();
  await expect(region.native.save(join(directory, 'none'), 0, 1)).rejects.toThrow();
});

describe('a guest that is held', () => {
  const cannot = (pause: Guest['pause'], steps: string[]): Guest => ({
    ...guest('held', steps),
    pause,
  });

  test('for too long runs on, also where it pauses only then', async () => {
    const steps: string[] = [];
    let paused = (_: Uint8Array) => {};
    const of = cannot(() => new Promise((resolve) => (paused = resolve)), steps);
    const options = { directory, maxBytes: 2 ** 30, pauseTimeoutMs: 50 };
    await expect(saveBase(of, options)).rejects.toMatchObject({ code: 'PAUSE_TIMEOUT' });
    // It may stand any moment: nobody else has it until that is known.
    await expect(saveBase(of, options)).rejects.toMatchObject({ code: 'REGION_BUSY' });
    expect(steps).toEqual([]);
    paused(new Uint8Array());
    await expect.poll(() => steps).toEqual(['unpause']);
    await saveBase({ ...of, pause: async () => new Uint8Array() }, { ...options, pauseTimeoutMs: 20_000 });
    expect(readdirSync(directory)).toHaveLength(2);
  });

  test('runs on when its signal aborts, and nothing is left of what was written', async () => {
    const steps: string[] = [];
    const aborting = new AbortController();
    const of = guest('held', steps);
    const stillPaused = async () => aborting.abort(new Error('enough'));
    const pause = async () => ({ state: await of.pause({ signal: aborting.signal }), stillPaused });
    const options = { directory, maxBytes: 2 ** 30, signal: aborting.signal };
    await expect(saveBase({ ...of, pause } as Guest, options)).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(steps).toEqual(['pause', 'unpause']);
    expect(readdirSync(directory)).toEqual([]);
    await expect(saveBase(of, options)).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(steps).toHaveLength(2);
    await saveBase(of, { directory, maxBytes: 2 ** 30 });
  });
});

test('what lies there and is no file is no base, and nobody waits for it', async () => {
  const of = guest('one');
  for (const name of ['base.json', 'state', '0.image']) {
    await saveBase(of, options());
    const folder = realpathSync(
      join(directory, readdirSync(directory).find((each) => !each.includes('.')) ?? ''),
    );
    rmSync(join(folder, name));
    execFileSync('mkfifo', [join(folder, name)]);
    const found = await readBase(directory, offerOf(of));
    if (name !== '0.image') expect(found).toBeNull();
    else await expect(of.regions[0]?.region.native.fill(join(folder, name), 0, 0, 1)).rejects.toThrow();
  }
});

test('an execution state that is too large is no base, and is not read', async () => {
  const of = guest('one');
  await saveBase(of, options());
  const folder = readdirSync(directory).find((each) => !each.includes('.')) ?? '';
  truncateSync(join(directory, folder, 'state'), 2 ** 31);
  expect(await readBase(directory, offerOf(of))).toBeNull();
});

test('two at once of one name: one of them is there, whole', async () => {
  for (let times = 0; times < 5; times++) {
    const two = [guest('one'), guest('one')];
    await Promise.all(two.map((of) => saveBase(of, options())));
    const found = await Promise.all(two.map((of) => readBase(directory, offerOf(of))));
    expect(found.filter((base) => base !== null)).toHaveLength(1);
    const at = found.findIndex((base) => base !== null);
    const paths = (found[at]?.bases ?? []) as { path: string }[];
    const bytes = (two[at] as (typeof two)[number]).bytes();
    expect(paths.map(({ path }, index) => readFileSync(path).equals(bytes[index] as Buffer))).toEqual([
      true,
      true,
    ]);
  }
  await saveBase(guest('one'), options());
  expect(readdirSync(directory)).toHaveLength(2);
});

test('a folder where the link is to be makes room for it', async () => {
  const of = guest('one');
  await saveBase(of, options());
  const folder = readdirSync(directory).find((each) => !each.includes('.')) ?? '';
  const own = realpathSync(join(directory, folder));
  rmSync(join(directory, folder));
  renameSync(own, join(directory, folder));
  expect(await readBase(directory, offerOf(of))).not.toBeNull();
  await saveBase(of, options());
  expect(await readBase(directory, offerOf(of))).not.toBeNull();
  expect(readdirSync(directory)).toHaveLength(2);
});

test('what a writer has left that was killed goes with the next one', async () => {
  const of = guest('one');
  await saveBase(of, options());
  const folder = readdirSync(directory).find((each) => !each.includes('.')) ?? '';
  // A process that has ended.
  const { pid } = spawnSync('true');
  for (const name of [`${folder}.${pid}.${randomUUID()}`, `${folder}.${process.ppid}.${randomUUID()}`]) {
    mkdirSync(join(directory, name));
    writeFileSync(join(directory, name, '0.image'), 'what a guest had in memory');
  }
  const longAgo = Date.now() / 1000 - 2 * 3600;
  for (const name of readdirSync(directory).filter((each) => each.includes('.'))) {
    utimesSync(join(directory, name), longAgo, longAgo);
  }
  // Of a process that has ended, as far as can be seen from here: it may be another host's.
  mkdirSync(join(directory, `${folder}.${pid}.${randomUUID()}`));
  symlinkSync('nowhere', join(directory, `${folder}.${process.pid}.${randomUUID()}.link`));
  writeFileSync(join(directory, 'a file of somebody else'), '');
  expect(await readBase(directory, offerOf(of))).not.toBeNull();
  await saveBase(of, options());
  expect(await readBase(directory, offerOf(of))).not.toBeNull();
  // The link and its folder, what others may still be writing, and what is none of ours.
  expect(readdirSync(directory)).toHaveLength(5);
});
