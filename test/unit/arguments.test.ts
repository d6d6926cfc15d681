/** What callers get wrong is said by a MemferryError that says what, at the side where it was got wrong. */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  closeDescriptors,
  decideRound,
  distribute,
  FdListener,
  type Guest,
  type GuestRegion,
  listen,
  migrate,
  migrateGang,
  park,
  Region,
  Share,
  saveBase,
  servePages,
  serveSnapshot,
  stage,
  superviseGuest,
  unpark,
} from '../../lib/index.js';
import { WorkerGuest } from '../../lib/worker/index.js';
import { guestModule } from '../support/guests/by-hand.js';

const secret = 'a secret of sixteen bytes, or more';
const wrong = (message: RegExp) =>
  expect.objectContaining({ code: 'INVALID_ARGUMENT', message: expect.stringMatching(message) });

let folder: string;
const regions: Region[] = [];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'memferry-arguments-'));
});
afterEach(() => {
  for (const region of regions.splice(0)) region.close();
  rmSync(folder, { recursive: true });
});

function guest(more: object = {}): Guest & { steps: string[] } {
  const region = Region.allocate({ lengthBytes: 4 * 4096 });
  regions.push(region);
  const steps: string[] = [];
  return {
    name: 'g',
    module: null,
    regions: [{ name: 'r', region }],
    pause: async () => {
      steps.push('pause');
      return new Uint8Array(1000);
    },
    unpause: () => void steps.push('unpause'),
    steps,
    ...more,
  };
}

describe('options that are not there, or not known', () => {
  const none = undefined as never;
  it.each<[string, () => unknown, RegExp]>([
    ['Region.allocate', () => Region.allocate(none), /lengthBytes/],
    ['Region.allocate', () => Region.allocate({ lengthBytes: 4096, sharde: true } as never), /'sharde'/],
    ['Region.attach', () => Region.attach(none), /pidfd/],
    ['Region.attach', () => Region.attach({ pidfd: 0, maps: [] } as never), /'maps'/],
    ['servePages', () => servePages(none), /snapshot/],
    ['servePages', () => servePages({ snapshot: '/x' } as never), /Region.attach makes one/],
    ['superviseGuest', () => superviseGuest(none), /attachment/],
    ['superviseGuest', () => superviseGuest({ attachment: none, snapshot: '/x' }), /mappings/],
    ['superviseGuest', () => superviseGuest({ attachment: {} } as never), /path of a file/],
    ['migrateGang', () => migrateGang(none), /a list/],
    ['migrateGang', () => migrateGang([none]), /migrateGang\[0\]/],
    ['decideRound', () => decideRound(none), /decideRound/],
    ['decideRound', () => decideRound({ history: [{}] } as never), /decideRound\.history\.0/],
  ])('%s', (_, call, message) => {
    expect(call).toThrow(wrong(message));
  });

  it.each<[string, () => Promise<unknown>, RegExp]>([
    ['unpark', () => unpark({ image: '', secret: '' } as never, null as never), /^ticket\./],
    ['unpark', () => unpark(none), /^ticket/],
    ['stage', () => stage(none), /stage/],
    ['park', () => park(guest(), none), /park|via|server/],
    ['WorkerGuest.start', () => WorkerGuest.start(none), /module/],
    ['WorkerGuest.start', () => WorkerGuest.start({} as never), /module/],
    ['WorkerGuest.start', () => WorkerGuest.start({ module: { name: 'm', url: 'x' } }), /no URL: x/],
    [
      'WorkerGuest.start',
      () => WorkerGuest.start({ module: { name: 'm'.repeat(65), url: guestModule('busy.mjs') } }),
      /a guest has a name of 1 to 64/,
    ],
    [
      'WorkerGuest.start',
      () => WorkerGuest.start({ module: { name: 'm', url: guestModule('busy.mjs') }, data: () => 1 }),
      /the guest's data .* structured clone/,
    ],
  ])('%s', async (_, call, message) => {
    await expect(call()).rejects.toEqual(wrong(message));
  });

  it('limit', async () => {
    await using listening = await listen({ secret });
    expect(() => listening.limit(none)).toThrow(wrong(/bandwidth, gatherLimit/));
    expect(() => listening.limit({ bandwith: 1 } as never)).toThrow(wrong(/'bandwith'/));
    listening.limit({ bandwidth: 1e6 });
  });

  it('a request that cannot be cloned', async () => {
    await using started = await WorkerGuest.start({ module: { name: 'm', url: guestModule('busy.mjs') } });
    await expect(started.request(() => 1)).rejects.toEqual(wrong(/structured clone/));
    expect(await started.request({ op: 'echo', value: 1 })).toBe(1);
  });
});

