/** The source's own commit driver parks a guest at a home server: whatever is cut, one of them has the guest. */
import { afterEach, describe, expect, it } from 'vitest';
import type { Guest } from '../../src/guest.js';
import type { DestinationMessage, SourceMessage } from '../../src/protocol/commit.js';
import { CommitDriver } from '../../src/source/commit-driver.js';
import { openParkedImage } from '../../src/staging/image-opening.js';
import type { ImageSet } from '../../src/staging/image-set.js';
import {
  connection,
  FakeServer,
  imageId,
  imageSecret,
  makeImage,
  newImage,
  parkedGuest,
} from './fake-stage.js';

const open: { close(): Promise<unknown> }[] = [];
const drivers: CommitDriver[] = [];
afterEach(async () => {
  for (const driver of drivers.splice(0)) driver.release();
  for (const one of open.splice(0).reverse()) await one.close();
});
function owned<T extends { close(): Promise<unknown> }>(one: T): T {
  open.push(one);
  return one;
}
const phaseAt = (server: FakeServer) => server.staging.status().held[0]?.phase ?? null;

interface Parking {
  driver: CommitDriver;
  server: FakeServer;
  set: ImageSet;
  /** The guest runs at the source. */
  runs(): boolean;
}

/** Up to the point where the machine goes on by itself; `before` sees each message and may hold it back. */
async function parking(
  {
    whole = true,
    sending = async () => true,
    hearing = () => true,
  }: {
    whole?: boolean;
    /** False: the message is lost. */
    sending?: (message: SourceMessage, parking: Parking) => Promise<boolean>;
    hearing?: (message: DestinationMessage, parking: Parking) => boolean;
  } = {},
  options: Parameters<typeof FakeServer.start>[0] = {},
): Promise<Parking> {
  const server = owned(await FakeServer.start(options));
  const set = owned(await makeImage([server.address], connection(), newImage({ kind: 'park' })));
  (server.native.images.get(imageId) as { whole: boolean }).whole = whole;
  await set.putState(parkedGuest, new Uint8Array(5));
  let runs = true;
  const guest: Guest = {
    name: 'guest',
    module: null,
    regions: [],
    pause: async () => {
      runs = false;
      return new Uint8Array(5);
    },
    unpause() {
      runs = true;
    },
  };
  const link = set.home.commitLink(imageId, {
    onMessage: (message) => {
      if (hearing(message, made)) driver.message(message);
    },
    onLost: (error) => driver.connectionLost(error),
  });
  const driver: CommitDriver = new CommitDriver(guest, {
    // `retry`: when the source asks the server anew. Due before an answer is there, it would drop that with its connection.
    timeoutsMs: { pause: 15_000, ready: 15_000, doubt: 15_000, retry: 5000 },
    send: (message) =>
      void sending(message, made).then((goes) => {
        try {
          if (goes) link.send(message);
        } catch {
          // Lost, as the driver itself takes it.
        }
      }),
    redial: () => link.redial(),
  });
  drivers.push(driver);
  const made: Parking = { driver, server, set, runs: () => runs };
  await driver.pause();
  driver.transferred();
  return made;
}

describe('parking', () => {
  it('leaves the guest with the home server', async () => {
    const { driver, server, runs } = await parking();
    expect(await driver.settled).toEqual({ outcome: 'departed' });
    expect(runs()).toBe(false);
    expect(phaseAt(server)).toBe('parked');
    // Nobody can write to it from then on.
    expect([...(server.native.images.get(imageId)?.sessions.keys() ?? [])]).toEqual([]);
  });

  it('is refused, and the guest runs on, when pages are missing', async () => {
    const { driver, server, runs } = await parking({ whole: false });
    expect(await driver.settled).toMatchObject({ outcome: 'reclaimed', error: { code: 'PREPARE_FAILED' } });
    expect(runs()).toBe(true);
    expect(phaseAt(server)).toBeNull();
  });

  it('survives a cut before GRANT arrives', async () => {
    let cuts = 0;
    const { driver, server, runs } = await parking({
      async sending({ type }, { server }) {
        if (type !== 'grant' || cuts++ > 0) return true;
        await server.cut();
        return false;
      },
    });
    expect(await driver.settled).toEqual({ outcome: 'departed' });
    expect(cuts).toBe(2);
    expect(runs()).toBe(false);
    expect(phaseAt(server)).toBe('parked');
  });

  it('survives a cut after GRANT, before RESUMED is heard', async () => {
    let lost = 0;
    const { driver, server } = await parking({
      hearing({ type }, { server }) {
        if (type !== 'resumed' || lost++ > 0) return true;
        void server.cut();
        return false;
      },
    });
    expect(await driver.settled).toEqual({ outcome: 'departed' });
    expect(lost).toBe(2);
    expect(phaseAt(server)).toBe('parked');
  });

  it('tells a source that asks late, even when the guest is gone from there already', async () => {
    let lost = 0;
    const { driver, server } = await parking({
      hearing({ type }, { server }) {
        if (type !== 'resumed' || lost++ > 0) return true;
        server.staging.drop(imageId);
        void server.cut();
        return false;
      },
    });
    expect(await driver.settled).toEqual({ outcome: 'departed' });
    expect(phaseAt(server)).toBeNull();
  });

  it('is lost when the home server is restarted after GRANT', async () => {
    let restarted = false;
    const { driver, runs } = await parking({
      async sending({ type }, { server }) {
        if (type !== 'grant' || restarted) return true;
        restarted = true;
        await server.restart();
        return false;
      },
    });
    expect(await driver.settled).toMatchObject({ outcome: 'lost', error: { code: 'GUEST_LOST' } });
    expect(runs()).toBe(false);
  });

  it('ends at the source when the connection breaks before READY', async () => {
    const { driver, server, set, runs } = await parking({
      async sending({ type }, { server }) {
        if (type === 'prepare') await server.cut();
        return type !== 'prepare';
      },
      hearing: () => false,
    });
    driver.fail(new Error('no READY'));
    expect(await driver.settled).toMatchObject({ outcome: 'reclaimed' });
    expect(runs()).toBe(true);
    // The client has come back by itself, and its source has the pages go.
    expect(await set.dissolve()).toEqual([]);
    expect(phaseAt(server)).toBeNull();
  });

  for (const [what, act] of [
    ['an operator drops it', async (server: FakeServer) => void server.staging.drop(imageId)],
    ['the server ends', (server: FakeServer) => server.staging.close()],
  ] as const) {
    it(`gives the guest back when ${what} at READY`, async () => {
      const { driver, runs } = await parking({
        async sending({ type }, { server }) {
          if (type !== 'grant') return true;
          await act(server);
          return false;
        },
      });
      expect(await driver.settled).toMatchObject({ outcome: 'reclaimed' });
      expect(runs()).toBe(true);
    });
  }

  it('is refused for good when GRANT does not come in time', async () => {
    const { driver, server, runs } = await parking(
      { sending: async ({ type }) => type !== 'grant' },
      { grantTimeoutMs: 100 },
    );
    expect(await driver.settled).toMatchObject({ outcome: 'reclaimed' });
    expect(runs()).toBe(true);
    expect(phaseAt(server)).toBeNull();
    const late = openParkedImage(server.address, connection(), {
      image: imageId,
      secret: imageSecret,
      access: 'read',
    });
    await expect(late).rejects.toMatchObject({ code: 'VMD_LOST', reason: 'abandoned' });
  });
});
