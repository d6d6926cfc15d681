/** What callers get wrong is said by a MemferryError that says what, at the side where it was got wrong. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  closeDescriptors,
  DirtyTracker,
  decideRound,
  diffPages,
  discover,
  distribute,
  FdListener,
  FirecrackerApi,
  firecrackerControl,
  type Guest,
  type GuestRegion,
  hash,
  hashPages,
  listen,
  MemferryError,
  microVmArrivals,
  microVmGuest,
  migrate,
  migrateGang,
  park,
  QemuDestination,
  QemuGuest,
  Region,
  readBase,
  Share,
  sampleGuest,
  saveBase,
  servePages,
  serveSnapshot,
  snapshotGuest,
  stage,
  superviseGuest,
  unpark,
} from '../../lib/index.js';
import { WorkerGuest, workerGuests } from '../../lib/worker/index.js';
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

const memory = () => {
  const region = Region.allocate({ lengthBytes: 4096 });
  regions.push(region);
  return region;
};
const qemu = { qmp: '/nowhere/qmp', shim: '/nowhere/shim' };
const sampled = { via: ['127.0.0.1:1'], dedup: { domain: 'd' }, secret };
const bounds = () => ({ directory: folder, maxBytes: 2 ** 20 });

describe('a snapshot that is no file', () => {
  it.each(['a FIFO', 'a directory', 'a device', 'an empty file', 'nothing'])('%s: said at once', (what) => {
    const path = join(folder, 'snapshot');
    if (what === 'a FIFO') execFileSync('mkfifo', [path]);
    if (what === 'a directory') mkdirSync(path);
    if (what === 'a device') symlinkSync('/dev/zero', path);
    if (what === 'an empty file') writeFileSync(path, '');
    const code = what === 'nothing' ? 'SYSTEM' : 'INVALID_ARGUMENT';
    const region = memory();
    expect(() => servePages({ region, snapshot: path })).toThrow(expect.objectContaining({ code }));
    // It is nobody's now.
    expect(region.native.claimed()).toBe(false);
    rmSync(path, { recursive: true, force: true });
  });
});

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
    ['workerGuests', () => workerGuests(none), /workerGuests/],
    ['workerGuests', () => workerGuests({} as never), /workerGuests\.modules/],
    [
      'workerGuests',
      () => workerGuests({ modules: { a: '/srv/a.mjs' } }),
      /modules\['a'\] is no URL: .*pathToFileURL/,
    ],
    ['workerGuests', () => workerGuests({ modules: { a: 'https://x/a.mjs' } }), /file: URL, not https:/],
    ['workerGuests', () => workerGuests({ modules: {}, onguest() {} } as never), /onguest/],
    ['workerGuests', () => workerGuests({ modules: {}, onGuest: 1 as never }), /onGuest: must be/],
    ['workerGuests', () => workerGuests({ modules: {}, base: '/x' as never }), /workerGuests\.base/],
    ['workerGuests', () => workerGuests({ modules: {}, base: { directry: '/x' } as never }), /base/],
    ['workerGuests', () => workerGuests({ modules: {}, pauseTimeoutMs: -1 }), /pauseTimeoutMs/],
    ['MemferryError', () => new MemferryError('NOPE' as never, 'text'), /no code 'NOPE'.*text/],
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
    ...[
      { pauseTimeoutMs: 1e10 },
      { pauseTimeoutMs: Number.NaN },
      { pauseTimeoutMs: -1 },
      { pauseTimeoutMs: '5000' },
      { sharedHeapBytes: -4096 },
      { resourceLimits: 5 },
      { resourceLimits: { maxOldGenerationSize: 5 } },
      { sharedMemory: { initialPages: 1, maximumPages: 2, pages: 3 } },
      { workers: 1.5 },
      { nam: 'x' },
    ].map((wrong): [string, () => Promise<unknown>, RegExp] => [
      `WorkerGuest.start, ${JSON.stringify(wrong)},`,
      () => WorkerGuest.start({ module: { name: 'm', url: guestModule('busy.mjs') }, ...wrong } as never),
      new RegExp(`WorkerGuest\\.start.*${Object.keys(wrong)[0]}`),
    ]),
    [
      'WorkerGuest.start',
      () => WorkerGuest.start({ module: { name: 'm'.repeat(65), url: guestModule('busy.mjs') } }),
      /a guest's module has a name of 1 to 64/,
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
    const asks = (options: unknown) => started.request({ op: 'echo', value: 1 }, options as never);
    await expect(asks({ workr: 1 })).rejects.toEqual(wrong(/'workr'/));
    await expect(asks(null)).rejects.toEqual(wrong(/request: expected an object/));
    await expect(asks({ worker: 7 })).rejects.toEqual(wrong(/no worker 7/));
  });
});

describe('what has the wrong shape', () => {
  const none = undefined as never;
  const host = { socketPath: '/s', load: async () => {}, resume() {} };
  it.each<[string, () => unknown, RegExp]>([
    ['hashPages', () => hashPages(none), /Uint8Array/],
    ['diffPages', () => diffPages(new Uint8Array(4096), none), /Uint8Array/],
    ['hash', () => hash(none), /./],
    ['FirecrackerApi', () => new FirecrackerApi(none), /socketPath: expected the path/],
    ['FirecrackerApi', () => new FirecrackerApi('/s', -1), /timeoutMs/],
    ['microVmArrivals', () => microVmArrivals(none), /microVmArrivals/],
    ['microVmArrivals', () => microVmArrivals({ ...host, resume: 1 } as never), /resume: must be/],
    ['microVmArrivals', () => microVmArrivals({ ...host, abandn() {} } as never), /abandn/],
    ['microVmGuest', () => microVmGuest('vm', none, none), /microVmGuest\.region: no Region/],
    ['microVmGuest', () => microVmGuest('vm', memory(), none), /pause\(\) and unpause\(\)/],
    ['firecrackerControl', () => firecrackerControl(none), /FirecrackerApi/],
    ['firecrackerControl', () => firecrackerControl(new FirecrackerApi('/s'), { dir: '/x' } as never), /dir/],
    ['QemuDestination', () => new QemuDestination(none), /QemuDestination/],
    ['QemuDestination', () => new QemuDestination({ ...qemu, resumeTimeoutMs: -1 }), /resumeTimeoutMs/],
    ['QemuDestination', () => new QemuDestination({ ...qemu, onResume() {} } as never), /onResume/],
    ['QemuDestination', () => new QemuDestination({ ...qemu, onWarning: 1 as never }), /onWarning: must be/],
    ['DirtyTracker.create', () => DirtyTracker.create(none), /no Region/],
    [
      'DirtyTracker.create',
      () => DirtyTracker.create(memory(), 'nope' as never),
      /name: one of .*not 'nope'/,
    ],
    [
      'DirtyTracker.create',
      () => DirtyTracker.create(memory(), 'hash-diff', { writer: 'anywhere' } as never),
      /'writer'/,
    ],
    [
      'DirtyTracker.create',
      () => DirtyTracker.create(memory(), undefined, { kvmLog: { kind: 'kvm-log', vmFd: 'x' } as never }),
      /vmFd/,
    ],
    [
      'migrate',
      () => migrate(guest(), { to: '127.0.0.1:1', secret, tracker: 'nope' as never }),
      /migrate\.tracker/,
    ],
  ])('%s', (_, call, message) => {
    expect(call).toThrow(wrong(message));
  });

  it('an object of a class may have more than a host of Firecracker has', () => {
    class Host {
      readonly started = [];
      readonly socketPath = '/s';
      async load() {}
      resume() {}
    }
    expect(microVmArrivals(new Host())).toBeTypeOf('function');
  });

  it.each<[string, () => Promise<unknown>, RegExp]>([
    ['discover', () => discover({ groop: 'x' } as never), /groop/],
    ['discover', () => discover({ timeoutMs: 'x' } as never), /timeoutMs/],
    ['discover', () => discover({ timeoutMs: -5 }), /timeoutMs/],
    ['discover', () => discover({ timeoutMs: 1e12 }), /timeoutMs/],
    ['discover', () => discover({ interface: 'lo' }), /interface/],
    ['sampleGuest', () => sampleGuest(none, sampled), /expected a guest/],
    ['sampleGuest', () => sampleGuest({} as never, sampled), /expected a guest/],
    ['sampleGuest', () => sampleGuest([none], sampled), /region 0: no Region/],
    ['readBase', () => readBase(none, none), /directory/],
    ['readBase', () => readBase(folder, {} as never), /readBase: offer\.name/],
    ['QemuGuest.attach', () => QemuGuest.attach(none), /QemuGuest\.attach/],
    ['QemuGuest.attach', () => QemuGuest.attach({} as never), /QemuGuest\.attach\.qmp: expected the path/],
    ['QemuGuest.attach', () => QemuGuest.attach({ ...qemu, afterward: 'stay' } as never), /afterward/],
    ['QemuGuest.attach', () => QemuGuest.attach({ ...qemu, afterwards: 'Stay' } as never), /afterwards/],
    ['QemuGuest.attach', () => QemuGuest.attach({ ...qemu, maxStateBytes: -1 }), /maxStateBytes/],
    ['QemuGuest.attach', () => QemuGuest.attach({ ...qemu, stateTimeoutMs: Number.NaN }), /stateTimeoutMs/],
    ['snapshotGuest', () => snapshotGuest(none, none), /snapshotGuest\.name/],
    ['snapshotGuest', () => snapshotGuest('vm', { memory: '/x' } as never), /files\.state/],
    ['saveBase', () => saveBase(guest({ pause: 5 }), bounds()), /pause\(\)/],
    ['saveBase', () => saveBase(guest({ regions: [{ name: 'r', region: {} }] }), bounds()), /no Region/],
    ['saveBase', () => saveBase(guest(), { ...bounds(), pauseTimeoutMs: 0 }), /pauseTimeoutMs/],
  ])('%s', async (_, call, message) => {
    await expect(call()).rejects.toEqual(wrong(message));
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

  it('is cancelled as a whole, and disposed of', async () => {
    await using listening = await listen({ secret });
    const held = () => ({
      guest: guest(),
      options: {
        to: `127.0.0.1:${listening.port}`,
        secret,
        mode: 'stop-and-copy',
        holdSwitchover: true,
      } as const,
    });
    const members = [held(), held()];
    const gang = migrateGang(members);
    const each = gang.migrations.map(({ done }) => done.catch((error: unknown) => error));
    for (const { evicted } of gang.migrations) evicted.catch(() => {});
    await Promise.all(
      gang.migrations.map(async (one) => {
        if (one.state !== 'pre-switchover')
          await new Promise<void>((resolve) => {
            const hear = (state: string) => {
              if (state !== 'pre-switchover') return;
              one.off('state', hear);
              resolve();
            };
            one.on('state', hear);
          });
      }),
    );
    gang.cancel('enough');
    for (const error of await Promise.all(each)) {
      expect(error).toMatchObject({ code: 'CANCELLED', cause: 'enough' });
    }
    await expect(gang.done).rejects.toMatchObject({ code: 'CANCELLED' });
    {
      await using other = migrateGang(members);
      expect(other.migrations).toHaveLength(2);
    }
    for (const { guest: of } of members) {
      expect(of.steps).toEqual([]);
      expect(of.regions[0]?.region.native.claimed()).toBe(false);
    }
  });
});