describe('callbacks', () => {
  const none = undefined as never;
  it.each<[string, () => unknown, RegExp]>([
    ['FdListener', () => new FdListener(join(folder, 's'), {} as never), /FdListener\.onConnection: must be/],
    ['FdListener', () => new FdListener(join(folder, 's'), none), /FdListener/],
    [
      'FdListener',
      () => new FdListener(join(folder, 's'), { onConnection() {}, onEror() {} } as never),
      /onEror/,
    ],
    ['closeDescriptors', () => closeDescriptors(none), /list of descriptors/],
    [
      'servePages',
      () => {
        const { region } = guest().regions[0] as GuestRegion;
        return servePages({ region, snapshot: '/x', onLost: 'x' as never });
      },
      /servePages\.onLost: must be a function/,
    ],
  ])('%s', (_, call, message) => {
    expect(call).toThrow(wrong(message));
    expect(readdirSync(folder)).toEqual([]);
  });

  it.each([
    [{ prepaging: 'all' }, /prepaging/],
    [{ prePaging: 'some' }, /prePaging/],
    [{ onMicroVm: 'x' }, /onMicroVm: must be a function/],
    [{ onRefused: {} }, /onRefused: must be a function/],
  ])('serveSnapshot %j', async (options, message) => {
    const all = { socketPath: join(folder, 's'), snapshot: '/dev/null', ...options };
    await expect(serveSnapshot(all as never)).rejects.toEqual(wrong(message));
  });
});

describe('a page share that is closed', () => {
  it('takes nothing, and says so', async () => {
    const share = await Share.open({
      budgetBytes: 2 ** 20,
      dedup: { domain: 'd' },
      secret,
      file: join(folder, 's'),
    });
    await share.close();
    await expect(share.fill(folder)).rejects.toEqual(wrong(/share is closed/));
    await expect(share.setBudget(1)).rejects.toEqual(wrong(/share is closed/));
    expect(() => share.stats()).toThrow(wrong(/share is closed/));
    await expect(distribute(share, { via: ['127.0.0.1:1'], dedup: { domain: 'd' }, secret })).rejects.toEqual(
      wrong(/share is closed/),
    );
  });
});

describe('a base', () => {
  it('needs a place, and a guest that can be told of', async () => {
    const of = guest();
    await expect(saveBase(of, { maxBytes: 1 } as never)).rejects.toEqual(wrong(/saveBase\.directory/));
    await expect(saveBase(of, undefined as never)).rejects.toEqual(wrong(/saveBase/));
    const unnamed = guest({ name: undefined });
    await expect(saveBase(unnamed, { directory: folder, maxBytes: 2 ** 20 })).rejects.toEqual(
      wrong(/guest\.name/),
    );
    expect(of.steps).toEqual([]);
  });

  it('that cannot be written is a failed system call', async () => {
    const file = join(folder, 'file');
    writeFileSync(file, '');
    const of = guest();
    await expect(saveBase(of, { directory: join(file, 'in'), maxBytes: 2 ** 20 })).rejects.toMatchObject({
      code: 'SYSTEM',
      facts: { errno: 20 },
      message: expect.stringMatching(/no base can be written to .*ENOTDIR/),
    });
    expect(of.steps).toEqual(['pause', 'unpause']);
  });
});

describe('where to', () => {
  it.each<[object, RegExp]>([
    [{ to: 5 }, /migrate\.to: expected 'HOST:PORT'/],
    [{ to: undefined }, /migrate\.to: expected 'HOST:PORT'/],
    [{ to: { host: 'h', port: 0 } }, /migrate\.to\.port: .*>=1/],
    [{ to: '127.0.0.1:0' }, /no port to dial/],
    [{ dedup: 'web' }, /migrate\.dedup: expected true, false or/],
    [{ replicas: 3 }, /migrate\.replicas: expected 1 or 2/],
    [{ discover: 1 }, /migrate\.discover: expected/],
    [{ replicas: 2 }, /migrate\.replicas: for scatter modes, and this is hybrid/],
    [{ mode: 'pre-copy', via: ['127.0.0.1:1'] }, /migrate\.via: for scatter modes/],
    [{ mode: 'post-copy', releaseAsEvicted: true }, /migrate\.releaseAsEvicted: for scatter modes/],
    [{ mode: 'scatter', via: ['nonsense'] }, /nonsense/],
    [{ mode: 'scatter', via: ['127.0.0.1:0'] }, /migrate\.via: '127\.0\.0\.1:0' has no port/],
    [{ mode: 'scatter', discover: 'nonsense' }, /nonsense/],
  ])('%j says what is allowed', (options, message) => {
    const all = { to: '127.0.0.1:1', secret, ...options } as never;
    expect(() => migrate(guest(), all)).toThrow(wrong(message));
  });
});

describe('a gang', () => {
  it('says whose failure it is', async () => {
    const to = '127.0.0.1:1';
    const [good, bad] = [guest({ name: 'good' }), guest({ name: 'bad', module: undefined })];
    expect(() =>
      migrateGang([
        { guest: good, options: { to, secret } },
        { guest: bad, options: { to } },
      ]),
    ).toThrow(wrong(/guest 'bad': guest\.module/));
    const gang = migrateGang([{ guest: guest({ name: 'one' }), options: { to, secret } }]);
    for (const migration of gang.migrations) {
      migration.done.catch(() => {});
      migration.evicted.catch(() => {});
    }
    await expect(gang.done).rejects.toMatchObject({
      code: 'CONNECT_FAILED',
      message: expect.stringMatching(/^guest 'one': /),
      facts: { guest: 'one', port: 1 },
    });
    await expect(gang.evicted).rejects.toMatchObject({ facts: { guest: 'one' } });
  });
});
